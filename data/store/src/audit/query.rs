//! Reading the log by any combination of filters, a page at a time, without scanning.
//!
//! Each class (verdict, mode and protocol folded) is an ordered run in the index of the narrowest filter given: a user, a VM,
//! a host or an address. A page is the merge of the runs that the filters admit, each read no further than the page needs.
//! What the index does not answer is asked of each row; after so many rows the page ends short, with a cursor to go on from,
//! so that no question takes long.

use super::plan::{Lead, Plan, plan};
use super::record::{self, AuditRecord, COLUMNS};
use crate::error::{Result, StoreError};
use crate::page::{Cursors, Order, Page, PageRequest};
use rusqlite::types::Value;
use rusqlite::{CachedStatement, Connection, Rows, params_from_iter};
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
    pub(super) fn classes(&self) -> impl Iterator<Item = i64> {
        (0..record::CLASSES).filter(|class| {
            record::unfold(*class).is_some_and(|((rule_allows, passed), mode, protocol)| {
                self.rule_allows.is_none_or(|want| want == rule_allows)
                    && self.passed.is_none_or(|want| want == passed)
                    && self.mode.is_none_or(|want| want == mode)
                    && self.protocol.is_none_or(|want| want == protocol)
            })
        })
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

/// Rows that are looked at for one page where the index does not answer everything.
const BUDGET: usize = 4_000;
/// Addresses in a range beyond which they are not sorted: going through the log by time finds a page sooner.
const CROWD: usize = 40_000;

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

    fn bind(self) -> [Value; 4] {
        [self.after.0, self.after.1, self.before.0, self.before.1].map(Value::Integer)
    }
}

/// A page of places, and where the search ended if there may be more.
struct Found {
    places: Vec<Place>,
    next: Option<Place>,
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
    let found = match plan(db, user, filter)? {
        None => Found { places: Vec::new(), next: None },
        Some(plan) => places(db, &plan, filter, span)?,
    };
    let cursor = found.next.map(|(ts, seq)| cursors.encode(&scope, &Value::Integer(ts), seq)).transpose()?;
    let mut fetch = db.prepare_cached(&format!("SELECT {COLUMNS} WHERE e.seq = ?1"))?;
    let items = found
        .places
        .into_iter()
        .map(|(_, seq)| fetch.query_row([seq], record::read))
        .collect::<rusqlite::Result<_>>()?;
    Ok(Page { items, cursor })
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
    let mut find = db.prepare_cached(
        "SELECT seq, id FROM events INDEXED BY events_user
         WHERE user = (SELECT id FROM names WHERE name = ?1) AND class = ?2 AND ts = ?3",
    )?;
    for class in 0..record::CLASSES {
        let mut rows = find.query(rusqlite::params![user.as_str(), class, ts])?;
        while let Some(row) = rows.next()? {
            if row.get_ref(1)?.as_str().is_ok_and(|id| id == event.as_str()) {
                return Ok((ts, row.get(0)?));
            }
        }
    }
    Err(StoreError::Cursor)
}

fn places(db: &Connection, plan: &Plan, filter: &AuditFilter, span: Span) -> Result<Found> {
    let limit = usize::try_from(filter.page.limit.max(1)).unwrap_or(usize::MAX);
    match plan.lead {
        Lead::Runs => merge(db, plan, filter, span, limit),
        Lead::Range => match sorted(db, plan, filter, span, limit)? {
            Some(found) => Ok(found),
            None => merge(db, &plan.by_time(), filter, span, limit),
        },
    }
}

/// Reads everything in a range of addresses and sorts it; `None` if that is too much.
fn sorted(
    db: &Connection,
    plan: &Plan,
    filter: &AuditFilter,
    span: Span,
    limit: usize,
) -> Result<Option<Found>> {
    let mut statement = db.prepare_cached(&plan.sql(filter))?;
    let most = Value::Integer(i64::try_from(CROWD).unwrap_or(i64::MAX) + 1);
    let values = plan.values.iter().cloned().chain(span.bind()).chain([most]);
    let rows = statement.query_map(params_from_iter(values), |row| Ok((row.get(0)?, row.get(1)?)))?;
    let mut places: Vec<Place> = rows.collect::<rusqlite::Result<_>>()?;
    if places.len() > CROWD {
        return Ok(None);
    }
    places.sort_unstable();
    if filter.page.order == Order::Desc {
        places.reverse();
    }
    let more = places.len() > limit;
    places.truncate(limit);
    Ok(Some(Found { next: places.last().copied().filter(|_| more), places }))
}

/// The next row of a run: its place, and whether the row fits.
fn step(rows: &mut Rows<'_>) -> Result<Option<(Place, bool)>> {
    match rows.next()? {
        None => Ok(None),
        Some(row) => Ok(Some(((row.get(0)?, row.get(1)?), row.get(2)?))),
    }
}

/// Merges the runs of all classes in the order of time.
fn merge(db: &Connection, plan: &Plan, filter: &AuditFilter, span: Span, limit: usize) -> Result<Found> {
    let sql = plan.sql(filter);
    let classes: Vec<i64> = filter.classes().collect();
    let mut statements: Vec<CachedStatement<'_>> =
        classes.iter().map(|_| db.prepare_cached(&sql)).collect::<rusqlite::Result<_>>()?;
    let mut runs = Vec::with_capacity(classes.len());
    for (statement, class) in statements.iter_mut().zip(classes) {
        let values = plan.values.iter().cloned().chain([Value::Integer(class)]).chain(span.bind());
        let mut rows = statement.query(params_from_iter(values))?;
        if let Some(first) = step(&mut rows)? {
            runs.push((first, rows));
        }
    }
    let mut found = Found { places: Vec::new(), next: None };
    let mut looked_at = 0;
    while let Some(at) = nearest(&runs, filter.page.order) {
        let ((place, fits), rows) = &mut runs[at];
        let (place, fits) = (*place, *fits);
        if fits && found.places.len() == limit {
            found.next = found.places.last().copied();
            return Ok(found);
        }
        if looked_at == BUDGET.max(limit) {
            // Nothing between here and the last that fits: the search goes on from here.
            return Ok(found);
        }
        looked_at += 1;
        if fits {
            found.places.push(place);
        }
        found.next = Some(place);
        match step(rows)? {
            Some(next) => runs[at].0 = next,
            None => drop(runs.swap_remove(at)),
        }
    }
    found.next = None;
    Ok(found)
}

/// The run whose next row comes first.
fn nearest(runs: &[((Place, bool), Rows<'_>)], order: Order) -> Option<usize> {
    let places = runs.iter().enumerate().map(|(at, ((place, _), _))| (*place, at));
    let nearest = match order {
        Order::Asc => places.min(),
        Order::Desc => places.max(),
    };
    nearest.map(|(_, at)| at)
}
