//! Opens a guest's TLS: as the name towards the guest, verified for the name towards the upstream.
//!
//! Must never pass a byte of what was opened to an upstream whose certificate was not verified for the name.

use super::{ca::CaError, leaf::Alpn, other::Other};
use crate::{
    conn::Conn,
    decide::{Decision, Route},
    http::{
        request::HttpConn,
        serve::serve,
        upstream::{Key, Upstream},
    },
    io::Prefixed,
    peek::{self, First, tls::Hello},
    registry::Subject,
};
use bytes::Bytes;
use tapgate_model::{HostName, Protocol, Reason, Verdict};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

impl Conn {
    /// There is nothing to answer with as the name.
    pub(crate) async fn without_certificate(mut self, error: &CaError, name: &HostName, raw: Bytes) {
        tracing::error!(%error, %name, "no certificate could be made");
        let record = self.record(Protocol::Tls, Verdict::Deny { reason: Reason::Fault }, Some(name));
        self.refuse_tls(record, Reason::Fault, raw).await;
    }

    /// Opens the connection and serves what is inside.
    pub(crate) async fn open(mut self, name: HostName, decision: Decision, hello: &Hello, raw: Bytes) {
        let ca = match self.entry.ca() {
            Ok(ca) => ca,
            Err(error) => return self.without_certificate(&error, &name, raw).await,
        };
        let ticket = self.entry.enter(self.subject(&name, &decision.route));
        let upstream = if hello.http2 {
            Box::pin(self.first_upstream(&name, decision.route.clone())).await
        } else {
            None
        };
        let alpn = match hello.http2_only {
            // Whatever becomes of the upstream is told in the answers; it is no fault of the handshake.
            true => Alpn::Http2,
            false => upstream.as_ref().map_or(Alpn::Http1, Upstream::alpn),
        };
        let config = match self.entry.leaves.config(&self.shared.provider, &ca, &name, alpn) {
            Ok(config) => config,
            Err(error) => return self.without_certificate(&error, &name, raw).await,
        };
        // Handed over where the handshake fails; where it succeeds, what is inside has records of its own.
        let verdict = Verdict::Deny { reason: Reason::Untrusted };
        let record = self.record(Protocol::Tls, verdict, Some(&name)).undecided();
        let Self { shared, entry, policy, stream, to, started, slot, note: _ } = self;
        let stream = Prefixed::new(raw, stream).counted(record.counters.clone());
        let accepted = timeout(shared.config.timeouts.hello, TlsAcceptor::from(config).accept(stream)).await;
        let Ok(Ok(mut stream)) = accepted else { return };
        let mut note = record.discard();
        let timeouts = shared.config.timeouts;
        let (first, raw) = match hello.alpn_offered {
            true => (First::Http1, Bytes::new()),
            // Whoever offers no protocol may speak any.
            false => match peek::peek(&mut stream, timeouts.hello, timeouts.server_first).await {
                Ok(peeked) => peeked,
                Err(_) => (First::Http1, Bytes::new()),
            },
        };
        let offer = if hello.http2 { Alpn::Http2 } else { Alpn::Http1 };
        let other = Other {
            shared: shared.clone(),
            entry: entry.clone(),
            policy,
            to,
            name: name.clone(),
            decision,
            started,
        };
        let (first, raw) = match first {
            First::Silent => match Box::pin(other.hear(&mut stream, &mut note, &ticket)).await {
                Some(spoke) => spoke,
                None => return,
            },
            _ => (first, raw),
        };
        let conn = match first {
            First::Other | First::Silent | First::Tls(_) | First::BadHello => {
                return Box::pin(other.relay(&mut stream, note, raw, &ticket)).await;
            }
            First::Http2 => HttpConn::new(shared, entry, slot, to, Some(name), Alpn::Http2, Alpn::Http2),
            First::Http1 | First::BadHttp | First::Closed => {
                HttpConn::new(shared, entry, slot, to, Some(name), alpn, offer)
            }
        };
        let conn = conn.noted(note);
        if let Some(upstream) = upstream {
            conn.park(upstream);
        }
        serve(conn, Prefixed::new(raw, stream), ticket.revoked.clone()).await;
    }

    /// What opened TLS to the name stands for in the policy.
    pub(super) fn subject(&self, name: &HostName, route: &Route) -> Subject {
        match route {
            Route::Name(_) => Subject::Opened(name.clone()),
            Route::Address => Subject::Address(self.to.ip()),
        }
    }

    /// What HTTP the upstream speaks is known only from the upstream.
    async fn first_upstream(&self, name: &HostName, route: Route) -> Option<Upstream> {
        let key = Key::new(Some(name.clone()), route, self.to, Alpn::Http2);
        let pooled = self.shared.pool.take(&self.policy.vm, &key);
        let dialer = &self.shared.connector.dialer;
        if let Some(upstream) =
            pooled.filter(|up| dialer.admits(&self.entry.policy.load(), up.address.ip()).is_ok())
        {
            return Some(upstream);
        }
        // A failure is told to the guest as the answer to its first request.
        let connected = self.shared.connector.connect(&self.entry, key).await;
        connected.inspect_err(|error| tracing::debug!(%name, %error, "no upstream yet")).ok()
    }
}
