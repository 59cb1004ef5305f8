//! Reading the log in the order in which it is written, for those who follow it: nothing that comes late is missed.

use super::query::{self, AuditFilter};
use super::record::{self, AuditRecord, COLUMNS};
use crate::error::Result;
use rusqlite::{Connection, params};
use tapgate_model::UserId;

/// Rows looked at in one step, whoever's they are.
const WINDOW: i64 = 20_000;
/// Events answered in one step.
const STEP: i64 = 500;
/// Events of different parts are written a little out of order: following from a time begins so many rows before.
const MARGIN: i64 = 10_000;

impl AuditFilter {
    /// Whether an event is wanted, page aside.
    fn admits(&self, event: &AuditRecord) -> bool {
        let Self { vm, rule_allows, passed, mode, host, cidr, protocol, since_us, until_us, page: _ } = self;
        vm.as_ref().is_none_or(|want| *want == event.vm)
            && rule_allows.is_none_or(|want| want == event.rule_allows)
            && passed.is_none_or(|want| want == event.passed)
            && mode.is_none_or(|want| want == event.mode)
            && host.as_ref().is_none_or(|want| event.host.as_ref() == Some(want))
            && cidr.is_none_or(|want| event.address.is_some_and(|address| want.contains(address)))
            && protocol.is_none_or(|want| want == event.protocol)
            && since_us.is_none_or(|want| event.timestamp_us > want)
            && until_us.is_none_or(|want| event.timestamp_us < want)
    }
}

/// The number to follow from: the end, or a little before the first event after a time.
pub(super) fn begin(db: &Connection, user: &UserId, since_us: Option<i64>) -> Result<i64> {
    let end: i64 = db.query_row("SELECT ifnull(max(seq), 0) FROM events", [], |row| row.get(0))?;
    let Some(since) = since_us else { return Ok(end) };
    let first = query::first_after(db, user, since)?.map_or(end, |seq| end.min(seq - 1));
    Ok(first.saturating_sub(MARGIN).max(0))
}

/// A user's events after a number, and the number to go on from; the same number when there is nothing more.
pub(super) fn step(
    db: &Connection,
    user: &UserId,
    filter: &AuditFilter,
    after: i64,
) -> Result<(Vec<AuditRecord>, i64)> {
    // Numbers that retention took are passed over.
    let (next, end): (Option<i64>, Option<i64>) = db.query_row(
        "SELECT (SELECT min(seq) FROM events WHERE seq > ?1), (SELECT max(seq) FROM events)",
        [after],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    let (Some(next), Some(end)) = (next, end) else { return Ok((Vec::new(), after)) };
    let last = end.min(next.saturating_add(WINDOW - 1));
    let mut statement = db.prepare_cached(&format!(
        "SELECT {COLUMNS} WHERE e.seq > ?1 AND e.seq <= ?2 AND +e.user = (SELECT id FROM names WHERE name = ?3)
         ORDER BY e.seq LIMIT ?4"
    ))?;
    let mut rows = statement.query(params![after, last, user.as_str(), STEP])?;
    let (mut events, mut seen, mut at) = (Vec::new(), 0, last);
    while let Some(row) = rows.next()? {
        seen += 1;
        if seen == STEP {
            at = row.get("seq")?;
        }
        let event = record::read(row)?;
        if filter.admits(&event) {
            events.push(event);
        }
    }
    Ok((events, at))
}
