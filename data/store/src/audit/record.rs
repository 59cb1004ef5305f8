//! An event as it is kept: the folded class, the row, and the way back.

use crate::users::id;
use rusqlite::Row;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tapgate_model::{Cidr, EventId, Mode, Protocol, Reason, RuleId, Verdict, VmId};

/// An event as it can be shown.
#[derive(Clone, Debug)]
pub struct AuditRecord {
    /// Id.
    pub id: EventId,
    /// Microseconds since the epoch.
    pub timestamp_us: i64,
    /// Who.
    pub vm: VmId,
    /// The name, if it named one.
    pub host: Option<String>,
    /// The address.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: Option<u16>,
    /// What was spoken.
    pub protocol: Protocol,
    /// Whether a rule allowed it.
    pub rule_allows: bool,
    /// Whether it passed.
    pub passed: bool,
    /// The mode at that time.
    pub mode: Mode,
    /// The rule that allowed it.
    pub rule: Option<RuleId>,
    /// The row of the table.
    pub reason: Reason,
    /// HTTP method.
    pub method: Option<String>,
    /// HTTP path.
    pub path: Option<String>,
    /// HTTP status.
    pub status: Option<u16>,
    /// Secrets put in.
    pub secrets: Vec<String>,
    /// Secrets left out.
    pub secrets_withheld: Vec<String>,
    /// Octets from the guest.
    pub bytes_out: u64,
    /// Octets to the guest.
    pub bytes_in: u64,
    /// Milliseconds.
    pub duration_ms: u64,
    /// How many attempts it stands for.
    pub count: u32,
}

impl AuditRecord {
    /// The address as a range of one, where there is no name.
    pub fn cidr(&self) -> Option<Cidr> {
        if self.host.is_some() { None } else { self.address.map(Cidr::host) }
    }
}

/// What was decided, as far as the class goes: allowed, denied, tolerated.
pub(super) const OUTCOMES: [(bool, bool); 3] = [(true, true), (false, false), (false, true)];
const MODES: [Mode; 2] = [Mode::Enforce, Mode::Warn];

/// How many classes there are.
pub(super) const CLASSES: i64 = (OUTCOMES.len() * MODES.len() * Protocol::ALL.len()) as i64;

/// Folds verdict, mode and protocol into one number.
pub(super) fn class(verdict: &Verdict, mode: Mode, protocol: Protocol) -> i64 {
    let outcome = match verdict {
        Verdict::Allow { .. } => 0,
        Verdict::Deny { .. } => 1,
        Verdict::Tolerate { .. } => 2,
    };
    let mode = MODES.iter().position(|m| *m == mode).unwrap_or(0);
    let protocol = Protocol::ALL.iter().position(|p| *p == protocol).unwrap_or(0);
    ((outcome * MODES.len() + mode) * Protocol::ALL.len() + protocol) as i64
}

/// Takes the number apart again: (rule allows, passed), mode, protocol.
pub(super) fn unfold(class: i64) -> Option<((bool, bool), Mode, Protocol)> {
    let class = usize::try_from(class).ok()?;
    let (rest, protocol) = (class / Protocol::ALL.len(), class % Protocol::ALL.len());
    Some((*OUTCOMES.get(rest / MODES.len())?, MODES[rest % MODES.len()], Protocol::ALL[protocol]))
}

/// An address as it is kept: 16 octets, IPv4 mapped, so that a range of either family is a range of keys.
pub(super) fn address_key(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

fn address_of(bytes: &[u8]) -> Option<IpAddr> {
    let octets: [u8; 16] = bytes.try_into().ok()?;
    let v6 = Ipv6Addr::from(octets);
    Some(v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), |v4: Ipv4Addr| IpAddr::V4(v4)))
}

/// Columns that [`read`] wants, from `events e` with its names joined.
pub(super) const COLUMNS: &str = "e.seq, e.id, e.ts, v.name AS vm, e.host, e.class, e.address, e.port, \
     e.rule, e.reason, e.method, e.path, e.status, e.secrets, e.withheld, e.bytes_out, e.bytes_in, e.duration_ms, \
     e.count FROM events e JOIN names v ON v.id = e.vm";

pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<AuditRecord> {
    let bad = |column: &str| rusqlite::Error::InvalidColumnName(column.to_owned());
    let ((rule_allows, passed), mode, protocol) = unfold(row.get("class")?).ok_or_else(|| bad("class"))?;
    let names = |column: &str| -> rusqlite::Result<Vec<String>> {
        let text: Option<String> = row.get(column)?;
        text.map_or(Ok(Vec::new()), |text| serde_json::from_str(&text).map_err(|_| bad(column)))
    };
    let number = |column: &str| -> rusqlite::Result<u64> {
        Ok(u64::try_from(row.get::<_, i64>(column)?).unwrap_or(0))
    };
    Ok(AuditRecord {
        id: id(row, "id")?,
        timestamp_us: row.get("ts")?,
        vm: id(row, "vm")?,
        host: row.get("host")?,
        address: row.get::<_, Option<Vec<u8>>>("address")?.as_deref().and_then(address_of),
        port: row.get("port")?,
        protocol,
        rule_allows,
        passed,
        mode,
        rule: row.get::<_, Option<String>>("rule")?.and_then(|text| text.parse().ok()),
        reason: Reason::from_u8(row.get("reason")?).unwrap_or(Reason::Fault),
        method: row.get("method")?,
        path: row.get("path")?,
        status: row.get("status")?,
        secrets: names("secrets")?,
        secrets_withheld: names("withheld")?,
        bytes_out: number("bytes_out")?,
        bytes_in: number("bytes_in")?,
        duration_ms: number("duration_ms")?,
        count: row.get("count")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn classes_unfold_to_what_they_were_folded_from() {
        let reason = Reason::NoRule;
        for (verdict, outcome) in [
            (Verdict::Allow { rule: None, reason }, (true, true)),
            (Verdict::Deny { reason }, (false, false)),
            (Verdict::Tolerate { reason }, (false, true)),
        ] {
            for mode in MODES {
                for protocol in Protocol::ALL {
                    let number = class(&verdict, mode, protocol);
                    assert!((0..CLASSES).contains(&number));
                    assert_eq!(unfold(number), Some((outcome, mode, protocol)));
                }
            }
        }
        assert_eq!(unfold(CLASSES), None);
    }

    #[test]
    fn addresses_come_back() {
        for text in ["192.0.2.1", "2001:db8::1", "0.0.0.0", "::1"] {
            let address: IpAddr = text.parse().unwrap();
            assert_eq!(address_of(&address_key(address)), Some(address));
        }
    }
}
