//! Reading the log by any combination of filters, a page at a time: every page is whole, however little matches.
//!
//! Blocks are gone through in the order of their newest (or oldest) event, until no further one can hold an event of the page.
//! In each, the sets of events that have what is asked for are intersected; only what is left is looked at.

use super::index::Term;
use super::lookup::{Key, Lookup};
use super::record::{self, AuditRecord, COLUMNS};
use super::rows::Rows;
use crate::error::{Result, StoreError};
use crate::page::{Cursors, Order, Page, PageRequest};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, params};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tapgate_model::{Cidr, EventId, Mode, Protocol, UserId, VmId};

/// Which events to list.
#[derive(Clone, Debug)]
pub struct AuditFilter {
    /// Of this VM.
    pub vm: Option<VmId>,
    /// That a rule allowed, or that none did.
    pub rule_allows: Option<bool>,
    /// That passed, or did not.
    pub passed: Option<bool>,
    /// Under this mode.
    pub mode: Option<Mode>,
    /// Of exactly this name.
    pub host: Option<String>,
    /// With an address inside this range.
    pub cidr: Option<Cidr>,
    /// Of this protocol.
    pub protocol: Option<Protocol>,
    /// After this time (microseconds since the epoch).
    pub since_us: Option<i64>,
    /// Before this time.
    pub until_us: Option<i64>,
    /// Which part.
    pub page: PageRequest,
}

impl AuditFilter {
    /// All of an account's events; the others are narrowed from it.
    pub const fn all(page: PageRequest) -> Self {
        Self {
            vm: None,
            rule_allows: None,
            passed: None,
            mode: None,
            host: None,
            cidr: None,
            protocol: None,
            since_us: None,
            until_us: None,
            page,
        }
    }

    /// The classes that are wanted, a bit each.
    fn classes(&self) -> u64 {
        let wanted = |class: &i64| {
            record::unfold(*class).is_some_and(|((rule_allows, passed), mode, protocol)| {
                self.rule_allows.is_none_or(|want| want == rule_allows)
                    && self.passed.is_none_or(|want| want == passed)
                    && self.mode.is_none_or(|want| want == mode)
                    && self.protocol.is_none_or(|want| want == protocol)
            })
        };
        (0..record::CLASSES).filter(wanted).fold(0, |classes, class| classes | 1 << class)
    }

    fn scope(&self, user: &UserId) -> String {
        let Self { vm, rule_allows, passed, mode, host, cidr, protocol, since_us, until_us, page } = self;
        let order = page.order;
        format!(
            "audit\0{user}\0{:?}",
            (vm, rule_allows, passed, mode, host, cidr, protocol, (since_us, until_us, order))
        )
    }
}

/// Where an event stands in the order: time, then number.
pub(super) type Place = (i64, i64);

/// The places that a page lies between, both excluded.
#[derive(Clone, Copy)]
pub(super) struct Span {
    after: Place,
    before: Place,
}

impl Span {
    fn of(filter: &AuditFilter) -> Self {
        let least = (i64::MIN, i64::MIN);
        let most = (i64::MAX, i64::MAX);
        Self {
            after: filter.since_us.map_or(least, |ts| (ts, i64::MAX)),
            before: filter.until_us.map_or(most, |ts| (ts, i64::MIN)),
        }
    }

    fn from(&mut self, place: Place, order: Order) {
        match order {
            Order::Asc => self.after = self.after.max(place),
            Order::Desc => self.before = self.before.min(place),
        }
    }

    fn holds(self, place: Place) -> bool {
        self.after < place && place < self.before
    }
}

/// A filter with its names looked up.
pub(super) struct Question {
    user: i64,
    vm: Option<i64>,
    host: Option<String>,
    range: Option<([u8; 16], [u8; 16])>,
    classes: u64,
    span: Span,
    order: Order,
    limit: usize,
}

/// The first places of those that were offered, in an order.
struct Best {
    places: Vec<Place>,
    most: usize,
    order: Order,
}

impl Best {
    fn sort(&mut self) {
        match self.order {
            Order::Asc => self.places.sort_unstable(),
            Order::Desc => self.places.sort_unstable_by(|a, b| b.cmp(a)),
        }
    }

    fn add(&mut self, places: impl Iterator<Item = Place>) {
        for place in places {
            self.places.push(place);
            // Now and then, so that a crowd costs neither memory nor a long sort.
            if self.places.len() >= 16 * self.most + 1024 {
                self.cut();
            }
        }
        self.cut();
    }

    fn cut(&mut self) {
        if self.places.len() > self.most {
            match self.order {
                Order::Asc => self.places.select_nth_unstable(self.most - 1),
                Order::Desc => self.places.select_nth_unstable_by(self.most - 1, |a, b| b.cmp(a)),
            };
            self.places.truncate(self.most);
        }
        self.sort();
    }

    /// Whether an event at this time, or any later in the order, can no longer be among them.
    fn is_beyond(&self, ts: i64) -> bool {
        self.places.len() == self.most
            && self.places.last().is_some_and(|(last, _)| match self.order {
                Order::Asc => ts > *last,
                Order::Desc => ts < *last,
            })
    }
}

pub(super) fn list(
    db: &Connection,
    cursors: &Cursors,
    user: &UserId,
    filter: &AuditFilter,
) -> Result<Page<AuditRecord>> {
    let scope = filter.scope(user);
    let mut span = Span::of(filter);
    if let Some(cursor) = &filter.page.cursor {
        span.from(place_of(db, cursors, user, &scope, cursor)?, filter.page.order);
    }
    let Some(question) = ask(db, user, filter, span)? else {
        return Ok(Page { items: Vec::new(), cursor: None });
    };
    let limit = question.limit;
    let mut places = find(db, &question)?;
    let more = places.len() > limit;
    places.truncate(limit);
    let last = places.last().filter(|_| more);
    let cursor = last.map(|(ts, seq)| cursors.encode(&scope, &Value::Integer(*ts), *seq)).transpose()?;
    let mut fetch = db.prepare_cached(&format!("SELECT {COLUMNS} WHERE e.seq = ?1"))?;
    let items = places
        .into_iter()
        .map(|(_, seq)| fetch.query_row([seq], record::read))
        .collect::<rusqlite::Result<_>>()?;
    Ok(Page { items, cursor })
}

/// The number of the first event of an account after a time.
pub(super) fn first_after(db: &Connection, user: &UserId, since_us: i64) -> Result<Option<i64>> {
    let Some(user) = name(db, user.as_str())? else { return Ok(None) };
    let span = Span { after: (since_us, i64::MAX), before: (i64::MAX, i64::MAX) };
    let question = Question {
        user,
        vm: None,
        host: None,
        range: None,
        classes: u64::MAX,
        span,
        order: Order::Asc,
        limit: 1,
    };
    Ok(find(db, &question)?.first().map(|(_, seq)| *seq))
}

fn name(db: &Connection, text: &str) -> Result<Option<i64>> {
    Ok(db
        .prepare_cached("SELECT id FROM names WHERE name = ?1")?
        .query_row([text], |row| row.get(0))
        .optional()?)
}

/// `None` if a name in the filter was never seen, so that nothing can match.
fn ask(db: &Connection, user: &UserId, filter: &AuditFilter, span: Span) -> Result<Option<Question>> {
    let Some(user) = name(db, user.as_str())? else { return Ok(None) };
    let vm = match &filter.vm {
        None => None,
        Some(vm) => match name(db, vm.as_str())? {
            None => return Ok(None),
            found => found,
        },
    };
    Ok(Some(Question {
        user,
        vm,
        host: filter.host.clone(),
        range: filter.cidr.map(bounds),
        classes: filter.classes(),
        span,
        order: filter.page.order,
        limit: usize::try_from(filter.page.limit.max(1)).unwrap_or(usize::MAX - 1),
    }))
}

/// The place that a cursor names: one that we handed out, or the ID of an event of the account.
fn place_of(db: &Connection, cursors: &Cursors, user: &UserId, scope: &str, cursor: &str) -> Result<Place> {
    let Ok(event) = cursor.parse::<EventId>() else {
        let (Value::Integer(ts), seq) = cursors.decode(scope, cursor)? else {
            return Err(StoreError::Cursor);
        };
        return Ok((ts, seq));
    };
    let ts = event.timestamp_us().ok_or(StoreError::Cursor)?;
    let user = name(db, user.as_str())?.ok_or(StoreError::Cursor)?;
    let mut span = Span { after: (ts, i64::MIN), before: (ts, i64::MAX) };
    // Ids hold their time: only events of that microsecond are looked at.
    loop {
        let (vm, host, range, classes) = (None, None, None, u64::MAX);
        let places =
            find(db, &Question { user, vm, host, range, classes, span, order: Order::Asc, limit: 1 })?;
        let Some(place) = places.first() else { return Err(StoreError::Cursor) };
        let id: String = db
            .prepare_cached("SELECT id FROM events WHERE seq = ?1")?
            .query_row([place.1], |row| row.get(0))?;
        if id == event.as_str() {
            return Ok(*place);
        }
        span.after = *place;
    }
}

/// The first places that answer a question, one more than its limit if there are so many.
fn find(db: &Connection, question: &Question) -> Result<Vec<Place>> {
    let Question { span, order, .. } = question;
    let mut best = Best { places: Vec::new(), most: question.limit.saturating_add(1), order: *order };
    loose(db, question, &mut best)?;
    // What retention removed from the old end may still stand in a block.
    let first: Option<i64> =
        db.prepare_cached("SELECT min(seq) FROM events")?.query_row([], |row| row.get(0))?;
    let Some(first) = first else { return Ok(best.places) };
    let (mut lookup, keys) = (Lookup::new(db)?, Keys::of(question));
    let mut blocks = db.prepare_cached(blocks_sql(*order))?;
    // Blocks that end before the span are not in what is read; those that begin after it are passed over.
    let (mut rows, from, to) = match order {
        Order::Asc => (blocks.query([span.before.0])?, "oldest", "newest"),
        Order::Desc => (blocks.query([span.after.0])?, "newest", "oldest"),
    };
    while let Some(row) = rows.next()? {
        let (near, far): (i64, i64) = (row.get(from)?, row.get(to)?);
        if best.is_beyond(near) {
            break;
        }
        let misses = match order {
            Order::Asc => far < span.after.0,
            Order::Desc => far > span.before.0,
        };
        if misses {
            continue;
        }
        let block = Block { first: row.get("first")?, oldest: near.min(far), newest: near.max(far) };
        search(&mut lookup, question, &keys, &block, first, &mut best)?;
    }
    Ok(best.places)
}

/// Blocks in the order of the page, as far as they can hold an event of the span.
pub(super) const fn blocks_sql(order: Order) -> &'static str {
    match order {
        Order::Asc => {
            "SELECT first, oldest, newest FROM blocks INDEXED BY blocks_oldest WHERE oldest <= ?1 ORDER BY oldest, newest"
        }
        Order::Desc => {
            "SELECT first, oldest, newest FROM blocks INDEXED BY blocks_newest WHERE newest >= ?1
             ORDER BY newest DESC, oldest DESC"
        }
    }
}

struct Block {
    first: i64,
    oldest: i64,
    newest: i64,
}

/// What is looked up in each block.
struct Keys {
    vm: Option<Key>,
    host: Option<Key>,
    /// A VM's and a host's sets are within their account's, which is looked up where there is neither.
    whole: Option<Key>,
}

impl Keys {
    fn of(question: &Question) -> Self {
        let vm = question.vm.map(|vm| Term::Vm(vm).key());
        let host = question.host.clone().map(|host| Term::Host(host).key());
        let whole = (vm.is_none() && host.is_none()).then(|| Term::User.key());
        Self { vm, host, whole }
    }
}

/// The events of a block that answer the question.
fn search(
    lookup: &mut Lookup<'_>,
    question: &Question,
    keys: &Keys,
    block: &Block,
    first: i64,
    best: &mut Best,
) -> Result<()> {
    let Question { user, range, classes, span, .. } = question;
    if let (Some(host), Some((low, high))) = (&keys.host, range)
        && !lookup.may_lie_within(block.first, *user, host, low, high)?
    {
        return Ok(());
    }
    let (mut left, mut of_class): (Option<Rows>, bool) = (None, false);
    for key in [&keys.vm, &keys.host, &keys.whole].into_iter().flatten() {
        let Some((has, rows)) = lookup.having(block.first, *user, key)? else { return Ok(()) };
        if has & classes == 0 {
            return Ok(());
        }
        of_class |= has & !classes == 0;
        match &mut left {
            None => left = Some(rows),
            Some(left) => left.and(&rows),
        }
    }
    let Some(mut left) = left.filter(|left| !left.is_empty()) else { return Ok(()) };
    if let Some((low, high)) = range {
        let Some(rows) = lookup.within(block.first, *user, low, high)? else { return Ok(()) };
        left.and(&rows);
        if left.is_empty() {
            return Ok(());
        }
    }
    // Their classes are a fifth of what a block keeps of its events: often none is left after them.
    if !of_class {
        lookup.retain_classes(block.first, *classes, &mut left)?;
        if left.is_empty() {
            return Ok(());
        }
    }
    lookup.times(block.first, (block.oldest, block.newest), &left, |places| {
        best.add(places.filter(|place| place.1 >= first && span.holds(*place)));
    })
}

/// The newest events, which are in no block yet: few.
pub(super) const LOOSE: &str = "SELECT ts, seq, class FROM events
     WHERE seq > ifnull((SELECT last FROM blocks ORDER BY first DESC LIMIT 1), 0) AND +user = ?1
       AND (?2 IS NULL OR vm = ?2) AND (?3 IS NULL OR host = ?3) AND (?4 IS NULL OR address BETWEEN ?4 AND ?5)";

fn loose(db: &Connection, question: &Question, best: &mut Best) -> Result<()> {
    let Question { user, vm, host, range, classes, span, .. } = question;
    let (low, high) = range.unzip();
    let mut statement = db.prepare_cached(LOOSE)?;
    let mut rows = statement.query(params![user, vm, host, low, high])?;
    let mut places = Vec::new();
    while let Some(row) = rows.next()? {
        let (place, class): (Place, u32) = ((row.get(0)?, row.get(1)?), row.get(2)?);
        if classes.checked_shr(class).is_some_and(|rest| rest & 1 == 1) && span.holds(place) {
            places.push(place);
        }
    }
    best.add(places.into_iter());
    Ok(())
}

/// The first and last key of a range.
fn bounds(cidr: Cidr) -> ([u8; 16], [u8; 16]) {
    let last = match cidr.network() {
        IpAddr::V4(v4) => {
            let host = u32::MAX.checked_shr(u32::from(cidr.prefix_len())).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from(u32::from(v4) | host))
        }
        IpAddr::V6(v6) => {
            let host = u128::MAX.checked_shr(u32::from(cidr.prefix_len())).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from(u128::from(v6) | host))
        }
    };
    (record::address_key(cidr.network()), record::address_key(last))
}

#[cfg(test)]
mod tests {
    use super::super::lookup;
    use super::*;
    use crate::pool::{Durability, connect};

    #[test]
    fn a_range_has_its_first_and_last_address() {
        for (cidr, first, last) in [
            ("10.0.0.0/8", "10.0.0.0", "10.255.255.255"),
            ("192.0.2.7/32", "192.0.2.7", "192.0.2.7"),
            ("0.0.0.0/0", "0.0.0.0", "255.255.255.255"),
            ("2001:db8::/126", "2001:db8::", "2001:db8::3"),
        ] {
            let key = |text: &str| record::address_key(text.parse().unwrap());
            assert_eq!(bounds(cidr.parse().unwrap()), (key(first), key(last)), "{cidr}");
        }
    }

    #[test]
    fn the_best_of_many_are_kept_in_order() {
        for order in [Order::Asc, Order::Desc] {
            let mut best = Best { places: Vec::new(), most: 3, order };
            assert!(!best.is_beyond(0));
            best.add((0..5000).map(|n| (n * 7919 % 5000, n)));
            best.add([(0, -1), (4999, 9999)].into_iter());
            let times: Vec<i64> = best.places.iter().map(|(ts, _)| *ts).collect();
            let (expected, beyond) = match order {
                Order::Asc => (vec![0, 0, 1], 2),
                Order::Desc => (vec![4999, 4999, 4998], 4997),
            };
            assert_eq!(times, expected);
            // One at the same time as the last could still come before it.
            assert!(best.is_beyond(beyond) && !best.is_beyond(expected[2]));
        }
    }

    /// What SQLite means to do for every statement that questions are made of: go down an index, never through a table, and
    /// sort nothing.
    #[test]
    fn no_statement_of_a_question_scans_or_sorts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.db");
        crate::schema::prepare_audit(&path).unwrap();
        let db = connect(&path, Durability::Normal, true).unwrap();
        let explain = |sql: &str| -> Vec<String> {
            let mut statement = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let none: Vec<Option<i64>> = vec![None; statement.parameter_count()];
            let values = rusqlite::params_from_iter(none);
            statement.query_map(values, |row| row.get(3)).unwrap().map(std::result::Result::unwrap).collect()
        };
        let bad = |line: &String| {
            line.contains("TEMP B-TREE") || line.contains("AUTOMATIC")
                // The last block is the one row that a scan backwards by the primary key begins with.
                || line.contains("SCAN") && line != "SCAN blocks"
        };
        for (sql, way) in [
            (blocks_sql(Order::Asc), "USING COVERING INDEX blocks_oldest (oldest<?)"),
            (blocks_sql(Order::Desc), "USING COVERING INDEX blocks_newest (newest>?)"),
            (lookup::HAVING, "USING PRIMARY KEY (block=? AND user=? AND kind=? AND term=?)"),
            (lookup::RUN_OF, "USING PRIMARY KEY (block=? AND user=? AND kind=? AND term<?)"),
            (lookup::CLASSES_OF, "USING INTEGER PRIMARY KEY (rowid=?)"),
            (lookup::TIMES_OF, "USING INTEGER PRIMARY KEY (rowid=?)"),
            (lookup::VMS_OF, "USING PRIMARY KEY (block=? AND user=? AND kind=?)"),
            (LOOSE, "USING INTEGER PRIMARY KEY (rowid>?)"),
            (&format!("SELECT {COLUMNS} WHERE e.seq = ?1"), "USING INTEGER PRIMARY KEY (rowid=?)"),
        ] {
            let lines = explain(sql);
            assert!(
                lines.first().is_some_and(|line| line.starts_with("SEARCH") && line.ends_with(way)),
                "{lines:?}: {sql}"
            );
            assert!(!lines.iter().any(bad), "{lines:?}: {sql}");
        }
        // The test sees what it is to see.
        assert!(explain("SELECT ts FROM events WHERE ts > 1 ORDER BY ts").iter().any(bad));
    }
}
