//! Opens TLS that offers no HTTP: the upstream is dialled first, with the guest's own offer, so that what it chooses is what the
//! guest gets. What is said inside may be HTTP all the same.
//!
//! Must never offer an upstream what the guest did not, nor answer a guest before the upstream was verified.

use super::{leaf::Alpn, other::Other};
use crate::{
    conn::Conn,
    decide::Decision,
    http::{
        request::HttpConn,
        serve::serve,
        upstream::{Offer, UpstreamError},
    },
    io::Prefixed,
    peek::{First, tls::Hello},
};
use bytes::Bytes;
use rustls::ServerConfig;
use std::sync::Arc;
use tapgate_model::{HostName, Note, Protocol, Reason, Verdict};
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;

impl Conn {
    /// Opens the connection as the upstream does, and serves or passes on what is inside.
    pub(crate) async fn open_as_offered(
        mut self,
        name: HostName,
        decision: Decision,
        hello: &Hello,
        raw: Bytes,
    ) {
        let ca = match self.entry.ca() {
            Ok(ca) => ca,
            Err(error) => return self.without_certificate(&error, &name, raw).await,
        };
        let ticket = self.entry.enter(self.subject(&name, &decision.route));
        let other = Other {
            shared: self.shared.clone(),
            entry: self.entry.clone(),
            policy: self.policy.clone(),
            to: self.to,
            name: name.clone(),
            decision,
            started: self.started,
        };
        let mut record = other.record(std::mem::take(&mut self.note));
        let dialled = tokio::select! {
            biased;
            () = ticket.revoked.cancelled() => Err(None),
            dialled = other.dial(&mut record, &ticket, Offer::Other(&hello.protocols)) => dialled.map_err(Some),
            () = self.shared.stop.cancelled() => return,
        };
        let upstream = match dialled {
            Ok(upstream) => upstream,
            Err(error) => {
                let reason = error.as_ref().map_or(Reason::Revoked, UpstreamError::reason);
                tracing::debug!(%name, reason = reason.word(), "no upstream for what the guest offers");
                record.verdict(Verdict::Deny { reason });
                return match error {
                    Some(error) => self.alert(record, error.alert(), raw).await,
                    None => self.refuse_tls(record, reason, raw).await,
                };
            }
        };
        // Every opened connection answers with the certificate of its name, whatever is spoken.
        let config = match self.entry.leaves.config(&self.shared.provider, &ca, &name, Alpn::Http1) {
            Ok(config) => config,
            Err(error) => {
                tracing::error!(%error, %name, "no certificate could be made");
                record.verdict(Verdict::Deny { reason: Reason::Fault });
                return self.refuse_tls(record, Reason::Fault, raw).await;
            }
        };
        let mut config = ServerConfig::clone(&config);
        config.alpn_protocols =
            upstream.get_ref().1.alpn_protocol().map(<[u8]>::to_vec).into_iter().collect();
        // Handed over where the handshake fails, and counts TLS; the other counts what is inside.
        self.note = record.discard();
        let verdict = Verdict::Deny { reason: Reason::Untrusted };
        let failed = self.record(Protocol::Tls, verdict, Some(&name)).undecided();
        let Self { shared, entry, stream, to, slot, .. } = self;
        let stream = Prefixed::new(raw, stream).counted(failed.counters.clone());
        let accepting = TlsAcceptor::from(Arc::new(config)).accept(stream);
        let Ok(Ok(mut stream)) = timeout(shared.config.timeouts.hello, accepting).await else { return };
        let mut record = other.record(failed.discard());
        if let Ok(address) = upstream.get_ref().0.peer_addr() {
            record.dialled(address.ip());
        }
        let mut note = Note::default();
        let spoke = other.meet(&mut stream, upstream, record, &mut note, &ticket).await;
        let Some((first, raw)) = spoke else { return };
        let alpn = if matches!(first, First::Http2) { Alpn::Http2 } else { Alpn::Http1 };
        // Requests go to an upstream that HTTP was agreed on with.
        let conn = HttpConn::new(shared, entry, slot, to, Some(name), alpn, alpn);
        serve(conn.noted(note), Prefixed::new(raw, stream), ticket.revoked.clone()).await;
    }
}
