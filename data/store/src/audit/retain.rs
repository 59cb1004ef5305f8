//! Taking events out of the log: those that are too old from the old end, and what is too many or too large from who holds most.
//!
//! A step is one short transaction that leaves events, index, chain and holdings right; writing goes on between. Must never
//! leave an event that a question finds and that is gone, nor a gap that nobody answers for.

use super::chain::{Chain, Hash};
use super::cuts::Cut;
use super::index;
use super::lookup;
use super::rows::BLOCK;
use super::shares::{self, Measure, OCTETS, Owner, Tally};
use crate::error::{Result, StoreError};
use rusqlite::{Connection, Row, Transaction};
use std::collections::{HashMap, HashSet};

/// Events that are too old: removed in one step at most.
const STEP: i64 = 5_000;
/// Blocks looked at in one step at most, of which nothing is taken.
const LOOKED: usize = 64;
/// It goes below a bound by this part of it at once: a block that events are taken out of is made anew, and that is to be done
/// for many of them rather than for each few that come.
const BELOW: u64 = 64;

/// How much of the log is kept.
#[derive(Clone, Copy, Debug)]
pub struct Keep {
    /// No event from before this time (microseconds since the epoch).
    pub since_us: i64,
    /// No more events than this.
    pub events: u64,
    /// No more octets in the file than this.
    pub octets: u64,
}

/// Octets of the file that are in use.
fn size(db: &Connection) -> Result<u64> {
    let used = number(db, "page_count")?.saturating_sub(number(db, "freelist_count")?);
    Ok(used.saturating_mul(number(db, "page_size")?))
}

/// What SQLite says of the file.
pub(super) fn number(db: &Connection, pragma: &str) -> Result<u64> {
    let number: i64 = db.pragma_query_value(None, pragma, |row| row.get(0))?;
    Ok(u64::try_from(number).unwrap_or(0))
}

fn hash(row: &Row<'_>) -> Result<Hash> {
    let hash: Vec<u8> = row.get("hash")?;
    hash.try_into().map_err(|_| StoreError::Corrupt("an audit hash is not 32 bytes".into()))
}

/// Removes some of the oldest events that are from before a time. Answers how many went.
pub(super) fn too_old(tx: &Transaction<'_>, chain: &Chain, since_us: i64) -> Result<u64> {
    let mut statement = tx.prepare_cached(&format!(
        "SELECT seq, ts, user, vm, {OCTETS} AS octets, hash FROM events ORDER BY seq LIMIT ?1"
    ))?;
    let mut rows = statement.query([STEP])?;
    let (mut tally, mut gone, mut first, mut end) = (Tally::default(), 0, None, None);
    while let Some(row) = rows.next()? {
        // Events come nearly in order of time; one that came late goes when its turn comes.
        if row.get::<_, i64>("ts")? >= since_us {
            break;
        }
        let seq = row.get("seq")?;
        tally.add((row.get("user")?, row.get("vm")?), row.get("octets")?, seq);
        first.get_or_insert(seq);
        end = Some((seq, hash(row)?));
        gone += 1;
    }
    drop(rows);
    let (Some(first), Some((last, hash))) = (first, end) else { return Ok(0) };
    tx.execute("DELETE FROM events WHERE seq <= ?1", [last])?;
    tally.went(tx)?;
    index::remove(tx, first, last)?;
    chain.begin_after(tx, last, &hash)?;
    Ok(gone)
}

/// Removes the events of a span but for some runs of it. Those are taken out and put back together: SQLite would leave pages as
/// they are until less than a third of each is in use, and removing a part of a log would not make it smaller.
fn keep_only(tx: &Transaction<'_>, first: i64, last: i64, stay: &[(i64, i64)]) -> Result<()> {
    // Not on a disk that may be full; some MiB.
    tx.pragma_update(None, "temp_store", "memory")?;
    tx.execute_batch("CREATE TEMP TABLE IF NOT EXISTS stay AS SELECT * FROM main.events WHERE 0")?;
    let mut put =
        tx.prepare_cached("INSERT INTO temp.stay SELECT * FROM main.events WHERE seq BETWEEN ?1 AND ?2")?;
    for run in stay {
        put.execute([run.0, run.1])?;
    }
    tx.prepare_cached("DELETE FROM main.events WHERE seq BETWEEN ?1 AND ?2")?.execute([first, last])?;
    tx.prepare_cached("INSERT INTO main.events SELECT * FROM temp.stay ORDER BY rowid")?.execute([])?;
    tx.prepare_cached("DELETE FROM temp.stay")?.execute([])?;
    Ok(())
}

/// What is to be taken from a VM yet.
struct Take {
    left: u64,
    oldest: i64,
}

/// What is to be taken from whom, and how far that came: blocks are gone through once, from the old end, for all VMs together.
pub(super) struct Plan {
    takes: HashMap<Owner, Take>,
    measure: Measure,
    at: i64,
}

impl Plan {
    /// `None` if the log is within its bounds.
    pub(super) fn new(db: &Connection, keep: &Keep) -> Result<Option<Self>> {
        let all = shares::holdings(db)?;
        let (events, size) = (shares::sum(&all, Measure::Events), size(db)?);
        let (measure, amount) = if events > keep.events {
            let below = Some(keep.events / BELOW).filter(|below| *below > BLOCK as u64).unwrap_or(0);
            (Measure::Events, events - keep.events + below)
        } else if size > keep.octets {
            // How much of the file goes with an event is known only when it is gone: the same part of both, then see.
            let over = u128::from(size - keep.octets + keep.octets / BELOW);
            let part = u128::from(shares::sum(&all, Measure::Octets)) * over / u128::from(size);
            (Measure::Octets, u64::try_from(part).unwrap_or(u64::MAX).max(1))
        } else {
            return Ok(None);
        };
        let takes = shares::divide(&all, measure, amount)
            .into_iter()
            .map(|(vm, left)| (vm.owner, Take { left, oldest: vm.oldest }))
            .collect();
        Ok(Some(Self { takes, measure, at: 0 }))
    }

    pub(super) fn is_done(&self) -> bool {
        self.takes.is_empty()
    }

    /// Takes from the next block, or from the events in none. Answers how many went. After an error it is of no more use.
    pub(super) fn step(&mut self, tx: &Transaction<'_>, chain: &Chain) -> Result<u64> {
        let users: HashSet<i64> = self.takes.keys().map(|(user, _)| *user).collect();
        for _ in 0..LOOKED {
            let Some(oldest) = self.takes.values().map(|take| take.oldest).min() else { return Ok(0) };
            let from = self.at.max(oldest);
            let Some((first, last)) = index::block_at(tx, from)? else { return self.end(tx, chain) };
            self.at = last + 1;
            if self.takes_from(tx, &users, first)? {
                let (gone, left) = self.take(tx, chain, first, last)?;
                if gone > 0 {
                    index::remake(tx, first, last, left)?;
                }
                return Ok(gone);
            }
        }
        Ok(0)
    }

    /// Whether a block has events of a VM that gives.
    fn takes_from(&self, tx: &Transaction<'_>, users: &HashSet<i64>, block: i64) -> Result<bool> {
        let mut statement = tx.prepare_cached(lookup::VMS_OF)?;
        for user in users {
            let mut rows = statement.query([block, *user])?;
            while let Some(row) = rows.next()? {
                if self.takes.contains_key(&(*user, row.get(0)?)) {
                    return Ok(true);
                }
            }
        }
        Ok(false)
    }

    /// The newest events, which are in no block yet: few.
    fn end(&mut self, tx: &Transaction<'_>, chain: &Chain) -> Result<u64> {
        let first = index::last(tx)?.map_or(i64::MIN, |last| last + 1);
        let (gone, _) = self.take(tx, chain, first, i64::MAX)?;
        // Nothing of them is left anywhere: their holdings were wrong.
        for ((user, vm), _) in self.takes.drain() {
            tracing::warn!(user, vm, "the audit log held less of a VM than was written down");
            tx.execute("DELETE FROM holdings WHERE user = ?1 AND vm = ?2", [user, vm])?;
        }
        Ok(gone)
    }

    /// Takes events out of a span. Answers how many went, and how many are left.
    fn take(&mut self, tx: &Transaction<'_>, chain: &Chain, first: i64, last: i64) -> Result<(u64, usize)> {
        let (mut tally, mut runs, mut gone) = (Tally::default(), Vec::<Cut>::new(), 0);
        let (mut stay, mut left) = (Vec::<(i64, i64)>::new(), 0);
        let mut statement = tx.prepare_cached(&format!(
            "SELECT seq, user, vm, {OCTETS} AS octets, hash FROM events WHERE seq BETWEEN ?1 AND ?2 ORDER BY seq"
        ))?;
        let mut rows = statement.query([first, last])?;
        while let Some(row) = rows.next()? {
            let (seq, owner): (i64, Owner) = (row.get("seq")?, (row.get("user")?, row.get("vm")?));
            let Some(take) = self.takes.get_mut(&owner).filter(|take| take.left > 0) else {
                left += 1;
                match stay.last_mut() {
                    Some((_, end)) if *end + 1 == seq => *end = seq,
                    _ => stay.push((seq, seq)),
                }
                continue;
            };
            let octets: i64 = row.get("octets")?;
            take.left = take.left.saturating_sub(match self.measure {
                Measure::Events => 1,
                Measure::Octets => u64::try_from(octets).unwrap_or(0),
            });
            tally.add(owner, octets, seq);
            gone += 1;
            let hash = hash(row)?;
            match runs.last_mut() {
                Some(run) if run.last + 1 == seq => (run.last, run.hash) = (seq, hash),
                _ => runs.push(Cut { first: seq, last: seq, hash }),
            }
        }
        drop(rows);
        if gone > 0 {
            keep_only(tx, first, last, &stay)?;
        }
        tally.went(tx)?;
        chain.cut(tx, &runs)?;
        self.takes.retain(|_, take| take.left > 0);
        Ok((gone, left))
    }
}
