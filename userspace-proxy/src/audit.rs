//! One record for each connection, request or question: made when it begins, handed to the sink exactly once, when it
//! ends by whatever way. What is known of it is noted in the sink's journal, if it keeps one, before anybody waits for anything: so
//! that it is told of though this process ends first. Must never hold a secret's value or a query string.

use crate::proxy::now_us;
use std::{
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tapgate_model::{
    AuditEvent, AuditSink, EventId, HostName, Note, Protocol, Reason, Stage, Verdict, VmPolicy,
};

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
    stage: Stage,
    /// Octets, written to by whoever moves them.
    pub counters: Arc<Counters>,
}

impl Record {
    /// Begins a record; it is handed over when it is dropped. What was noted of the same attempt before is noted on; if nothing
    /// was, the note is empty. Noted is the record once its destination is known, or its request.
    pub(crate) fn begin(
        sink: &Arc<dyn AuditSink>,
        note: Note,
        policy: &VmPolicy,
        protocol: Protocol,
        verdict: Verdict,
        started: Instant,
    ) -> Self {
        let note = if note.is_none() { sink.note() } else { note };
        let event = AuditEvent { note, ..AuditEvent::new(policy, protocol, verdict, now_us()) };
        let sink = sink.clone();
        Self { event: Some(event), sink, started, stage: Stage::UnderWay, counters: Arc::default() }
    }

    /// A note of a connection of which nothing is known but where it leads, for the record that follows.
    pub(crate) fn foresee(sink: &Arc<dyn AuditSink>, policy: &VmPolicy, to: SocketAddr) -> Note {
        let verdict = Verdict::Deny { reason: Reason::DaemonEnded };
        let note = Note::default();
        let mut record = Self::begin(sink, note, policy, Protocol::Tcp, verdict, Instant::now());
        record.stage = Stage::Undecided;
        record.destination(None, to.ip(), to.port());
        record.discard()
    }

    fn edit(&mut self, change: impl FnOnce(&mut AuditEvent)) {
        if let Some(event) = &mut self.event {
            change(event);
        }
    }

    fn note_down(&mut self) {
        let stage = self.stage;
        self.edit(|event| event.note_down(stage));
    }

    /// Its verdict stands for what was not decided yet.
    pub(crate) fn undecided(mut self) -> Self {
        self.stage = Stage::Undecided;
        self.note_down();
        self
    }

    /// Where it went or wanted to go.
    pub(crate) fn destination(&mut self, host: Option<&HostName>, address: IpAddr, port: u16) {
        self.edit(|event| {
            event.host = host.cloned();
            event.address = Some(address);
            event.port = Some(port);
        });
        // Of a request the rest follows at once.
        if self.event.as_ref().is_some_and(|event| event.protocol != Protocol::Http) {
            self.note_down();
        }
    }

    /// The address that was dialled.
    pub(crate) fn dialled(&mut self, address: IpAddr) {
        self.edit(|event| event.address = Some(address));
        if self.event.as_ref().is_some_and(|event| event.protocol != Protocol::Http) {
            self.note_down();
        }
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
        self.note_down();
    }

    /// Names of secrets put in and left out.
    pub(crate) fn secrets(&mut self, injected: Vec<String>, withheld: Vec<String>) {
        let any = !injected.is_empty() || !withheld.is_empty();
        self.edit(|event| {
            event.secrets = injected;
            event.secrets_withheld = withheld;
        });
        if any {
            self.note_down();
        }
    }

    /// The status that the guest gets.
    pub(crate) fn status(&mut self, status: u16) {
        self.edit(|event| event.status = Some(status));
        if self.event.as_ref().is_some_and(|event| event.verdict.passes()) {
            self.note_down();
        }
    }

    /// How many attempts it stands for.
    pub(crate) fn count(&mut self, count: u32) {
        self.edit(|event| event.count = count);
    }

    /// Another verdict than the one it began with (the upstream failed, the rules changed).
    pub(crate) fn verdict(&mut self, verdict: Verdict) {
        self.edit(|event| event.verdict = verdict);
        self.note_down();
    }

    /// It is refused; the id is what the guest is told.
    pub(crate) fn refused(&mut self, reason: Reason) -> EventId {
        self.edit(|event| event.verdict = Verdict::Deny { reason });
        self.id()
    }

    /// Nothing is to be said of it: others say it, and note it in the same place.
    #[must_use]
    pub(crate) fn discard(mut self) -> Note {
        self.stage = Stage::Undecided;
        self.note_down();
        self.event.take().map(|event| event.note).unwrap_or_default()
    }

    /// The id that the guest is told.
    pub(crate) fn id(&mut self) -> EventId {
        let id = self.event.as_ref().and_then(|event| event.id.clone()).unwrap_or_else(EventId::generate);
        self.edit(|event| event.id = Some(id.clone()));
        self.note_down();
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
