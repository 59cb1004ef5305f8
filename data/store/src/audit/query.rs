//! Reading the log by any combination of filters, a page at a time, without scanning.
//!
//! Each class (verdict, mode and protocol folded) is an ordered run in the index of the narrowest filter given: a user,
//! a VM, or a host. A page is the merge of the runs that the filters admit, each read no further than the page is long.

use super::record::{self, AuditRecord, COLUMNS};
use crate::error::{Result, StoreError};
use crate::page::{Cursors, Order, Page, PageRequest};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, params_from_iter};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tapgate_model::{Cidr, Mode, Protocol, UserId, VmId};

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
    fn classes(&self) -> impl Iterator<Item = i64> {
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
type Place = (i64, i64);

pub(super) fn list(
    db: &Connection,
    cursors: &Cursors,
    user: &UserId,
    filter: &AuditFilter,
) -> Result<Page<AuditRecord>> {
    let scope = filter.scope(user);
    let (mut after, mut before): (Place, Place) =
        ((filter.since_us.unwrap_or(i64::MIN), i64::MAX), (filter.until_us.unwrap_or(i64::MAX), i64::MIN));
    if filter.since_us.is_none() {
        after.1 = i64::MIN;
    }
    if filter.until_us.is_none() {
        before.1 = i64::MAX;
    }
    if let Some(cursor) = &filter.page.cursor {
        let (Value::Integer(ts), seq) = cursors.decode(&scope, cursor)? else {
            return Err(StoreError::Cursor);
        };
        match filter.page.order {
            Order::Asc => after = after.max((ts, seq)),
            Order::Desc => before = before.min((ts, seq)),
        }
    }
    let limit = usize::try_from(filter.page.limit.max(1)).unwrap_or(usize::MAX);
    let mut places = match runs(db, user, filter)? {
        None => Vec::new(),
        Some(runs) => runs.places(db, filter, after, before, limit + 1)?,
    };
    places.sort_unstable();
    if filter.page.order == Order::Desc {
        places.reverse();
    }
    let more = places.len() > limit;
    places.truncate(limit);
    let cursor = match places.last() {
        Some((ts, seq)) if more => Some(cursors.encode(&scope, &Value::Integer(*ts), *seq)?),
        _ => None,
    };
    let mut fetch = db.prepare_cached(&format!("SELECT {COLUMNS} WHERE e.seq = ?1"))?;
    let items = places
        .into_iter()
        .map(|(_, seq)| fetch.query_row([seq], record::read))
        .collect::<rusqlite::Result<_>>()?;
    Ok(Page { items, cursor })
}

/// The ordered runs of an index that a query reads.
struct Runs {
    index: &'static str,
    /// Conditions that the index answers, before class and time.
    lead: &'static str,
    /// Conditions on the rows found.
    rest: String,
    values: Vec<Value>,
    by_class: bool,
}

/// Picks the narrowest index. `None` if a name in the filter was never seen, so that nothing can match.
fn runs(db: &Connection, user: &UserId, filter: &AuditFilter) -> Result<Option<Runs>> {
    let name = |text: &str| -> Result<Option<i64>> {
        Ok(db
            .prepare_cached("SELECT id FROM names WHERE name = ?1")?
            .query_row([text], |row| row.get(0))
            .optional()?)
    };
    let Some(user) = name(user.as_str())? else { return Ok(None) };
    let vm = match &filter.vm {
        None => None,
        Some(vm) => match name(vm.as_str())? {
            None => return Ok(None),
            found => found,
        },
    };
    let host: Option<i64> = match &filter.host {
        None => None,
        Some(host) => match db
            .prepare_cached("SELECT id FROM hosts WHERE user = ?1 AND name = ?2")?
            .query_row(rusqlite::params![user, host], |row| row.get(0))
            .optional()?
        {
            None => return Ok(None),
            found => found,
        },
    };
    let mut rest = String::new();
    let and = |rest: &mut String, column: &str, value: Option<i64>| {
        if let Some(value) = value {
            rest.push_str(&format!(" AND {column} = {value}"));
        }
    };
    let range = match filter.cidr {
        Some(cidr) if is_crowded(db, user, cidr)? => {
            // So much lies inside that going through the log by time finds a page sooner than sorting all of it.
            let (low, high) = bounds(cidr);
            rest.push_str(&format!(" AND address BETWEEN x'{}' AND x'{}'", hex(&low), hex(&high)));
            None
        }
        range => range,
    };
    let (index, lead, values, by_class) = if let Some(cidr) = range {
        and(&mut rest, "vm", vm);
        and(&mut rest, "host", host);
        let (low, high) = bounds(cidr);
        if low == high {
            let values = vec![Value::Integer(user), Value::Blob(low.to_vec())];
            ("events_address", "user = ? AND address = ?", values, false)
        } else {
            let values = vec![Value::Integer(user), Value::Blob(low.to_vec()), Value::Blob(high.to_vec())];
            ("events_address", "user = ? AND address BETWEEN ? AND ?", values, false)
        }
    } else if let Some(host) = host {
        and(&mut rest, "vm", vm);
        ("events_host", "host = ?", vec![Value::Integer(host)], true)
    } else if let Some(vm) = vm {
        and(&mut rest, "user", Some(user));
        ("events_vm", "vm = ?", vec![Value::Integer(vm)], true)
    } else {
        ("events_user", "user = ?", vec![Value::Integer(user)], true)
    };
    Ok(Some(Runs { index, lead, rest, values, by_class }))
}

/// Addresses in a range beyond which they are not sorted.
const CROWD: i64 = 20_000;

/// Whether a user has more events in a range than can be sorted quickly.
fn is_crowded(db: &Connection, user: i64, cidr: Cidr) -> Result<bool> {
    let (low, high) = bounds(cidr);
    if low == high {
        return Ok(false);
    }
    let count: i64 = db
        .prepare_cached(
            "SELECT count(*) FROM (SELECT 1 FROM events INDEXED BY events_address
             WHERE user = ?1 AND address BETWEEN ?2 AND ?3 LIMIT ?4)",
        )?
        .query_row(rusqlite::params![user, low, high, CROWD], |row| row.get(0))?;
    Ok(count >= CROWD)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

impl Runs {
    /// The first places of each run that lie between two others.
    fn places(
        self,
        db: &Connection,
        filter: &AuditFilter,
        after: Place,
        before: Place,
        limit: usize,
    ) -> Result<Vec<Place>> {
        let Self { index, lead, rest, values, by_class } = self;
        let direction = if filter.page.order == Order::Asc { "ASC" } else { "DESC" };
        let classes: Vec<i64> = filter.classes().collect();
        let class = match by_class {
            true => "class = ?".to_owned(),
            false => {
                let list: Vec<String> = classes.iter().map(i64::to_string).collect();
                format!("class IN ({})", list.join(","))
            }
        };
        let sql = format!(
            "SELECT ts, seq FROM events INDEXED BY {index} WHERE {lead} AND {class}
             AND (ts, seq) > (?, ?) AND (ts, seq) < (?, ?){rest} ORDER BY ts {direction}, seq {direction} LIMIT ?"
        );
        let mut statement = db.prepare_cached(&sql)?;
        let mut out = Vec::new();
        let rounds: Vec<Option<i64>> =
            if by_class { classes.into_iter().map(Some).collect() } else { vec![None] };
        for class in rounds {
            let mut bound = values.clone();
            bound.extend(class.map(Value::Integer));
            bound.extend([after.0, after.1, before.0, before.1].map(Value::Integer));
            bound.push(Value::Integer(i64::try_from(limit).unwrap_or(i64::MAX)));
            let rows = statement.query_map(params_from_iter(bound), |row| Ok((row.get(0)?, row.get(1)?)))?;
            for place in rows {
                out.push(place?);
            }
        }
        Ok(out)
    }
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
    use super::*;

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
}
