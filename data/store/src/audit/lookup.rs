//! Reading the index: which events of a block have a value, and their numbers and times.
//!
//! A place is an event's position in its block. Must never trust what is kept: a damaged list holds fewer events, and nothing panics.

use super::index::{ADDRESSES, BOUNDS, BY_ADDRESS, KEY, PART};
use super::rows::{self, Rows};
use crate::error::Result;
use rusqlite::types::Value;
use rusqlite::{CachedStatement, Connection, OptionalExtension as _, Row, params};

/// The numbers of the events of a block.
pub(super) struct Places<'a> {
    first: i64,
    listed: Option<&'a [u8]>,
}

impl<'a> Places<'a> {
    pub(super) fn new(first: i64, listed: Option<&'a [u8]>) -> Self {
        Self { first, listed }
    }

    /// Nothing if every number is there.
    pub(super) fn encode(first: i64, last: i64, seqs: &[i64]) -> Option<Vec<u8>> {
        let offset = |seq: &i64| u32::try_from(seq - first).unwrap_or(u32::MAX).to_le_bytes();
        (i64::try_from(seqs.len()).ok() != Some(last - first + 1))
            .then(|| seqs.iter().flat_map(offset).collect())
    }

    pub(super) fn at(&self, place: usize) -> Option<i64> {
        let offset = match self.listed {
            None => i64::try_from(place).ok()?,
            Some(listed) => i64::from(u32::from_le_bytes(*listed.get(place * 4..)?.first_chunk()?)),
        };
        Some(self.first + offset)
    }
}

/// When the events of a block were.
pub(super) struct Times {
    oldest: i64,
    wide: bool,
}

impl Times {
    pub(super) fn new(oldest: i64, newest: i64) -> Self {
        Self { oldest, wide: u32::try_from(newest.saturating_sub(oldest)).is_err() }
    }

    pub(super) fn encode(oldest: i64, newest: i64, times: impl Iterator<Item = i64>) -> Vec<u8> {
        if Self::new(oldest, newest).wide {
            return times.flat_map(i64::to_le_bytes).collect();
        }
        times.flat_map(|time| u32::try_from(time - oldest).unwrap_or(0).to_le_bytes()).collect()
    }

    pub(super) fn at(&self, kept: &[u8], place: usize) -> i64 {
        let cut = |width: usize| kept.get(place * width..).unwrap_or_default();
        match self.wide {
            true => cut(8).first_chunk().map_or(self.oldest, |bytes| i64::from_le_bytes(*bytes)),
            false => cut(4)
                .first_chunk()
                .map_or(self.oldest, |bytes| self.oldest + i64::from(u32::from_le_bytes(*bytes))),
        }
    }
}

/// A value that is looked up, as the table of terms has it: its kind, and the value.
pub(super) type Key = (i64, Value);

/// The statements of one question, which goes over hundreds of blocks.
pub(super) struct Lookup<'db> {
    having: CachedStatement<'db>,
    run: CachedStatement<'db>,
    classes: CachedStatement<'db>,
    times: CachedStatement<'db>,
}

impl<'db> Lookup<'db> {
    pub(super) fn new(db: &'db Connection) -> Result<Self> {
        Ok(Self {
            having: db.prepare_cached(HAVING)?,
            run: db.prepare_cached(RUN_OF)?,
            classes: db.prepare_cached(CLASSES_OF)?,
            times: db.prepare_cached(TIMES_OF)?,
        })
    }

    /// The events of a user in a block that have a value, and their classes; `None` if none has.
    pub(super) fn having(&mut self, block: i64, user: i64, key: &Key) -> Result<Option<(u64, Rows)>> {
        let (kind, term) = key;
        let found = self.having.query_row(params![block, user, kind, term], |row| {
            let kept = row.get_ref(0)?.as_blob()?;
            Ok((rows::classes(kept), rows::decode(kept)))
        });
        Ok(found.optional()?)
    }

    /// Whether events of a host in a block may have an address between two, both included: most hosts have few addresses, which
    /// are away from the range that is asked for in every block alike.
    pub(super) fn may_lie_within(
        &mut self,
        block: i64,
        user: i64,
        host: &Key,
        low: &[u8; KEY],
        high: &[u8; KEY],
    ) -> Result<bool> {
        let bounds = self.having.query_row(params![block, user, BOUNDS, host.1], |row| {
            let kept = row.get_ref(0)?.as_blob()?.as_chunks::<KEY>().0;
            Ok(!matches!(kept, [least, most] if most < low || least > high))
        });
        Ok(bounds.optional()?.unwrap_or(true))
    }

    /// The events of a user in a block whose address lies between two, both included; `None` if there are none.
    pub(super) fn within(
        &mut self,
        block: i64,
        user: i64,
        low: &[u8; KEY],
        high: &[u8; KEY],
    ) -> Result<Option<Rows>> {
        // How many events have an address before the first one of the range, or up to its last; the former only where it stands
        // in the same run, as it does for most ranges.
        let ends = self.run.query_row(params![block, user, ADDRESSES, high], |row| {
            let kept = row.get_ref(1)?.as_blob()?;
            let begins = row.get_ref(0)?.as_blob()? <= &low[..];
            Ok((begins.then(|| rank(kept, low, false)), rank(kept, high, true)))
        });
        let Some((from, to)) = ends.optional()? else { return Ok(None) };
        let from = match from {
            Some(from) => from,
            None => {
                let rank_in = |row: &Row<'_>| Ok(rank(row.get_ref(1)?.as_blob()?, low, false));
                self.run.query_row(params![block, user, ADDRESSES, low], rank_in).optional()?.unwrap_or(0)
            }
        };
        if from >= to {
            return Ok(None);
        }
        let mut found = Rows::none();
        for part in from / PART..=(to - 1) / PART {
            let begin = part * PART;
            let (from, to) = (from.saturating_sub(begin), (to - begin).min(PART));
            let number = i64::try_from(part).unwrap_or(i64::MAX);
            let read = self.having.query_row(params![block, user, BY_ADDRESS, number], |row| {
                let kept = row.get_ref(0)?.as_blob()?;
                let kept = kept.get(2 * from..kept.len().min(2 * to)).unwrap_or_default();
                rows::numbers(kept).for_each(|place| found.insert(place));
                Ok(())
            });
            read.optional()?;
        }
        Ok(Some(found))
    }

    /// Leaves those of these classes, a bit each.
    pub(super) fn retain_classes(&mut self, block: i64, classes: u64, rows: &mut Rows) -> Result<()> {
        Ok(self.classes.query_row([block], |row| {
            let kept = row.get_ref(0)?.as_blob()?;
            rows.retain(|at| kept.get(at).is_some_and(|class| *class < 64 && classes >> class & 1 == 1));
            Ok(())
        })?)
    }

    /// The time and the number of each of these events of a block that spans these times.
    pub(super) fn times(
        &mut self,
        block: i64,
        (oldest, newest): (i64, i64),
        rows: &Rows,
        mut each: impl FnMut(&mut dyn Iterator<Item = (i64, i64)>),
    ) -> Result<()> {
        Ok(self.times.query_row([block], |row| {
            let (kept, places) = (row.get_ref(0)?.as_blob()?, row.get_ref(1)?.as_blob_or_null()?);
            let (numbers, times) = (Places::new(block, places), Times::new(oldest, newest));
            each(&mut rows.iter().filter_map(|at| Some((times.at(kept, at), numbers.at(at)?))));
            Ok(())
        })?)
    }
}

/// How many events of a block have an address before `bound`, or up to it, by the run that it falls in.
fn rank(run: &[u8], bound: &[u8; KEY], included: bool) -> usize {
    let Some((start, keys)) = run.split_first_chunk::<2>() else { return 0 };
    let mut rank = u16::from_le_bytes(*start);
    for entry in keys.as_chunks::<{ KEY + 2 }>().0 {
        let (key, end) = entry.split_at(KEY);
        if key > &bound[..] || key == &bound[..] && !included {
            break;
        }
        rank = end.first_chunk().map_or(rank, |bytes| u16::from_le_bytes(*bytes));
    }
    usize::from(rank)
}

/// The VMs of an account that have events in a block.
pub(super) const VMS_OF: &str = "SELECT term FROM terms WHERE block = ?1 AND user = ?2 AND kind = 1";
pub(super) const HAVING: &str =
    "SELECT rows FROM terms WHERE block = ?1 AND user = ?2 AND kind = ?3 AND term = ?4";
pub(super) const RUN_OF: &str = "SELECT term, rows FROM terms WHERE block = ?1 AND user = ?2 AND kind = ?3 AND term <= ?4 ORDER BY term DESC LIMIT 1";
pub(super) const CLASSES_OF: &str = "SELECT classes FROM blocks WHERE first = ?1";
pub(super) const TIMES_OF: &str = "SELECT times, places FROM blocks WHERE first = ?1";
