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
    socket::Socket,
    table::VmEntry,
};
use bytes::{Bytes, BytesMut};
use std::{net::SocketAddr, sync::Arc, time::Instant};
use tapgate_model::{HostName, Note, Protocol, Reason, Verdict, VmPolicy};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    net::TcpStream,
    time::{sleep, timeout},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

type Opened = TlsStream<Prefixed<TcpStream>>;
type Upstreams = tokio_rustls::client::TlsStream<Socket>;

impl Conn {
    /// Opens the connection and serves what is inside.
    pub(crate) async fn open(mut self, name: HostName, decision: Decision, hello: &Hello, raw: Bytes) {
        let subject = match decision.route {
            Route::Name(_) => Subject::Opened(name.clone()),
            Route::Address => Subject::Address(self.to.ip()),
        };
        let ticket = self.entry.enter(subject);
        let upstream =
            if hello.http2 { self.first_upstream(&name, decision.route.clone()).await } else { None };
        let alpn = match hello.http2_only {
            // Whatever becomes of the upstream is told in the answers; it is no fault of the handshake.
            true => Alpn::Http2,
            false => upstream.as_ref().map_or(Alpn::Http1, Upstream::alpn),
        };
        let config = match self.entry.leaves.config(&self.shared.provider, &self.entry.ca, &name, alpn) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, %name, "no certificate could be made");
                let record = self.record(Protocol::Tls, Verdict::Deny { reason: Reason::Fault }, Some(&name));
                return self.refuse_tls(record, Reason::Fault, raw).await;
            }
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
            verdict: decision.verdict,
            route: decision.route,
            started,
        };
        let (first, raw) = match first {
            First::Silent => match other.hear(&mut stream, &mut note, &ticket).await {
                Some(spoke) => spoke,
                None => return,
            },
            _ => (first, raw),
        };
        let conn = match first {
            First::Other | First::Silent | First::Tls(_) | First::BadHello => {
                return other.relay(&mut stream, note, raw, &ticket).await;
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

/// An opened connection in which something else than HTTP is spoken: passed on as it is, TLS on both sides.
struct Other {
    shared: Arc<Shared>,
    entry: Arc<VmEntry>,
    policy: Arc<VmPolicy>,
    to: SocketAddr,
    name: HostName,
    verdict: Verdict,
    route: Route,
    started: Instant,
}

impl Other {
    /// The guest says nothing: perhaps the server speaks first, perhaps the guest is slow. Relays to the end if it is the server
    /// that speaks, and gives back what the guest says if it is the guest: that may be HTTP after all.
    async fn hear(&self, stream: &mut Opened, note: &mut Note, ticket: &Ticket) -> Option<(First, Bytes)> {
        let mut record = self.record(std::mem::take(note));
        let mut said = BytesMut::with_capacity(4 * 1024);
        let heard = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(Reason::Revoked),
            heard = self.listen(stream, &mut said, &mut record, ticket) => heard.map_err(|error| error.reason()),
            () = sleep(self.shared.config.timeouts.idle) => {
                farewell(stream, b"").await;
                return None;
            }
            () = self.shared.stop.cancelled() => return None,
        };
        match heard {
            Ok(Some(upstream)) => self.pass(stream, upstream, &mut record, ticket).await,
            Ok(None) => {
                *note = record.discard();
                let timeouts = self.shared.config.timeouts;
                let mut rest = Prefixed::new(said.freeze(), stream);
                let spoke = peek::peek(&mut rest, timeouts.hello, timeouts.hello).await;
                return Some(spoke.unwrap_or((First::Closed, Bytes::new())));
            }
            Err(reason) => {
                record.verdict(Verdict::Deny { reason });
                farewell(stream, b"").await;
            }
        }
        None
    }

    /// The upstream, with what it said, if it speaks before the guest does.
    async fn listen(
        &self,
        guest: &mut Opened,
        said: &mut BytesMut,
        record: &mut Record,
        ticket: &Ticket,
    ) -> Result<Option<Prefixed<Upstreams>>, UpstreamError> {
        let mut upstream = self.dial(record, ticket).await?;
        let mut heard = BytesMut::with_capacity(4 * 1024);
        tokio::select! {
            biased;
            // How it ends, if it ends, is seen by whoever goes on with it.
            _ = guest.read_buf(said) => Ok(None),
            _ = upstream.read_buf(&mut heard) => Ok(Some(Prefixed::new(heard.freeze(), upstream))),
        }
    }

    async fn relay(&self, stream: &mut Opened, note: Note, raw: Bytes, ticket: &Ticket) {
        let mut record = self.record(note);
        let dialled = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(Reason::Revoked),
            dialled = self.dial(&mut record, ticket) => dialled.map_err(|error| error.reason()),
            () = self.shared.stop.cancelled() => return,
        };
        match dialled {
            Ok(upstream) => {
                let upstream = Prefixed::new(Bytes::new(), upstream);
                self.pass(&mut Prefixed::new(raw, stream), upstream, &mut record, ticket).await;
            }
            Err(reason) => {
                record.verdict(Verdict::Deny { reason });
                farewell(stream, b"").await;
            }
        }
    }

    fn record(&self, note: Note) -> Record {
        let (sink, verdict) = (&self.shared.sink, self.verdict.clone());
        let mut record = Record::begin(sink, note, &self.policy, Protocol::Tls, verdict, self.started);
        record.destination(Some(&self.name), self.to.ip(), self.to.port());
        record
    }

    async fn dial(&self, record: &mut Record, ticket: &Ticket) -> Result<Upstreams, UpstreamError> {
        let connector = &self.shared.connector;
        let (stream, address) = connector.dialer.dial(&self.entry, &self.route, self.to).await?;
        connector.dialer.enter(&self.entry, ticket, address.ip())?;
        record.dialled(address.ip());
        connector.tls(stream, &self.name, None).await
    }

    async fn pass<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        upstream: Prefixed<Upstreams>,
        record: &mut Record,
        ticket: &Ticket,
    ) {
        let counters = record.counters.clone();
        let mut guest =
            Prefixed::new(Bytes::new(), &mut *stream).counted(counters.clone()).throttled(self.entry.clone());
        let mut upstream = upstream.throttled(self.entry.clone());
        let revoked = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => true,
            // How it ends is between the two.
            _ = tokio::io::copy_bidirectional_with_sizes(&mut guest, &mut upstream, 16 * 1024, 16 * 1024) => false,
            () = counters.still(self.shared.config.timeouts.idle) => false,
            () = self.shared.stop.cancelled() => return,
        };
        if revoked {
            record.verdict(Verdict::Deny { reason: Reason::Revoked });
            farewell(stream, b"").await;
        }
    }
}
