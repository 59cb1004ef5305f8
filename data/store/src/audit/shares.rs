//! Who holds how much of the log, and what each gives up when there is too much.
//!
//! The account that holds most gives, of its VMs the one that holds most, until there is no longer too much: what is left to each
//! is max-min fair among accounts, and within each among its VMs. Who holds less than that level loses nothing.

use super::chain::Stored;
use crate::error::Result;
use rusqlite::{Connection, Transaction, params};
use std::cmp::Reverse;
use std::collections::HashMap;

/// An account and a VM of it.
pub(super) type Owner = (i64, i64);

/// About what an event takes beside its texts, with its part of the index.
const EVENT: usize = 128;
/// The octets of an event, as [`octets`] counts them.
pub(super) const OCTETS: &str = "128 + ifnull(octet_length(host), 0) + ifnull(octet_length(rule), 0) + ifnull(octet_length(method), 0) + ifnull(octet_length(path), 0) + ifnull(octet_length(secrets), 0) + ifnull(octet_length(withheld), 0)";

/// About how many octets of the file are an event's.
pub(super) fn octets(event: &Stored) -> i64 {
    let Stored { host, rule, method, path, secrets, withheld, .. } = event;
    let texts = [host, rule, method, path, secrets, withheld];
    let octets = EVENT + texts.into_iter().flatten().map(String::len).sum::<usize>();
    i64::try_from(octets).unwrap_or(i64::MAX)
}

/// Events that came or went, summed up by their owners.
#[derive(Default)]
pub(super) struct Tally(HashMap<Owner, Sum>);

struct Sum {
    events: i64,
    octets: i64,
    first: i64,
    last: i64,
}

impl Tally {
    /// Counts an event; they rise by number.
    pub(super) fn add(&mut self, owner: Owner, octets: i64, seq: i64) {
        let sum = self.0.entry(owner).or_insert(Sum { events: 0, octets: 0, first: seq, last: seq });
        sum.events += 1;
        sum.octets = sum.octets.saturating_add(octets);
        sum.last = seq;
    }

    /// They are new.
    pub(super) fn came(&self, tx: &Transaction<'_>) -> Result<()> {
        let mut put = tx.prepare_cached(
            "INSERT INTO holdings (user, vm, events, octets, oldest) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (user, vm) DO UPDATE SET events = events + excluded.events, octets = octets + excluded.octets",
        )?;
        for ((user, vm), sum) in &self.0 {
            put.execute(params![user, vm, sum.events, sum.octets, sum.first])?;
        }
        Ok(())
    }

    /// They were the oldest of their owners, and are gone.
    pub(super) fn went(&self, tx: &Transaction<'_>) -> Result<()> {
        let mut take = tx.prepare_cached(
            "UPDATE holdings SET events = events - ?3, octets = max(octets - ?4, 0), oldest = ?5 WHERE user = ?1 AND vm = ?2",
        )?;
        let mut end =
            tx.prepare_cached("DELETE FROM holdings WHERE user = ?1 AND vm = ?2 AND events <= 0")?;
        for ((user, vm), sum) in &self.0 {
            take.execute(params![user, vm, sum.events, sum.octets, sum.last + 1])?;
            end.execute([user, vm])?;
        }
        Ok(())
    }
}

/// Counts everything anew.
pub(super) fn recount(tx: &Transaction<'_>) -> Result<()> {
    tx.execute("DELETE FROM holdings", [])?;
    let mut tally = Tally::default();
    let mut statement = tx.prepare(&format!("SELECT seq, user, vm, {OCTETS} FROM events ORDER BY seq"))?;
    let mut rows = statement.query([])?;
    while let Some(row) = rows.next()? {
        tally.add((row.get(1)?, row.get(2)?), row.get(3)?, row.get(0)?);
    }
    tally.came(tx)
}

/// What a bound is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Measure {
    Events,
    Octets,
}

/// What a VM holds.
pub(super) struct Holding {
    pub(super) owner: Owner,
    pub(super) events: u64,
    pub(super) octets: u64,
    /// No event of it stands before this number.
    pub(super) oldest: i64,
}

impl Holding {
    fn of(&self, measure: Measure) -> u64 {
        match measure {
            Measure::Events => self.events,
            Measure::Octets => self.octets,
        }
    }
}

/// All holdings, those of an account together.
pub(super) fn holdings(db: &Connection) -> Result<Vec<Holding>> {
    let mut statement =
        db.prepare_cached("SELECT user, vm, events, octets, oldest FROM holdings ORDER BY user, vm")?;
    let rows = statement.query_map([], |row| {
        let number = |index: usize| row.get::<_, i64>(index).map(|n| u64::try_from(n).unwrap_or(0));
        let owner = (row.get(0)?, row.get(1)?);
        Ok(Holding { owner, events: number(2)?, octets: number(3)?, oldest: row.get(4)? })
    })?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

pub(super) fn sum(holdings: &[Holding], measure: Measure) -> u64 {
    holdings.iter().fold(0, |sum, holding| sum.saturating_add(holding.of(measure)))
}

/// What each VM gives up so that so much is gone.
pub(super) fn divide(holdings: &[Holding], measure: Measure, amount: u64) -> Vec<(&Holding, u64)> {
    let accounts: Vec<&[Holding]> = holdings.chunk_by(|a, b| a.owner.0 == b.owner.0).collect();
    let oldest = |vms: &[Holding]| vms.iter().map(|vm| vm.oldest).min().unwrap_or(0);
    let of_accounts = lower(accounts.iter().map(|vms| (sum(vms, measure), oldest(vms))), amount);
    let mut all = Vec::new();
    for (vms, amount) in accounts.into_iter().zip(of_accounts) {
        let of_vms = lower(vms.iter().map(|vm| (vm.of(measure), vm.oldest)), amount);
        all.extend(vms.iter().zip(of_vms).filter(|(_, amount)| *amount > 0));
    }
    all
}

/// Lowers the highest to one level, so that `amount` is gone in all: how much each loses. Where one must lose more than another,
/// it is the one whose events are older.
fn lower(heights: impl Iterator<Item = (u64, i64)>, amount: u64) -> Vec<u64> {
    let heights: Vec<_> = heights.collect();
    let mut order: Vec<usize> = (0..heights.len()).collect();
    order.sort_by_key(|at| Reverse(heights[*at].0));
    let (mut above, mut sum) = (0u128, 0u128);
    for at in &order {
        // How much the ones before are over this one.
        if sum - above * u128::from(heights[*at].0) >= u128::from(amount) {
            break;
        }
        above += 1;
        sum += u128::from(heights[*at].0);
    }
    let mut lost = vec![0; heights.len()];
    if above == 0 {
        return lost;
    }
    let rest = sum.saturating_sub(u128::from(amount));
    let (level, more) = (rest / above, rest % above);
    let (above, more) = (usize::try_from(above).unwrap_or(usize::MAX), usize::try_from(more).unwrap_or(0));
    order.truncate(above);
    order.sort_by_key(|at| heights[*at].1);
    for (turn, at) in order.into_iter().enumerate() {
        let keeps = level + u128::from(turn >= above - more);
        lost[at] = heights[at].0.saturating_sub(u64::try_from(keeps).unwrap_or(u64::MAX));
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One at a time from the highest, of equals from the older: the rule itself, slowly.
    fn slowly(heights: &[(u64, i64)], amount: u64) -> Vec<u64> {
        let mut left: Vec<u64> = heights.iter().map(|(height, _)| *height).collect();
        for _ in 0..amount {
            let most = (0..left.len()).max_by_key(|at| (left[*at], Reverse(heights[*at].1)));
            if let Some(most) = most {
                left[most] = left[most].saturating_sub(1);
            }
        }
        heights.iter().zip(left).map(|((height, _), left)| height - left).collect()
    }

    #[test]
    fn the_highest_are_lowered_to_one_level() {
        let mut random = 7u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        for _ in 0..2_000 {
            let count = next(7);
            let heights: Vec<(u64, i64)> = (0..count).map(|n| (next(12), (n * 5 % 7) as i64)).collect();
            let amount = next(60);
            assert_eq!(
                lower(heights.iter().copied(), amount),
                slowly(&heights, amount),
                "{heights:?} {amount}"
            );
        }
        assert_eq!(lower([(u64::MAX, 1), (u64::MAX, 2)].into_iter(), u64::MAX), [1 << 63, (1 << 63) - 1]);
    }

    #[test]
    fn an_account_with_many_vms_gives_as_one_with_one() {
        let vm = |user: i64, vm: i64, events: u64| Holding {
            owner: (user, vm),
            events,
            octets: 1000 - events,
            oldest: vm,
        };
        let all = [vm(1, 1, 300), vm(1, 2, 300), vm(1, 3, 10), vm(2, 4, 400), vm(3, 5, 100)];
        let given = |measure, amount| -> Vec<(i64, u64)> {
            divide(&all, measure, amount).iter().map(|(vm, amount)| (vm.owner.1, *amount)).collect()
        };
        // 610 against 400: the account of three loses 210 first, of its two large ones.
        assert_eq!(given(Measure::Events, 210), [(1, 105), (2, 105)]);
        assert_eq!(given(Measure::Events, 410), [(1, 155), (2, 155), (4, 100)]);
        assert_eq!(given(Measure::Events, u64::MAX).iter().map(|(_, n)| n).sum::<u64>(), 1_110);
        assert_eq!(given(Measure::Octets, 90), [(3, 90)]);
    }
}
