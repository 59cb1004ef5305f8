//! An opened connection in which something else than HTTP is spoken: passed on, TLS on both sides, and what comes back cleaned.
//!
//! Must never pass on unread what a server could take for HTTP, and never to an upstream that was not verified.

use super::relay::{self, Broken, Lookout};
use crate::{
    audit::Record,
    decide::Decision,
    http::upstream::{Offer, UpstreamError},
    io::{Prefixed, farewell},
    peek::{self, First},
    proxy::Shared,
    registry::Ticket,
    socket::Socket,
    table::VmEntry,
};
use bytes::{Bytes, BytesMut};
use std::{net::SocketAddr, sync::Arc, time::Instant};
use tapgate_model::{HostName, Note, Protocol, Reason, Verdict, VmPolicy};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite},
    net::TcpStream,
    time::sleep,
};
use tokio_rustls::server::TlsStream;

pub(super) type Opened = TlsStream<Prefixed<TcpStream>>;
pub(super) type Upstreams = tokio_rustls::client::TlsStream<Socket>;

/// One such connection.
pub(super) struct Other {
    pub(super) shared: Arc<Shared>,
    pub(super) entry: Arc<VmEntry>,
    pub(super) policy: Arc<VmPolicy>,
    pub(super) to: SocketAddr,
    pub(super) name: HostName,
    pub(super) decision: Decision,
    pub(super) started: Instant,
}

impl Other {
    /// The guest says nothing: perhaps the server speaks first, perhaps the guest is slow. Relays to the end if what is spoken
    /// is not HTTP, and gives back what the guest says if it is.
    pub(super) async fn hear(
        &self,
        stream: &mut Opened,
        note: &mut Note,
        ticket: &Ticket,
    ) -> Option<(First, Bytes)> {
        let (upstream, record) = self.reach(stream, std::mem::take(note), ticket).await?;
        self.meet(stream, upstream, record, note, ticket).await
    }

    /// Passes on what the guest begins with, and all that follows.
    pub(super) async fn relay(&self, stream: &mut Opened, note: Note, raw: Bytes, ticket: &Ticket) {
        let Some((upstream, record)) = self.reach(stream, note, ticket).await else { return };
        let upstream = Prefixed::new(Bytes::new(), upstream);
        self.pass(&mut Prefixed::new(raw, stream), upstream, true, record, ticket).await;
    }

    /// Hears who speaks first. What the guest says is given back, with what is noted of it, if a server could take it for HTTP; all else is relayed to the end.
    pub(super) async fn meet(
        &self,
        guest: &mut Opened,
        mut upstream: Upstreams,
        mut record: Record,
        note: &mut Note,
        ticket: &Ticket,
    ) -> Option<(First, Bytes)> {
        let timeouts = self.shared.config.timeouts;
        let mut heard = BytesMut::with_capacity(4 * 1024);
        let spoke = async {
            let mut said = BytesMut::with_capacity(4 * 1024);
            tokio::select! {
                biased;
                // How it ends, if it ends, is seen by whoever goes on with it.
                _ = guest.read_buf(&mut said) => {
                    let mut rest = Prefixed::new(said.freeze(), &mut *guest);
                    let spoke = peek::peek(&mut rest, timeouts.hello, timeouts.hello).await;
                    Some(spoke.unwrap_or((First::Closed, Bytes::new())))
                }
                _ = upstream.read_buf(&mut heard) => None,
            }
        };
        let spoke = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(Some(Reason::Revoked)),
            spoke = spoke => Ok(spoke),
            () = sleep(timeouts.idle) => Err(None),
            () = self.shared.stop.cancelled() => return None,
        };
        match spoke {
            Ok(Some((first, raw))) if relay::is_http(&first) => {
                *note = record.discard();
                return Some((first, raw));
            }
            Ok(Some((_, raw))) => {
                let upstream = Prefixed::new(Bytes::new(), upstream);
                self.pass(&mut Prefixed::new(raw, guest), upstream, true, record, ticket).await;
            }
            Ok(None) => {
                let upstream = Prefixed::new(heard.freeze(), upstream);
                self.pass(guest, upstream, false, record, ticket).await;
            }
            Err(reason) => {
                if let Some(reason) = reason {
                    record.verdict(Verdict::Deny { reason });
                }
                farewell(guest, b"").await;
            }
        }
        None
    }

    pub(super) fn record(&self, note: Note) -> Record {
        let (sink, verdict) = (&self.shared.sink, self.decision.verdict.clone());
        let mut record = Record::begin(sink, note, &self.policy, Protocol::Tls, verdict, self.started);
        record.destination(Some(&self.name), self.to.ip(), self.to.port());
        record
    }

    /// Dials for a guest whose handshake is done: it is told of nothing but the end.
    async fn reach(&self, guest: &mut Opened, note: Note, ticket: &Ticket) -> Option<(Upstreams, Record)> {
        let mut record = self.record(note);
        let dialled = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(Reason::Revoked),
            dialled = self.dial(&mut record, ticket, Offer::Other(&[])) => dialled.map_err(|error| error.reason()),
            () = self.shared.stop.cancelled() => return None,
        };
        match dialled {
            Ok(upstream) => Some((upstream, record)),
            Err(reason) => {
                record.verdict(Verdict::Deny { reason });
                farewell(guest, b"").await;
                None
            }
        }
    }

    pub(super) async fn dial(
        &self,
        record: &mut Record,
        ticket: &Ticket,
        offer: Offer<'_>,
    ) -> Result<Upstreams, UpstreamError> {
        let connector = &self.shared.connector;
        let (stream, address) = connector.dialer.dial(&self.entry, &self.decision.route, self.to).await?;
        connector.dialer.enter(&self.entry, ticket, address.ip())?;
        record.dialled(address.ip());
        connector.tls(stream, &self.name, offer).await
    }

    /// `judged` if what the guest begins with was looked at.
    async fn pass<S: AsyncRead + AsyncWrite + Unpin>(
        &self,
        stream: &mut S,
        upstream: Prefixed<Upstreams>,
        judged: bool,
        mut record: Record,
        ticket: &Ticket,
    ) {
        let counters = record.counters.clone();
        let timeouts = self.shared.config.timeouts;
        let guest =
            Prefixed::new(Bytes::new(), &mut *stream).counted(counters.clone()).throttled(self.entry.clone());
        let upstream = upstream.throttled(self.entry.clone());
        let lookout = Lookout::new(&self.entry, &self.name);
        let patience = (!judged).then_some(timeouts.hello);
        let ended = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(Broken::For(Reason::Revoked)),
            ended = relay::both(guest, upstream, lookout, patience) => ended,
            () = counters.still(timeouts.idle) => Ok(()),
            () = self.shared.stop.cancelled() => return,
        };
        if let Err(Broken::For(reason)) = ended {
            record.verdict(Verdict::Deny { reason });
            farewell(stream, b"").await;
        }
    }
}
