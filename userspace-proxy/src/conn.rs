//! One accepted connection: whose it is, what it speaks, what is decided, and which way it goes.
//!
//! Every end of it, whichever, leaves exactly one audit event (or one for each HTTP request). No error ends in "allow".

use crate::{
    audit::Record,
    decide::{self, Decision, Route},
    deny::{self, Denial},
    dial::DialError,
    http::{request::HttpConn, serve::serve},
    intercept::leaf::Alpn,
    io::{Prefixed, farewell},
    peek::{self, First, tls::Hello},
    place::Place,
    proxy::Shared,
    registry::{Subject, Ticket},
    splice,
    table::VmEntry,
};
use bytes::Bytes;
use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tapgate_model::{HostName, Note, Protocol, Reason, Verdict, VmPolicy};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tokio_util::sync::CancellationToken;

/// Ports on which TLS without ALPN is some other protocol than HTTP, which the upstream is dialled for at once: mail, directory, DNS, chat, messaging.
const NOT_HTTP: [u16; 14] = [465, 563, 636, 853, 989, 990, 992, 993, 995, 5061, 5223, 5671, 6697, 8883];

/// A guest's connection, with both of its ends.
#[derive(Debug)]
pub struct Accepted {
    /// The socket.
    pub stream: TcpStream,
    /// The guest's address, checked by the datapath.
    pub guest: SocketAddr,
    /// What the guest connected to.
    pub destination: SocketAddr,
}

/// A connection being handled.
pub(crate) struct Conn {
    pub(crate) shared: Arc<Shared>,
    pub(crate) entry: Arc<VmEntry>,
    /// The policy that it was judged by.
    pub(crate) policy: Arc<VmPolicy>,
    pub(crate) stream: TcpStream,
    /// What the guest connected to.
    pub(crate) to: SocketAddr,
    pub(crate) started: Instant,
    /// Its place among the VM's connections.
    pub(crate) slot: Arc<Place>,
    /// What is noted of it while it has no record.
    pub(crate) note: Note,
}

/// Handles a connection to its end.
pub(crate) async fn handle(shared: Arc<Shared>, accepted: Accepted) {
    let Accepted { stream, guest, destination } = accepted;
    let started = Instant::now();
    let to = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let Some(entry) = shared.table.by_address(guest.ip()) else {
        tracing::warn!(%guest, "a connection from an address that no VM has");
        return reset(&stream);
    };
    let policy = entry.policy.load_full();
    let Some(slot) = entry.admit() else {
        let verdict = Verdict::Deny { reason: Reason::Limit };
        let note = Note::default();
        let mut record = Record::begin(&shared.sink, note, &policy, Protocol::Tcp, verdict, started);
        record.destination(None, to.ip(), to.port());
        return reset(&stream);
    };
    let note = Record::foresee(&shared.sink, &policy, to);
    let mut conn = Conn { shared, entry, policy, stream, to, started, slot: Arc::new(slot), note };
    crate::io::tune(&conn.stream);
    let timeouts = conn.shared.config.timeouts;
    // A short wait is for servers that speak first, where that may happen at all. Where a client speaks first, a slow
    // one has as long for its first byte as for the rest; where nothing will come of silence, not quite as long.
    let silence = match to.port() {
        80 | 443 => timeouts.hello,
        _ if conn.unnamed().verdict.passes() => timeouts.server_first,
        _ => timeouts.server_first * 6,
    };
    match peek::peek(&mut conn.stream, timeouts.hello, silence).await {
        Ok((first, raw)) => conn.dispatch(first, raw).await,
        Err(_) => conn.dispatch(First::Closed, Bytes::new()).await,
    }
}

/// Closes with a reset: what cannot be said in the protocol is at least said at once.
pub(crate) fn reset(stream: &TcpStream) {
    let _ = socket2::SockRef::from(stream).set_linger(Some(Duration::ZERO));
}

impl Conn {
    pub(crate) fn record(&mut self, protocol: Protocol, verdict: Verdict, host: Option<&HostName>) -> Record {
        let (sink, note) = (&self.shared.sink, std::mem::take(&mut self.note));
        let mut record = Record::begin(sink, note, &self.policy, protocol, verdict, self.started);
        record.destination(host, self.to.ip(), self.to.port());
        record
    }

    fn unnamed(&self) -> Decision {
        decide::unnamed(&self.shared.table, &self.entry, &self.policy, self.to, Reason::NoName)
    }

    async fn dispatch(mut self, first: First, raw: Bytes) {
        match first {
            First::Tls(hello) => self.tls(hello, raw).await,
            First::BadHello => {
                let record = self.record(Protocol::Tls, Verdict::Deny { reason: Reason::BadHello }, None);
                self.refuse_tls(record, Reason::BadHello, raw).await;
            }
            First::Http1 => self.http(Alpn::Http1, raw).await,
            First::Http2 => self.http(Alpn::Http2, raw).await,
            First::BadHttp => self.bad_http(raw).await,
            First::Other => {
                let decision = self.unnamed();
                self.raw(Protocol::Tcp, decision, raw).await;
            }
            First::Silent => self.silent().await,
            First::Closed => {
                let decision = self.unnamed();
                drop(self.record(Protocol::Tcp, decision.verdict, decision.name.as_ref()));
            }
        }
    }

    async fn http(self, alpn: Alpn, raw: Bytes) {
        let conn = HttpConn::new(self.shared, self.entry, self.slot, self.to, None, alpn, alpn);
        let stream = Prefixed::new(raw, self.stream);
        Box::pin(serve(conn.noted(self.note), stream, CancellationToken::new())).await;
    }

    async fn bad_http(mut self, raw: Bytes) {
        let reason = Reason::BadRequest;
        let mut record = self.record(Protocol::Http, Verdict::Deny { reason }, None);
        record.counters.out.fetch_add(raw.len() as u64, Ordering::Relaxed);
        record.status(deny::status_for(reason).as_u16());
        let detail =
            Some("the first line is no request line as HTTP/1.1 has it, is too long, or was not finished");
        let response =
            Denial { reason, host: None, event: record.id(), detail }.response(&http::HeaderMap::new());
        let head = format!(
            "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            response.body().len()
        );
        farewell(&mut self.stream, &[head.as_bytes(), response.body()].concat()).await;
    }

    pub(crate) async fn refuse_tls(self, record: Record, reason: Reason, raw: Bytes) {
        self.alert(record, deny::alert_for(reason), raw).await;
    }

    pub(crate) async fn alert(mut self, record: Record, alert: &[u8], raw: Bytes) {
        record.counters.out.fetch_add(raw.len() as u64, Ordering::Relaxed);
        farewell(&mut self.stream, alert).await;
        drop(record);
    }

    async fn tls(mut self, hello: Hello, raw: Bytes) {
        let decision = match &hello.name {
            Some(Ok(name)) => decide::named(&self.shared.table, &self.policy, name, self.to),
            Some(Err(_)) => {
                let record = self.record(Protocol::Tls, Verdict::Deny { reason: Reason::BadName }, None);
                return self.refuse_tls(record, Reason::BadName, raw).await;
            }
            None => decide::unnamed_tls(&self.shared.table, &self.entry, &self.policy, self.to),
        };
        if !decision.verdict.passes() {
            let reason = decision.verdict.reason();
            let record = self.record(Protocol::Tls, decision.verdict, decision.name.as_ref());
            return self.refuse_tls(record, reason, raw).await;
        }
        let http = hello.http && (hello.alpn_offered || !NOT_HTTP.contains(&self.to.port()));
        match &hello.name {
            // Whatever it offers: many a server speaks HTTP all the same, and would hand a value back that it was sent before.
            Some(Ok(name)) if self.opens(&decision, name).await => match http {
                // Apart, so that a connection that is only relayed has no room for it.
                true => Box::pin(self.open(name.clone(), decision, &hello, raw)).await,
                false => Box::pin(self.open_as_offered(name.clone(), decision, &hello, raw)).await,
            },
            Some(Ok(name)) if matches!(decision.route, Route::Name(_)) => {
                let decision = Decision { subject: Subject::Spliced(name.clone()), ..decision };
                self.raw(Protocol::Tls, decision, raw).await;
            }
            // What a secret is for and leads elsewhere stays unopened, and is no reason to cut it.
            Some(Ok(name)) if decision.verdict.is_allowed() && !self.policy.could_inject(name) => {
                let subject = Subject::Unopened(name.clone(), self.to.ip());
                self.raw(Protocol::Tls, Decision { subject, ..decision }, raw).await;
            }
            _ => self.raw(Protocol::Tls, decision, raw).await,
        }
    }

    /// Whether TLS to the name is opened: a rule allows it and a secret could apply, to where it will be dialled.
    async fn opens(&self, decision: &Decision, name: &HostName) -> bool {
        let could = decision.verdict.is_allowed() && self.policy.could_inject(name);
        match decision.route {
            Route::Name(_) => could,
            Route::Address => {
                let dialer = &self.shared.connector.dialer;
                could && Box::pin(dialer.leads_to(&self.entry, name, self.to.ip())).await
            }
        }
    }

    /// Nothing was said. Where that may pass, the server is heard; whoever speaks first settles what it is. What a guest says
    /// after all is judged as if it had said it at once: else a name could be written unseen by waiting.
    async fn silent(mut self) {
        let decision = self.unnamed();
        if let Some((first, raw)) = self.relay(Protocol::Tcp, &decision, Bytes::new(), true).await {
            self.policy = self.entry.policy.load_full();
            Box::pin(self.dispatch(first, raw)).await;
        }
    }

    /// Passes the bytes through as they are.
    async fn raw(mut self, protocol: Protocol, decision: Decision, raw: Bytes) {
        drop(self.relay(protocol, &decision, raw, false).await);
    }

    /// Relays to the end, and leaves one event. If the server is to be heard first and the guest speaks before it, gives back
    /// what the guest said: nothing was passed then, and there is no event.
    async fn relay(
        &mut self,
        protocol: Protocol,
        decision: &Decision,
        raw: Bytes,
        hear: bool,
    ) -> Option<(First, Bytes)> {
        let reason = decision.verdict.reason();
        let passes = decision.verdict.passes();
        let mut record = self.record(protocol, decision.verdict.clone(), decision.name.as_ref());
        record.counters.out.fetch_add(raw.len() as u64, Ordering::Relaxed);
        if !passes {
            reset(&self.stream);
            return None;
        }
        let ticket = self.entry.enter(decision.subject.clone());
        let revoked = ticket.revoked.clone();
        let stop = self.shared.stop.clone();
        let passed = tokio::select! {
            biased;
            () = revoked.cancelled() => None,
            passed = self.pass(&mut record, &ticket, &decision.route, raw, hear) => Some(passed),
            () = stop.cancelled() => return None,
        };
        match passed {
            None => {
                tracing::debug!(vm = %self.policy.vm, reason = reason.word(), "cut: the rules no longer allow it");
                record.verdict(Verdict::Deny { reason: Reason::Revoked });
                reset(&self.stream);
            }
            Some(Ok(None)) => {}
            Some(Ok(spoke)) => {
                self.note = record.discard();
                return spoke;
            }
            Some(Err(error)) => {
                record.verdict(Verdict::Deny { reason: error.reason() });
                match protocol {
                    Protocol::Tls => farewell(&mut self.stream, deny::alert_for(error.reason())).await,
                    _ => reset(&self.stream),
                }
            }
        }
        None
    }

    async fn pass(
        &mut self,
        record: &mut Record,
        ticket: &Ticket,
        route: &Route,
        mut raw: Bytes,
        hear: bool,
    ) -> Result<Option<(First, Bytes)>, DialError> {
        let dialer = &self.shared.connector.dialer;
        let (mut upstream, address) = dialer.dial(&self.entry, route, self.to).await?;
        dialer.enter(&self.entry, ticket, address.ip())?;
        record.dialled(address.ip());
        let timeouts = self.shared.config.timeouts;
        if hear {
            // Something that is there to be read, or an end: readiness alone may be false, and the upstream's would let the
            // guest go on unread.
            let (mut of_guest, mut of_upstream) = ([0], [0]);
            let spoke = tokio::select! {
                biased;
                _ = self.stream.peek(&mut of_guest) => true,
                _ = upstream.peek(&mut of_upstream) => false,
                () = tokio::time::sleep(timeouts.idle) => {
                    reset(&self.stream);
                    return Ok(None);
                }
            };
            if spoke {
                let peeked = peek::peek(&mut self.stream, timeouts.hello, timeouts.hello).await;
                match peeked.unwrap_or((First::Closed, Bytes::new())) {
                    (First::Other | First::Silent | First::Closed, said) => raw = said,
                    spoke => return Ok(Some(spoke)),
                }
                record.counters.out.fetch_add(raw.len() as u64, Ordering::Relaxed);
            }
        }
        upstream.write_all(&raw).await.map_err(DialError::Unreachable)?;
        let relayed = splice::relay(
            &self.stream,
            &upstream,
            &self.shared.pipes,
            &record.counters,
            &self.entry.throttle,
            timeouts.idle,
        )
        .await;
        if relayed.is_err() {
            // One side broke off; the other is told so.
            reset(&upstream);
            reset(&self.stream);
        }
        Ok(None)
    }
}
