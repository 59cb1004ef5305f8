//! Which index answers a question about the log, and the SQL that reads it. Decides nothing about pages.

use super::query::AuditFilter;
use super::record;
use crate::error::Result;
use crate::page::Order;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tapgate_model::{Cidr, UserId};

/// How the index of a plan is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lead {
    /// One ordered run a class.
    Runs,
    /// All of a range of addresses, in no order that helps.
    Range,
}

/// An index, and what is left to ask of each row.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) lead: Lead,
    index: &'static str,
    /// Conditions that the index answers, before class and time.
    begins: &'static str,
    /// The values of those.
    pub(super) values: Vec<Value>,
    /// Conditions that are asked of each row.
    rest: Vec<String>,
    user: i64,
    /// For ranges: the condition that is left when the range is not what is read.
    range: Option<String>,
}

/// Picks the narrowest index. `None` if a name in the filter was never seen, so that nothing can match.
pub(super) fn plan(db: &Connection, user: &UserId, filter: &AuditFilter) -> Result<Option<Plan>> {
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
    let within = filter.cidr.map(bounds);
    let single = within.filter(|(low, high)| low == high);
    let range = within.filter(|(low, high)| low != high);
    let range = range.map(|(low, high)| format!("address BETWEEN x'{}' AND x'{}'", hex(&low), hex(&high)));
    let mut rest = Vec::new();
    let mut and = |column: &str, value: Option<i64>| {
        rest.extend(value.map(|value| format!("{column} = {value}")));
    };
    let (lead, index, begins, values) = if let Some((address, _)) = single {
        and("vm", vm);
        and("host", host);
        let values = vec![Value::Integer(user), Value::Blob(address.to_vec())];
        (Lead::Runs, "events_address", "user = ? AND address = ?", values)
    } else if let Some(host) = host {
        and("vm", vm);
        (Lead::Runs, "events_host", "host = ?", vec![Value::Integer(host)])
    } else if let Some(vm) = vm {
        and("user", Some(user));
        (Lead::Runs, "events_vm", "vm = ?", vec![Value::Integer(vm)])
    } else if let Some((low, high)) = within {
        let values = vec![Value::Integer(user), Value::Blob(low.to_vec()), Value::Blob(high.to_vec())];
        let plan = Plan {
            lead: Lead::Range,
            index: "events_address",
            begins: "user = ? AND address BETWEEN ? AND ?",
            values,
            rest,
            user,
            range,
        };
        return Ok(Some(plan));
    } else {
        (Lead::Runs, "events_user", "user = ?", vec![Value::Integer(user)])
    };
    rest.extend(range);
    Ok(Some(Plan { lead, index, begins, values, rest, user, range: None }))
}

impl Plan {
    /// The same question for a range with too much in it: through the account's events by time.
    pub(super) fn by_time(&self) -> Self {
        Self {
            lead: Lead::Runs,
            index: "events_user",
            begins: "user = ?",
            values: vec![Value::Integer(self.user)],
            rest: self.rest.iter().chain(&self.range).cloned().collect(),
            user: self.user,
            range: None,
        }
    }

    /// The statement. Its values: the plan's own, the class (where there are runs), the span, the limit (for a range).
    pub(super) fn sql(&self, filter: &AuditFilter) -> String {
        let Self { lead, index, begins, rest, .. } = self;
        let span = "(ts, seq) > (?, ?) AND (ts, seq) < (?, ?)";
        if *lead == Lead::Range {
            let classes: Vec<String> = filter.classes().map(|class| class.to_string()).collect();
            let classes = classes.join(",");
            return format!(
                "SELECT ts, seq FROM events INDEXED BY {index} WHERE {begins} AND +class IN ({classes}) AND {span} LIMIT ?"
            );
        }
        let direction = if filter.page.order == Order::Asc { "ASC" } else { "DESC" };
        let fits = if rest.is_empty() { "1".to_owned() } else { rest.join(" AND ") };
        format!(
            "SELECT ts, seq, ifnull({fits}, 0) FROM events INDEXED BY {index} WHERE {begins} AND class = ? AND {span}
             ORDER BY ts {direction}, seq {direction}"
        )
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
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
    use crate::page::PageRequest;
    use crate::pool::{Durability, connect};
    use rusqlite::params_from_iter;
    use tapgate_model::{Mode, Protocol, VmId};

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

    /// What SQLite means to do for every combination of filters: go down an index, never through a table, and sort nothing.
    #[test]
    fn no_combination_of_filters_scans_or_sorts() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.db");
        crate::schema::prepare_audit(&path).unwrap();
        let db = connect(&path, Durability::Normal, true).unwrap();
        let (user, vm) = (UserId::generate(), VmId::generate());
        db.execute("INSERT INTO names (id, name) VALUES (1, ?1), (2, ?2)", [user.as_str(), vm.as_str()])
            .unwrap();
        db.execute("INSERT INTO hosts (id, user, name) VALUES (1, 1, 'a.example')", []).unwrap();
        let check = |sql: &str| {
            let mut explain = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let count = explain.parameter_count();
            let rows = explain
                .query_map(params_from_iter(vec![1i64; count]), |row| row.get::<_, String>(3))
                .unwrap();
            for detail in rows {
                let detail = detail.unwrap();
                assert!(detail.starts_with("SEARCH events USING"), "{detail}: {sql}");
                let begins = ["(user=?", "(vm=?", "(host=?"].iter().any(|part| detail.contains(part));
                assert!(begins, "{detail}: {sql}");
            }
        };
        let mut seen = std::collections::BTreeSet::new();
        for bits in 0..1024u32 {
            let on = |bit: u32| bits & (1 << bit) != 0;
            for order in [Order::Asc, Order::Desc] {
                let filter = AuditFilter {
                    vm: on(0).then(|| vm.clone()),
                    rule_allows: on(1).then_some(false),
                    passed: on(2).then_some(true),
                    mode: on(3).then_some(Mode::Warn),
                    host: on(4).then(|| "a.example".into()),
                    cidr: on(5).then(|| if on(9) { "192.0.2.2/32" } else { "192.0.2.0/24" }.parse().unwrap()),
                    protocol: on(6).then_some(Protocol::Tcp),
                    since_us: on(7).then_some(1),
                    until_us: on(8).then_some(9),
                    page: PageRequest { limit: 50, cursor: None, order },
                };
                let plan = plan(&db, &user, &filter).unwrap().unwrap();
                check(&plan.sql(&filter));
                seen.insert(plan.index);
                if plan.lead == Lead::Range {
                    check(&plan.by_time().sql(&filter));
                }
            }
        }
        assert_eq!(
            seen.into_iter().collect::<Vec<_>>(),
            ["events_address", "events_host", "events_user", "events_vm"]
        );
        // The test sees what it is to see.
        let mut explain =
            db.prepare("EXPLAIN QUERY PLAN SELECT ts FROM events WHERE ts > 1 ORDER BY ts").unwrap();
        let bad: Vec<String> = explain.query_map([], |row| row.get(3)).unwrap().map(Result::unwrap).collect();
        assert!(
            bad.iter().any(|line| line.contains("SCAN"))
                && bad.iter().any(|line| line.contains("TEMP B-TREE"))
        );
    }
}
