//! Audit events: one for each thing that a VM tried to reach, and the sink that the parts hand them to.

use crate::{HostName, Mode, UserId, Verdict, VmId};
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

/// One thing that a VM tried. The sink gives it an id unless it has one already (a denial page shows it).
#[derive(Clone, Debug)]
pub struct AuditEvent {
    /// Set where the guest was told the id.
    pub id: Option<crate::EventId>,
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
        }
    }
}

/// Where events go. Never blocks; what it cannot take it counts per VM.
pub trait AuditSink: Send + Sync {
    /// Takes one event.
    fn record(&self, event: AuditEvent);
}
