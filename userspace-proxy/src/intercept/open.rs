//! Opens a guest's TLS: as the name towards the guest, verified for the name towards the upstream.
//!
//! Must never pass a byte of what was opened to an upstream whose certificate was not verified for the name.

use super::leaf::Alpn;
use crate::{
    audit::Record,
    conn::Conn,
    decide::{Decision, Route},
    http::{
        request::HttpConn,
        serve::serve,
        upstream::{Key, Upstream, UpstreamError},
    },
    io::{Prefixed, farewell},
    peek::{self, First, tls::Hello},
    proxy::Shared,
    registry::{Subject, Ticket},
    table::VmEntry,
};
use bytes::Bytes;
use std::{net::SocketAddr, sync::Arc};
use tapgate_model::{HostName, Protocol, Reason, Verdict, VmPolicy};
use tokio::{net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

type Opened = TlsStream<Prefixed<TcpStream>>;

impl Conn {
    /// Opens the connection and serves what is inside.
    pub(crate) async fn open(self, name: HostName, decision: Decision, hello: &Hello, raw: Bytes) {
        let subject = match decision.route {
            Route::Name(_) => Subject::Opened(name.clone()),
            Route::Address => Subject::Address(self.to.ip()),
        };
        let ticket = self.entry.enter(subject);
        let upstream =
            if hello.http2 { self.first_upstream(&name, decision.route.clone()).await } else { None };
        let alpn = upstream.as_ref().map_or(Alpn::Http1, Upstream::alpn);
        let config = match self.shared.leaves.config(&self.entry.ca, &name, alpn) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, %name, "no certificate could be made");
                let record = self.record(Protocol::Tls, Verdict::Deny { reason: Reason::Fault }, Some(&name));
                return self.refuse_tls(record, Reason::Fault, raw).await;
            }
        };
        // Handed over where the handshake fails; where it succeeds, what is inside has records of its own.
        let record = self.record(Protocol::Tls, Verdict::Deny { reason: Reason::Untrusted }, Some(&name));
        let Self { shared, entry, policy, stream, to, started } = self;
        let stream = Prefixed::new(raw, stream).counted(record.counters.clone());
        let accepted = timeout(shared.config.timeouts.hello, TlsAcceptor::from(config).accept(stream)).await;
        let Ok(Ok(mut stream)) = accepted else { return };
        record.discard();
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
        let conn = match first {
            First::Other | First::Tls(_) | First::BadHello => {
                let mut record =
                    Record::begin(&shared.sink, &policy, Protocol::Tls, decision.verdict, started);
                record.destination(Some(&name), to.ip(), to.port());
                let other = Other { shared, entry, policy, to, name, route: decision.route };
                return other.relay(stream, raw, record, ticket).await;
            }
            First::Http2 => HttpConn::new(shared, entry, to, Some(name), Alpn::Http2, Alpn::Http2),
            First::Http1 | First::BadHttp | First::Closed => {
                HttpConn::new(shared, entry, to, Some(name), alpn, offer)
            }
        };
        if let Some(upstream) = upstream {
            conn.park(upstream);
        }
        serve(conn, Prefixed::new(raw, stream), ticket.revoked.clone()).await;
    }

    /// What HTTP the upstream speaks is known only from the upstream.
    async fn first_upstream(&self, name: &HostName, route: Route) -> Option<Upstream> {
        let key = Key::new(Some(name.clone()), route, self.to, Alpn::Http2);
        let pooled = self.shared.pool.take(&self.policy.vm, &key);
        let dialer = &self.shared.connector.dialer;
        if let Some(upstream) = pooled.filter(|up| dialer.admits(&self.policy, up.address.ip()).is_ok()) {
            return Some(upstream);
        }
        // A failure is told to the guest as the answer to its first request.
        let connected = self.shared.connector.connect(&self.policy, key).await;
        connected.inspect_err(|error| tracing::debug!(%name, %error, "no upstream yet")).ok()
    }
}

/// An opened connection in which something else than HTTP is spoken: passed on as it is, TLS on both sides.
struct Other {
    shared: Arc<Shared>,
    entry: Arc<VmEntry>,
    policy: Arc<VmPolicy>,
    to: SocketAddr,
    name: HostName,
    route: Route,
}

impl Other {
    async fn relay(self, stream: Opened, raw: Bytes, mut record: Record, ticket: Ticket) {
        let mut guest =
            Prefixed::new(raw, stream).counted(record.counters.clone()).throttled(self.entry.clone());
        let passed = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(Reason::Revoked),
            passed = self.pass(&mut guest, &mut record) => passed.map_err(|error| error.reason()),
            () = self.shared.stop.cancelled() => return,
        };
        if let Err(reason) = passed {
            record.verdict(Verdict::Deny { reason });
            farewell(&mut guest, b"").await;
        }
    }

    async fn pass(&self, guest: &mut Prefixed<Opened>, record: &mut Record) -> Result<(), UpstreamError> {
        let connector = &self.shared.connector;
        let (stream, address) = connector.dialer.dial(&self.policy, &self.route, self.to).await?;
        let upstream = connector.tls(stream, &self.name, None).await?;
        record.dialled(address.ip());
        let mut upstream = Prefixed::new(Bytes::new(), upstream).throttled(self.entry.clone());
        // How it ends is between the two.
        let _ = tokio::io::copy_bidirectional_with_sizes(guest, &mut upstream, 16 * 1024, 16 * 1024).await;
        Ok(())
    }
}
