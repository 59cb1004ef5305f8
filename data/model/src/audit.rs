//! Audit events: one for each thing that a VM tried to reach, and the sink that the parts hand them to.

use crate::{EventId, HostName, Mode, Note, Stage, UserId, Verdict, VmId};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// What was spoken, as far as it was looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Protocol {
    /// A DNS question.
    Dns,
    /// An HTTP request, clear or intercepted.
    Http,
    /// ICMP of either family.
    Icmp,
    /// A TCP flow that is neither HTTP nor TLS, or was not looked into.
    Tcp,
    /// A TLS connection that was spliced or refused unopened.
    Tls,
    /// A UDP datagram.
    Udp,
}

impl Protocol {
    /// Every protocol. The position is what the audit database stores: add at the end.
    pub const ALL: [Self; 6] = [Self::Dns, Self::Http, Self::Icmp, Self::Tcp, Self::Tls, Self::Udp];

    /// The protocol with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|protocol| protocol.word() == word)
    }

    /// The word of the API and the database.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Dns => "dns",
            Self::Http => "http",
            Self::Icmp => "icmp",
            Self::Tcp => "tcp",
            Self::Tls => "tls",
            Self::Udp => "udp",
        }
    }
}

/// Digits of an event's time in its id: 55 bits of microseconds, until the year 3111.
const TIME_DIGITS: usize = 11;

impl EventId {
    /// A new id for an event of this time (microseconds since the Unix epoch). The time in it lets the log find the event
    /// without an index of its own; what follows is random, as in every id.
    pub fn at(timestamp_us: i64) -> Self {
        let digit =
            |at: usize| char::from_digit(u32::try_from(timestamp_us >> (5 * at) & 31).unwrap_or(0), 32);
        let time: String = (0..TIME_DIGITS).rev().filter_map(digit).collect();
        let random: String = Self::generate().into();
        let id = format!("{}{time}{}", Self::PREFIX, &random[Self::PREFIX.len()..Self::PREFIX.len() + 9]);
        id.parse().unwrap_or_else(|_| Self::generate())
    }

    /// The time in an id that [`Self::at`] made; some time or none for any other.
    pub fn timestamp_us(&self) -> Option<i64> {
        let digits = self.as_str().get(Self::PREFIX.len()..)?.get(..TIME_DIGITS)?;
        i64::from_str_radix(digits, 32).ok()
    }
}

/// One thing that a VM tried. The sink gives it an id unless it has one already (a denial page shows it).
#[derive(Clone, Debug)]
pub struct AuditEvent {
    /// Set where the guest was told the id.
    pub id: Option<EventId>,
    /// When it was decided: microseconds since the Unix epoch.
    pub timestamp_us: i64,
    /// Who.
    pub vm: VmId,
    /// The VM's owner.
    pub user: UserId,
    /// The name, if it named one.
    pub host: Option<HostName>,
    /// The destination address that the guest chose or that was dialled.
    pub address: Option<IpAddr>,
    /// The destination port; for ICMP `None`.
    pub port: Option<u16>,
    /// What was spoken.
    pub protocol: Protocol,
    /// What was decided; reason and rule included.
    pub verdict: Verdict,
    /// The VM's mode at that time.
    pub mode: Mode,
    /// HTTP method.
    pub method: Option<String>,
    /// HTTP path without the query; at most 1024 octets.
    pub path: Option<String>,
    /// HTTP status that the guest got, where one was sent.
    pub status: Option<u16>,
    /// Names of secrets that were put in.
    pub secrets: Vec<String>,
    /// Names of secrets whose placeholder was left as it was (host not in the list, clear text).
    pub secrets_withheld: Vec<String>,
    /// Octets from the guest.
    pub bytes_out: u64,
    /// Octets to the guest.
    pub bytes_in: u64,
    /// From accept to end, in milliseconds.
    pub duration_ms: u64,
    /// How many attempts this stands for: more than 1 when a flood was aggregated.
    pub count: u32,
    /// What outlives the process until it is stored.
    pub note: Note,
}

impl AuditEvent {
    /// An event with the fields that every one has; the rest empty.
    pub fn new(policy: &crate::VmPolicy, protocol: Protocol, verdict: Verdict, timestamp_us: i64) -> Self {
        Self {
            id: None,
            timestamp_us,
            vm: policy.vm.clone(),
            user: policy.user.clone(),
            host: None,
            address: None,
            port: None,
            protocol,
            verdict,
            mode: policy.mode,
            method: None,
            path: None,
            status: None,
            secrets: Vec::new(),
            secrets_withheld: Vec::new(),
            bytes_out: 0,
            bytes_in: 0,
            duration_ms: 0,
            count: 1,
            note: Note::default(),
        }
    }

    /// Notes what is known of it by now.
    pub fn note_down(&mut self, stage: Stage) {
        let mut note = std::mem::take(&mut self.note);
        note.write(self, stage);
        self.note = note;
    }
}

/// Where events go. Never blocks; what it cannot take it counts per VM.
pub trait AuditSink: Send + Sync {
    /// Takes one event.
    fn record(&self, event: AuditEvent);

    /// A note for an attempt that begins, where a journal is kept.
    fn note(&self) -> Note {
        Note::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_id_holds_its_time() {
        for time in [0, 1, 31, 32, 1_772_280_330_000_001, (1 << 55) - 1] {
            let (a, b) = (EventId::at(time), EventId::at(time));
            assert_ne!(a, b);
            assert_eq!(a.timestamp_us(), Some(time));
            assert_eq!(a.as_str().parse::<EventId>().unwrap(), a);
        }
        assert_eq!("ee_w8n3vqx1".parse::<EventId>().unwrap().timestamp_us(), None);
    }
}
