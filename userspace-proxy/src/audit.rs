//! One record for each connection, request or question: made when it begins, handed to the sink exactly once, when it
//! ends by whatever way. Must never hold a secret's value or a query string.

use crate::proxy::now_us;
use std::{
    net::IpAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tapgate_model::{AuditEvent, AuditSink, EventId, HostName, Protocol, Verdict, VmPolicy};

/// Longest path kept, in octets.
const MAX_PATH: usize = 1024;

/// Octets that went each way, counted where they move.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    /// From the guest.
    pub out: AtomicU64,
    /// To the guest.
    pub r#in: AtomicU64,
}

impl Counters {
    /// The sum of both: changes whenever anything moves.
    pub(crate) fn total(&self) -> u64 {
        self.out.load(Ordering::Relaxed).wrapping_add(self.r#in.load(Ordering::Relaxed))
    }

    /// Ends when nothing has moved for so long.
    pub(crate) async fn still(&self, idle: Duration) {
        loop {
            let before = self.total();
            tokio::time::sleep(idle).await;
            if self.total() == before {
                return;
            }
        }
    }
}

/// An audit event under way.
pub(crate) struct Record {
    event: Option<AuditEvent>,
    sink: Arc<dyn AuditSink>,
    started: Instant,
    /// Octets, written to by whoever moves them.
    pub counters: Arc<Counters>,
}

impl Record {
    /// Begins a record; it is handed over when it is dropped.
    pub(crate) fn begin(
        sink: &Arc<dyn AuditSink>,
        policy: &VmPolicy,
        protocol: Protocol,
        verdict: Verdict,
        started: Instant,
    ) -> Self {
        Self {
            event: Some(AuditEvent::new(policy, protocol, verdict, now_us())),
            sink: sink.clone(),
            started,
            counters: Arc::default(),
        }
    }

    fn edit(&mut self, change: impl FnOnce(&mut AuditEvent)) {
        if let Some(event) = &mut self.event {
            change(event);
        }
    }

    /// Where it went or wanted to go.
    pub(crate) fn destination(&mut self, host: Option<&HostName>, address: IpAddr, port: u16) {
        self.edit(|event| {
            event.host = host.cloned();
            event.address = Some(address);
            event.port = Some(port);
        });
    }

    /// The address that was dialled.
    pub(crate) fn dialled(&mut self, address: IpAddr) {
        self.edit(|event| event.address = Some(address));
    }

    /// The request line, without the query.
    pub(crate) fn request(&mut self, method: &str, path: &str) {
        let mut path = path.split(['?', '#']).next().unwrap_or_default();
        while path.len() > MAX_PATH {
            let mut end = MAX_PATH;
            while !path.is_char_boundary(end) {
                end -= 1;
            }
            path = &path[..end];
        }
        self.edit(|event| {
            event.method = Some(method.chars().take(32).collect());
            event.path = Some(path.to_owned());
        });
    }

    /// Names of secrets put in and left out.
    pub(crate) fn secrets(&mut self, injected: Vec<String>, withheld: Vec<String>) {
        self.edit(|event| {
            event.secrets = injected;
            event.secrets_withheld = withheld;
        });
    }

    /// The status that the guest gets.
    pub(crate) fn status(&mut self, status: u16) {
        self.edit(|event| event.status = Some(status));
    }

    /// How many attempts it stands for.
    pub(crate) fn count(&mut self, count: u32) {
        self.edit(|event| event.count = count);
    }

    /// Another verdict than the one it began with (the upstream failed, the rules changed).
    pub(crate) fn verdict(&mut self, verdict: Verdict) {
        self.edit(|event| event.verdict = verdict);
    }

    /// Nothing is to be said of it: others say it.
    pub(crate) fn discard(mut self) {
        self.event = None;
    }

    /// The id that the guest is told.
    pub(crate) fn id(&mut self) -> EventId {
        let id = self.event.as_ref().and_then(|event| event.id.clone()).unwrap_or_else(EventId::generate);
        self.edit(|event| event.id = Some(id.clone()));
        id
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if let Some(mut event) = self.event.take() {
            event.bytes_out = self.counters.out.load(Ordering::Relaxed);
            event.bytes_in = self.counters.r#in.load(Ordering::Relaxed);
            event.duration_ms = u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX);
            self.sink.record(event);
        }
    }
}
