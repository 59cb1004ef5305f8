//! The index of the log: for each block of events, which of them have a user, a VM, a host or an address, and their times.
//!
//! The newest events stand in no block until there are enough; small blocks are joined to a full one. Blocks are written by
//! the thread that writes events, in the same transaction. Must never be needed to read an event: it can be made anew.

use super::lookup::{Places, Times};
use super::rows::{self, BLOCK};
use crate::error::{Result, StoreError};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use std::collections::HashMap;

/// Events in no block beyond which a small one is made: so many rows a question looks through at most.
const LOOSE: i64 = 1_024;
/// Places in one part of the list by addresses: a range that few have needs few parts of it.
pub(super) const PART: usize = 1_024;
/// Addresses in one run of an index: below a quarter of a page, beyond which SQLite would put them elsewhere.
const RUN: usize = 48;
pub(super) const KEY: usize = 16;

const USER: i64 = 0;
const VM: i64 = 1;
const HOST: i64 = 2;
pub(super) const BY_ADDRESS: i64 = 3;
pub(super) const ADDRESSES: i64 = 4;
/// Between which addresses the events of a host lie, where they are many; not all blocks have it.
pub(super) const BOUNDS: i64 = 5;
/// Events of a host from which on its bounds are kept.
const MANY: usize = 64;

/// A value that events are found by; the kind first, as the table is ordered.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Term {
    User,
    Vm(i64),
    Host(String),
}

impl Term {
    pub(super) fn key(&self) -> (i64, Value) {
        match self {
            Self::User => (USER, Value::Integer(0)),
            Self::Vm(vm) => (VM, Value::Integer(*vm)),
            Self::Host(host) => (HOST, Value::Text(host.clone())),
        }
    }
}

/// How far the index goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Reach {
    /// The last event in a full block.
    full: i64,
    /// The last event in any block.
    last: i64,
}

fn io(value: usize) -> i64 {
    i64::try_from(value).unwrap_or(i64::MAX)
}

impl Reach {
    /// Of a log that ends at `end`.
    pub(super) fn read(db: &Connection, end: i64) -> Result<Self> {
        let full: Option<i64> = db
            .query_row(
                "SELECT last FROM blocks WHERE last - first >= ?1 - 1 ORDER BY first DESC LIMIT 1",
                [io(BLOCK)],
                |row| row.get(0),
            )
            .optional()?;
        // Where retention took everything, nothing is to be made.
        let next: Option<i64> =
            db.query_row("SELECT min(seq) FROM events WHERE seq > ?1", [full.unwrap_or(i64::MIN)], |row| {
                row.get(0)
            })?;
        let full = next.map_or(end, |next| next - 1);
        Ok(Self { full, last: last(db)?.map_or(full, |last| last.max(full)) })
    }

    /// Makes the blocks that are due when the log ends at `end`; at most `most` full ones. Answers how far it came.
    pub(super) fn extend(mut self, tx: &Transaction<'_>, end: i64, most: usize) -> Result<Self> {
        for _ in 0..most {
            if end - self.full < io(BLOCK) {
                break;
            }
            remove(tx, self.full + 1, i64::MAX)?;
            let last = self.full + io(BLOCK);
            make(tx, self.full + 1, last)?;
            self = Self { full: last, last };
        }
        if end - self.full < io(BLOCK) && end - self.last >= LOOSE {
            make(tx, self.last + 1, end)?;
            self.last = end;
        }
        Ok(self)
    }

    /// Whether more blocks are due.
    pub(super) fn is_behind(self, end: i64) -> bool {
        end - self.full >= io(BLOCK)
    }
}

/// The last event in any block.
pub(super) fn last(db: &Connection) -> Result<Option<i64>> {
    let sql = "SELECT last FROM blocks ORDER BY first DESC LIMIT 1";
    Ok(db.prepare_cached(sql)?.query_row([], |row| row.get(0)).optional()?)
}

/// Where the last block begins that begins no later than a number: none before it reaches so far.
fn near(db: &Connection, number: i64) -> Result<i64> {
    let sql = "SELECT max(first) FROM blocks WHERE first <= ?1";
    let first: Option<i64> = db.prepare_cached(sql)?.query_row([number], |row| row.get(0))?;
    Ok(first.unwrap_or(number))
}

/// The first block that ends at a number or later.
pub(super) fn block_at(db: &Connection, from: i64) -> Result<Option<(i64, i64)>> {
    let sql = "SELECT first, last FROM blocks WHERE first >= ?1 AND last >= ?2 ORDER BY first LIMIT 1";
    let block = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
    Ok(db.prepare_cached(sql)?.query_row([near(db, from)?, from], block).optional()?)
}

/// Makes a block anew that events were taken out of, so many are left, and joins it with the ones before that hold no more than
/// twice as many: the index grows with the events that are kept, not with those that ever were, and an event is moved to a larger
/// block some ten times at most. Blocks at the end that are not full yet keep their bounds, which the writer remembers.
pub(super) fn remake(tx: &Transaction<'_>, first: i64, last: i64, left: usize) -> Result<()> {
    let (mut first, mut rows) = (first, io(left));
    remove(tx, first, last)?;
    if rows == 0 {
        return Ok(());
    }
    let is_whole = |first: i64, last: i64| last - first >= io(BLOCK) - 1;
    let mut before = tx.prepare_cached(
        "SELECT first, last, length(classes) FROM blocks WHERE first < ?1 ORDER BY first DESC LIMIT 1",
    )?;
    while is_whole(first, last) {
        let block =
            before.query_row([first], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?))).optional()?;
        let Some((start, end, more)): Option<(i64, i64, i64)> = block else { break };
        if !is_whole(start, end)
            || more > 2 * rows
            || more + rows > io(BLOCK)
            || u32::try_from(last - start).is_err()
        {
            break;
        }
        remove(tx, start, end)?;
        (first, rows) = (start, rows + more);
    }
    make(tx, first, last)
}

/// Removes blocks that end in a span of numbers.
pub(super) fn remove(tx: &Transaction<'_>, from: i64, to: i64) -> Result<()> {
    let values = [near(tx, from)?, to, from];
    tx.prepare_cached(
        "DELETE FROM terms WHERE block IN (SELECT first FROM blocks WHERE first BETWEEN ?1 AND ?2 AND last BETWEEN ?3 AND ?2)",
    )?
    .execute(values)?;
    tx.prepare_cached("DELETE FROM blocks WHERE first BETWEEN ?1 AND ?2 AND last BETWEEN ?3 AND ?2")?
        .execute(values)?;
    Ok(())
}

/// Makes the block of the events with these numbers.
fn make(tx: &Transaction<'_>, first: i64, last: i64) -> Result<()> {
    let mut terms: HashMap<(i64, Term), (u64, Vec<u16>)> = HashMap::new();
    let mut addresses: HashMap<i64, Vec<([u8; KEY], u16)>> = HashMap::new();
    let (mut seqs, mut classes, mut times, mut keys) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut statement = tx.prepare_cached(
        "SELECT seq, ts, user, vm, class, host, address FROM events WHERE seq BETWEEN ?1 AND ?2 ORDER BY seq",
    )?;
    let mut found = statement.query([first, last])?;
    while let Some(row) = found.next()? {
        let (user, vm, class): (i64, i64, u8) = (row.get(2)?, row.get(3)?, row.get(4)?);
        let place = u16::try_from(seqs.len()).ok().filter(|place| usize::from(*place) < BLOCK);
        let Some(place) = place else {
            return Err(StoreError::Internal(format!("more than {BLOCK} audit events in a block")));
        };
        seqs.push(row.get::<_, i64>(0)?);
        times.push(row.get::<_, i64>(1)?);
        classes.push(class);
        let mut add = |term: Term| {
            let (mask, places) = terms.entry((user, term)).or_default();
            *mask |= 1u64.checked_shl(u32::from(class)).unwrap_or(0);
            places.push(place);
        };
        add(Term::User);
        add(Term::Vm(vm));
        if let Some(host) = row.get::<_, Option<String>>(5)? {
            add(Term::Host(host));
        }
        let address = row.get_ref(6)?.as_blob_or_null().ok().flatten();
        let key = address.and_then(|address| <[u8; KEY]>::try_from(address).ok());
        if let Some(key) = key {
            addresses.entry(user).or_default().push((key, place));
        }
        keys.push(key);
    }
    let (Some(oldest), Some(newest)) = (times.iter().min().copied(), times.iter().max().copied()) else {
        return Ok(());
    };
    let places = Places::encode(first, last, &seqs);
    let times = Times::encode(oldest, newest, times.into_iter());
    tx.prepare_cached(
        "INSERT INTO blocks (first, last, oldest, newest, classes, times, places) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
    )?
    .execute(params![first, last, oldest, newest, classes, times, places])?;
    let mut insert =
        tx.prepare_cached("INSERT INTO terms (block, user, kind, term, rows) VALUES (?1, ?2, ?3, ?4, ?5)")?;
    let mut terms: Vec<_> = terms.into_iter().collect();
    terms.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    for ((user, term), (mask, places)) in terms {
        let (kind, value) = term.key();
        insert.execute(params![first, user, kind, value, rows::encode(mask, &places)])?;
        if kind == HOST && places.len() >= MANY {
            let own = || places.iter().filter_map(|place| *keys.get(usize::from(*place))?);
            if let (Some(low), Some(high)) = (own().min(), own().max()) {
                insert.execute(params![first, user, BOUNDS, value, [low, high].concat()])?;
            }
        }
    }
    for (user, mut list) in addresses {
        list.sort_unstable();
        for (part, list) in list.chunks(PART).enumerate() {
            let places: Vec<u8> = list.iter().flat_map(|(_, place)| place.to_le_bytes()).collect();
            insert.execute(params![first, user, BY_ADDRESS, io(part), places])?;
        }
        for (key, run) in runs(&list) {
            insert.execute(params![first, user, ADDRESSES, key, run])?;
        }
    }
    Ok(())
}

/// Sorted addresses in runs: how many events come before the run, then each address with how many there are up to its end.
fn runs(list: &[([u8; KEY], u16)]) -> Vec<([u8; KEY], Vec<u8>)> {
    let mut runs: Vec<([u8; KEY], Vec<u8>)> = Vec::new();
    let (mut before, mut in_run) = (0u16, 0);
    for same in list.chunk_by(|a, b| a.0 == b.0) {
        let Some((key, _)) = same.first() else { continue };
        if in_run % RUN == 0 {
            runs.push((*key, before.to_le_bytes().to_vec()));
        }
        in_run += 1;
        before = before.saturating_add(u16::try_from(same.len()).unwrap_or(u16::MAX));
        if let Some((_, run)) = runs.last_mut() {
            run.extend_from_slice(key);
            run.extend_from_slice(&before.to_le_bytes());
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::super::chain::{Chain, Stored};
    use super::super::query;
    use crate::page::{Cursors, Order, PageRequest};
    use crate::pool::{Durability, connect};
    use crate::seal::SealKey;
    use crate::{AuditFilter, AuditLog, Keep};
    use rusqlite::params;
    use tapgate_model::{AuditEvent, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};

    const EVENTS: i64 = 20_000;

    /// A log as the schema before had it, hosts in a table of their own.
    fn older(path: &std::path::Path, chain: &Chain, user: &UserId, vm: &VmId) {
        let mut db = rusqlite::Connection::open(path).unwrap();
        db.execute_batch(include_str!("../migrations/audit-1.sql")).unwrap();
        db.execute_batch(include_str!("../migrations/audit-2.sql")).unwrap();
        db.pragma_update(None, "user_version", 2).unwrap();
        let tx = db.transaction().unwrap();
        tx.execute("INSERT INTO names (id, name) VALUES (1, ?1), (2, ?2)", [user.as_str(), vm.as_str()])
            .unwrap();
        tx.execute("INSERT INTO hosts (id, user, name) VALUES (1, 1, 'a.example'), (2, 1, 'b.example')", [])
            .unwrap();
        let (mut hash, mut scratch) = ([0; 32], Vec::new());
        for seq in 1..=EVENTS {
            let policy = VmPolicy {
                vm: vm.clone(),
                user: user.clone(),
                generation: 1,
                mode: Mode::Enforce,
                rules: Default::default(),
                secrets: [].into(),
                secrets_over_http: Default::default(),
            };
            let mut event =
                AuditEvent::new(&policy, Protocol::Tls, Verdict::Deny { reason: Reason::NoRule }, seq);
            let host = [Some(1i64), Some(2), None][usize::try_from(seq % 3).unwrap()];
            event.host = host.map(|id| if id == 1 { "a.example" } else { "b.example" }.parse().unwrap());
            event.address = Some("192.0.2.7".parse().unwrap());
            let e = Stored::of(event);
            hash = chain.next(&hash, &e, &mut scratch);
            tx.prepare_cached(
                "INSERT INTO events (seq, id, ts, user, vm, class, host, address, reason, bytes_out, bytes_in, duration_ms,
                 count, hash) VALUES (?1, ?2, ?3, 1, 2, ?4, ?5, ?6, ?7, 0, 0, 0, 1, ?8)",
            )
            .unwrap()
            .execute(params![seq, e.id, e.ts, e.class, host, e.address, e.reason, hash])
            .unwrap();
        }
        chain.set_mark(&tx, "head", EVENTS, &hash).unwrap();
        tx.commit().unwrap();
    }

    #[tokio::test]
    async fn an_older_log_is_taken_over_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.db");
        let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
        let (user, vm) = (UserId::generate(), VmId::generate());
        older(&path, &Chain::new(&key), &user, &vm);
        let log = AuditLog::open(&path, &key, Cursors::new(&key)).unwrap();
        assert_eq!(log.verify().await.unwrap(), Ok(u64::try_from(EVENTS).unwrap()));
        let filter = AuditFilter {
            vm: Some(vm),
            host: Some("b.example".into()),
            cidr: Some("192.0.2.0/24".parse().unwrap()),
            until_us: Some(1_000),
            ..AuditFilter::all(PageRequest { limit: 500, cursor: None, order: Order::Desc })
        };
        let page = log.list(&user, filter.clone()).await.unwrap();
        assert_eq!(page.items.len(), 333);
        assert!(page.items.iter().all(|event| event.host.as_deref() == Some("b.example")));
        // What was there is in blocks: a question goes through few events one by one.
        let db = connect(&path, Durability::Normal, false).unwrap();
        let last: i64 = db.query_row("SELECT max(last) FROM blocks", [], |row| row.get(0)).unwrap();
        assert!(last > EVENTS - super::LOOSE, "{last}");
        assert_eq!(query::first_after(&db, &user, 17_000).unwrap(), Some(17_001));
        let pragma = |name| -> i64 { db.pragma_query_value(None, name, |row| row.get(0)).unwrap() };
        assert_eq!((pragma("auto_vacuum"), pragma("page_size")), (2, 16_384));
        drop(log);
        // As the schema after that one had it: nobody counted who holds how much, and blocks list no places.
        let db = connect(&path, Durability::Normal, true).unwrap();
        db.execute_batch("DROP TABLE holdings; DROP TABLE cuts; ALTER TABLE blocks DROP COLUMN places")
            .unwrap();
        db.pragma_update(None, "user_version", 3).unwrap();
        let log = AuditLog::open(&path, &key, Cursors::new(&key)).unwrap();
        assert_eq!(log.verify().await.unwrap(), Ok(u64::try_from(EVENTS).unwrap()));
        assert_eq!(log.list(&user, filter.clone()).await.unwrap().items.len(), 333);
        let keep = Keep { since_us: i64::MIN, events: 19_400, octets: u64::MAX };
        assert_eq!(log.retain(keep).await.unwrap(), 600);
        assert_eq!(log.verify().await.unwrap(), Ok(19_400));
        assert_eq!(log.list(&user, filter).await.unwrap().items.len(), 133);
    }

    /// A start does not go through the numbers of what retention took.
    #[test]
    fn the_reach_begins_where_events_are() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.db");
        crate::schema::prepare_audit(&path).unwrap();
        let db = connect(&path, Durability::Normal, true).unwrap();
        let end = 1 << 40;
        assert_eq!(super::Reach::read(&db, end).unwrap(), super::Reach { full: end, last: end });
        db.execute(
            "INSERT INTO events (seq, id, ts, user, vm, class, reason, bytes_out, bytes_in, duration_ms, count, hash)
             VALUES (?1, '', 1, 1, 2, 0, 0, 0, 0, 0, 1, x'')",
            [end - 5],
        )
        .unwrap();
        let from = end - 6;
        assert_eq!(super::Reach::read(&db, end).unwrap(), super::Reach { full: from, last: from });
    }

    /// However many events there ever were, the index of those that are kept is small, and finds each.
    #[test]
    fn blocks_of_which_little_is_left_are_joined() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.db");
        crate::schema::prepare_audit(&path).unwrap();
        let mut db = connect(&path, Durability::Normal, true).unwrap();
        let (user, span) = (UserId::generate(), super::io(super::BLOCK));
        db.execute("INSERT INTO names (id, name) VALUES (1, ?1)", [user.as_str()]).unwrap();
        let mut all = Vec::new();
        let mut most = 0;
        for block in 0..300 {
            let (first, last) = (1 + block * span, (1 + block) * span);
            let left = [3, 1, 40, 0, 7][usize::try_from(block % 5).unwrap()];
            let tx = db.transaction().unwrap();
            for n in 0..left {
                let seq = first + n * 397 + block;
                tx.execute(
                    "INSERT INTO events (seq, id, ts, user, vm, class, host, reason, bytes_out, bytes_in, duration_ms, count, hash)
                     VALUES (?1, '', ?1, 1, 2, 0, 'a.example', 0, 0, 0, 0, 1, x'')",
                    [seq],
                )
                .unwrap();
                all.push(seq);
            }
            super::remake(&tx, first, last, usize::try_from(left).unwrap()).unwrap();
            tx.commit().unwrap();
            let blocks: i64 = db.query_row("SELECT count(*) FROM blocks", [], |row| row.get(0)).unwrap();
            most = most.max(blocks);
        }
        let rows: i64 =
            db.query_row("SELECT sum(length(classes)) FROM blocks", [], |row| row.get(0)).unwrap();
        assert_eq!(rows, super::io(all.len()));
        assert!(most < 16, "{most} blocks for {} events", all.len());
        for seq in all {
            assert_eq!(query::first_after(&db, &user, seq - 1).unwrap(), Some(seq));
        }
    }
}
