//! One request: whose it is, what is decided, what is put in, where it goes, what comes back.
//!
//! The name decided on, the name dialled and the name verified are one. Must never inject on anything but an `allowed`
//! verdict, and never reuse a decision for the next request.

use super::{
    authority::{Authority, Named},
    body::{self, Body, Incoming, Outgoing},
    guard::{Refusal, Switch},
    interim::Interim,
    received::Received,
    response::{self, Unfit},
    sending::Parked,
    talk::Sought,
    target::{Refused, name_in, who},
    under_way::UnderWay,
    upgrade,
    upstream::Key,
};
use crate::{
    audit::Record,
    decide::{self, Decision},
    deny::{self, Denial},
    intercept::leaf::Alpn,
    place::Place,
    proxy::Shared,
    registry::Ticket,
    secret::{patterns::Patterns, substitute::Channel},
    table::VmEntry,
};
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header, request::Parts};
use http_body_util::BodyExt as _;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tapgate_model::{HostName, Note, Protocol, Reason, Verdict, VmPolicy};

/// Why an answer is not passed on.
pub(super) const TOO_MANY_HEADS: &str =
    "the answers that are not read yet have heads of more than 64 MiB together; read some first";

/// A guest's connection that speaks HTTP.
pub(crate) struct HttpConn {
    pub(crate) shared: Arc<Shared>,
    pub(crate) entry: Arc<VmEntry>,
    /// Its place among the VM's connections, which what follows on the connection holds on to.
    pub(super) slot: Arc<Place>,
    /// What the guest connected to.
    pub(crate) to: SocketAddr,
    /// The name of SNI, where TLS was opened.
    pub(crate) tls: Option<HostName>,
    /// What the guest speaks.
    pub(crate) alpn: Alpn,
    /// The best that upstreams are offered.
    offer: Alpn,
    started: Instant,
    refusal: Option<Refusal>,
    switch: Switch,
    pub(super) requests: AtomicU64,
    pub(super) under_way: UnderWay,
    pub(super) parked: Parked,
    /// What is noted of the connection until the first request has a record.
    note: Mutex<Note>,
}

/// Stands in a refusal: the upstream said that it did not look at the request, which may be sent again whatever it is.
#[derive(Clone, Copy)]
pub(super) struct Untouched;

/// A request that passed.
struct Passed {
    number: u64,
    policy: Arc<VmPolicy>,
    decision: Decision,
    parts: Parts,
    body: Received,
    record: Record,
    interim: Interim,
}

impl HttpConn {
    pub(crate) fn new(
        shared: Arc<Shared>,
        entry: Arc<VmEntry>,
        slot: Arc<Place>,
        to: SocketAddr,
        tls: Option<HostName>,
        alpn: Alpn,
        offer: Alpn,
    ) -> Self {
        Self {
            shared,
            entry,
            slot,
            to,
            tls,
            alpn,
            offer,
            started: Instant::now(),
            refusal: None,
            switch: Switch::default(),
            requests: AtomicU64::new(0),
            under_way: UnderWay::default(),
            parked: Parked::default(),
            note: Mutex::default(),
        }
    }

    /// Where refusals of heads are found, and another protocol is granted.
    pub(super) fn guarded(mut self, refusal: Refusal, switch: Switch) -> Self {
        self.refusal = Some(refusal);
        self.switch = switch;
        self
    }

    /// What was noted of the connection so far.
    pub(crate) fn noted(mut self, note: Note) -> Self {
        self.note = Mutex::new(note);
        self
    }

    /// Answers one request. What comes before its answer goes to `interim`.
    pub(super) async fn handle(
        self: Arc<Self>,
        request: Request<Received>,
        interim: Interim,
    ) -> Response<Body> {
        let number = self.requests.fetch_add(1, Ordering::Relaxed);
        let (parts, body) = request.into_parts();
        let asks = upgrade::asks(&parts);
        let mut response = self.answer(number, parts, body, interim).await;
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            self.switch.grant();
        } else if asks {
            // What follows on this connection was announced as another protocol, and is not read.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }

    async fn answer(
        self: &Arc<Self>,
        number: u64,
        parts: Parts,
        body: Received,
        interim: Interim,
    ) -> Response<Body> {
        let started = Instant::now();
        let policy = self.entry.policy.load_full();
        let refused = self.refused(number);
        let begin = |verdict, host: Option<&HostName>| {
            // Of the others there is none.
            let note = match number {
                0 => std::mem::take(&mut *self.note.lock().unwrap_or_else(PoisonError::into_inner)),
                _ => Note::default(),
            };
            let sink = &self.shared.sink;
            let mut record = Record::begin(sink, note, &policy, Protocol::Http, verdict, started);
            record.destination(host, self.to.ip(), self.to.port());
            record
        };
        if let Some((reason, detail)) = refused {
            let record = begin(Verdict::Deny { reason }, self.tls.as_ref());
            return self.deny(record, reason, self.tls.as_ref(), Some(detail), &HeaderMap::new());
        }
        let judged = who(&parts, self.tls.is_some(), self.to.port()).and_then(|who| self.judge(&policy, who));
        let (mut record, refusal, host) = match judged {
            Ok(decision) if decision.verdict.passes() => {
                let mut record = begin(decision.verdict.clone(), decision.name.as_ref());
                record.request(parts.method.as_str(), parts.uri.path());
                let passed =
                    Passed { number, policy: policy.clone(), decision, parts, body, record, interim };
                return self.forward(passed).await;
            }
            Ok(decision) => {
                let reason = decision.verdict.reason();
                (begin(decision.verdict, decision.name.as_ref()), Refused::from(reason), decision.name)
            }
            Err(refused) => {
                let host = self.tls.clone().or_else(|| name_in(&parts));
                (begin(Verdict::Deny { reason: refused.reason }, host.as_ref()), refused, host)
            }
        };
        record.request(parts.method.as_str(), parts.uri.path());
        if !parts.headers.contains_key(header::EXPECT) {
            drain(body, &record).await;
        }
        self.deny(record, refusal.reason, host.as_ref(), refusal.detail, &parts.headers)
    }

    /// Why the guard refused this request, if it did.
    fn refused(&self, number: u64) -> Option<(Reason, &'static str)> {
        self.refusal.as_ref().and_then(|refusal| refusal.of(number))
    }

    /// Decides about a request that is for this host.
    fn judge(&self, policy: &VmPolicy, who: Option<Authority>) -> Result<Decision, Refused> {
        let table = &self.shared.table;
        match (&self.tls, who.map(|who| who.host)) {
            (Some(bound), Some(Named::Name(name))) if name == *bound => {
                Ok(decide::named(table, policy, bound, self.to))
            }
            (Some(_), _) => Err(Reason::NameMismatch.into()),
            (None, Some(Named::Name(name))) => Ok(decide::named(table, policy, &name, self.to)),
            (None, Some(Named::Address(_))) => {
                Ok(decide::unnamed(table, &self.entry, policy, self.to, Reason::AddressLiteral))
            }
            (None, None) => Ok(decide::unnamed(table, &self.entry, policy, self.to, Reason::NoName)),
        }
    }

    async fn forward(self: &Arc<Self>, passed: Passed) -> Response<Body> {
        let Passed { number, policy, decision, mut parts, body, mut record, interim } = passed;
        let host = decision.name.as_ref();
        let asked = deny::accept(&parts.headers);
        let ticket = Arc::new(self.entry.enter(decision.subject.clone()));
        self.under_way.add(&ticket, record.counters.clone());
        let wish = upgrade::take(&mut parts);
        let (channel, scope) = match host {
            Some(name) => self.channel(&policy, &decision, name).await,
            None => (Channel::Nowhere, None),
        };
        let patterns = match self.entry.patterns(&policy, host.zip(scope)).await {
            Ok(patterns) => patterns,
            Err(error) => {
                drop(ticket);
                return self.deny(record, Reason::Fault, host, Some(&error.to_string()), &asked);
            }
        };
        let outcome = self.rewrite(&policy, host, &mut parts, channel, patterns.is_some(), wish.is_some());
        let outcome = match outcome {
            Ok(outcome) => outcome,
            Err(error) => {
                drop(ticket);
                return self.deny(record, Reason::Limit, host, Some(&error.to_string()), &asked);
            }
        };
        match self.entry.burden.take(&parts, &outcome.credentials) {
            Ok(taken) => ticket.hold(taken),
            Err(error) => {
                drop(ticket);
                return self.deny(record, Reason::Limit, host, Some(&error.to_string()), &asked);
            }
        }
        let patterns = match Patterns::with(patterns, outcome.credentials) {
            Ok(patterns) => patterns,
            Err(error) => {
                drop(ticket);
                return self.deny(record, Reason::Fault, host, Some(&error.to_string()), &asked);
            }
        };
        record.secrets(outcome.injected.into_iter().collect(), outcome.withheld.into_iter().collect());
        let method = parts.method.clone();
        // HTTP/1.0 knows of none.
        let turn = parts.version >= Version::HTTP_11;
        let turn = turn.then(|| interim.pass_on(patterns.clone(), self.entry.clone()));
        let body = Outgoing::wrap(body, &ticket, record.counters.clone(), self.entry.clone());
        let request = Request::from_parts(parts, body);
        // Another protocol can follow on HTTP/1.1 alone.
        let offer = if wish.is_some() { Alpn::Http1 } else { self.offer };
        let key = Key::new(self.tls.clone(), decision.route.clone(), self.to, offer);
        let sent = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => return self.cut(record, &ticket, host, &asked),
            sent = async {
                let sent = self.send(&ticket, key, request, wish.is_some(), turn.as_ref()).await;
                if let Some(turn) = turn {
                    turn.written().await;
                }
                sent
            } => sent,
        };
        let (response, upstream) = match sent {
            Ok(sent) => sent,
            Err(error) => {
                tracing::debug!(vm = %policy.vm, host = ?host, %error, "no answer from the upstream");
                let untouched = error.is_refusal();
                // A body whose framing is wrong is the guest's fault, not the upstream's.
                let (reason, detail) =
                    self.refused(number).map_or((error.reason(), None), |(why, detail)| (why, Some(detail)));
                let mut response = self.deny(record, reason, host, detail, &asked);
                if untouched {
                    response.extensions_mut().insert(Untouched);
                }
                return response;
            }
        };
        record.dialled(upstream.address.ip());
        record.status(response.status().as_u16());
        let refuse = |record, detail| self.deny(record, Reason::Tunnel, host, Some(detail), &asked);
        if response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return match wish {
                Some(wish) if wish.is_answered(response.headers(), patterns.is_some()) => {
                    let host = host.cloned().zip(scope);
                    let sought =
                        Sought::new(self.entry.clone(), host, policy.secrets.clone(), patterns.clone());
                    wish.grant(self, response, record, ticket, patterns, sought)
                }
                Some(_) => refuse(record, "the upstream switched to something else than WebSocket"),
                None => refuse(record, "the upstream switched protocols unasked"),
            };
        }
        if wish.as_ref().is_some_and(upgrade::Wish::is_extended) && response.status().is_success() {
            return refuse(record, "the upstream does not speak WebSocket here");
        }
        self.keep(upstream);
        let response = response.map(|body| body.boxed_unsync());
        let coded = match &patterns {
            Some(_) => {
                let patience = self.shared.config.timeouts.connect;
                let head = (response.status(), response.headers());
                response::coded(head, &method, &self.entry.decoders, patience, &ticket.revoked).await
            }
            None => Ok(None),
        };
        let coded = match coded {
            Ok(coded) => coded,
            Err(Unfit::Revoked) => return self.cut(record, &ticket, host, &asked),
            Err(error) => {
                drop(ticket);
                return self.deny(record, error.reason(), host, Some(&error.to_string()), &asked);
            }
        };
        let mut response = response::fit(response, &method, patterns, coded);
        if !self.has_room_for(response.headers_mut()) {
            drop(ticket);
            return self.deny(record, Reason::Limit, host, Some(TOO_MANY_HEADS), &asked);
        }
        response.map(|body| Incoming::wrap(body, record, Some(ticket), self.entry.clone()))
    }

    /// Whether an answer's head may wait to be read. Over HTTP/1 there is one of them to a connection.
    pub(super) fn has_room_for(&self, head: &mut HeaderMap) -> bool {
        self.alpn == Alpn::Http1 || self.entry.heads.take_head(head)
    }

    /// Says why a request ended before its answer began.
    fn cut(
        &self,
        record: Record,
        ticket: &Ticket,
        host: Option<&HostName>,
        accept: &HeaderMap,
    ) -> Response<Body> {
        let (reason, detail) = match ticket.is_expired() {
            true => (Reason::Unreachable, Some("it sent and took nothing for too long")),
            false => (Reason::Revoked, None),
        };
        self.deny(record, reason, host, detail, accept)
    }

    pub(super) fn deny(
        &self,
        mut record: Record,
        reason: Reason,
        host: Option<&HostName>,
        detail: Option<&str>,
        accept: &HeaderMap,
    ) -> Response<Body> {
        let response = Denial { reason, host, event: record.refused(reason), detail }.response(accept);
        record.status(response.status().as_u16());
        let mut response =
            response.map(|text| Incoming::wrap(body::full(text), record, None, self.entry.clone()));
        let form =
            [Reason::BadRequest, Reason::BadName, Reason::NameMismatch, Reason::Tunnel].contains(&reason);
        if form && self.alpn == Alpn::Http1 {
            // Who writes such heads is not trusted to have written the next.
            response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        response
    }
}

impl Drop for HttpConn {
    fn drop(&mut self) {
        if *self.requests.get_mut() == 0 {
            // Begun, and nothing asked: that it was tried is said all the same.
            let (table, policy) = (&self.shared.table, self.entry.policy.load());
            let (protocol, decision) = match &self.tls {
                Some(name) => (Protocol::Tls, decide::named(table, &policy, name, self.to)),
                None => {
                    let unnamed = decide::unnamed(table, &self.entry, &policy, self.to, Reason::NoName);
                    (Protocol::Http, unnamed)
                }
            };
            let Decision { verdict, name, .. } = decision;
            let note = std::mem::take(self.note.get_mut().unwrap_or_else(PoisonError::into_inner));
            let sink = &self.shared.sink;
            let mut record = Record::begin(sink, note, &policy, protocol, verdict, self.started);
            record.destination(self.tls.as_ref().or(name.as_ref()), self.to.ip(), self.to.port());
        }
        self.give_back();
    }
}

/// Reads what little of a refused request's body is on its way, so that the answer is not lost in a reset.
async fn drain(mut body: Received, record: &Record) {
    let _ = tokio::time::timeout(Duration::from_secs(1), async {
        let mut left = 64 * 1024usize;
        while let Some(Ok(frame)) = body.frame().await {
            let length = frame.data_ref().map_or(0, bytes::Bytes::len);
            record.counters.out.fetch_add(length as u64, Ordering::Relaxed);
            match left.checked_sub(length) {
                Some(rest) => left = rest,
                None => break,
            }
        }
    })
    .await;
}
