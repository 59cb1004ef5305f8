//! WebSocket, the one protocol that may follow HTTP on a connection: asked for by `Upgrade` (RFC 6455) or, over HTTP/2, by
//! an extended CONNECT (RFC 8441), and always asked of the upstream by `Upgrade`.
//!
//! What is said after the switch is counted, held to the VM's rate, cut with its rule, and what the server says is cleaned.

use super::{
    body::{self, Body},
    http2::Promise,
    received::Received,
    request::{HttpConn, TOO_MANY_HEADS},
    talk::{self, Sought},
};
use crate::{audit::Record, io::Prefixed, registry::Ticket, secret::patterns::Patterns};
use aws_lc_rs::{digest, rand};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use h2::ext::Protocol;
use http::{HeaderMap, HeaderValue, Method, Response, StatusCode, Version, header, request::Parts};
use hyper::{ext::ReasonPhrase, upgrade::OnUpgrade};
use hyper_util::rt::TokioIo;
use std::sync::Arc;
use tapgate_model::{Reason, Verdict};
use tokio::io::{AsyncRead, AsyncWrite};

/// What a server mixes into a client's key (RFC 6455 §1.3).
const MIX: &[u8] = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// A guest's wish to speak WebSocket.
pub(super) enum Wish {
    Http1(OnUpgrade),
    /// With the key that the upstream was given in the guest's stead, and has to answer to.
    Http2(Promise, HeaderValue),
}

trait Talk: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Talk for S {}

/// Whether the request is an extended CONNECT for WebSocket; every other CONNECT wants a tunnel.
pub(super) fn is_extended(parts: &Parts) -> bool {
    let protocol = parts.extensions.get::<Protocol>();
    parts.version == Version::HTTP_2
        && parts.method == Method::CONNECT
        && protocol.is_some_and(|protocol| protocol.as_str().eq_ignore_ascii_case("websocket"))
}

/// Whether the request asks for WebSocket by `Upgrade`: what follows it on the connection is then no request.
pub(super) fn asks(parts: &Parts) -> bool {
    let upgrade = parts.headers.get(header::UPGRADE);
    parts.version == Version::HTTP_11
        && upgrade.is_some_and(|upgrade| upgrade.as_bytes().eq_ignore_ascii_case(b"websocket"))
}

/// The guest's side of the switch, if it asks for one that may be; the request is then one that asks by `Upgrade`.
pub(super) fn take(parts: &mut Parts) -> Option<Wish> {
    let (on, promise) = (parts.extensions.remove::<OnUpgrade>(), parts.extensions.remove::<Promise>());
    if is_extended(parts) {
        let mut nonce = [0u8; 16];
        rand::fill(&mut nonce).ok()?;
        let key = HeaderValue::from_str(&STANDARD.encode(nonce)).ok()?;
        parts.extensions.remove::<Protocol>();
        parts.method = Method::GET;
        parts.headers.insert(header::SEC_WEBSOCKET_KEY, key.clone());
        return promise.map(|promise| Wish::Http2(promise, key));
    }
    on.filter(|_| asks(parts)).map(Wish::Http1)
}

/// Writes the wish on a request that goes out on HTTP/1.1.
pub(super) fn ask(headers: &mut HeaderMap) {
    headers.insert(header::CONNECTION, HeaderValue::from_static("Upgrade"));
    headers.insert(header::UPGRADE, HeaderValue::from_static("websocket"));
}

fn accept_of(key: &HeaderValue) -> String {
    // The protocol's own choice; it proves that the server knows WebSocket, not who it is.
    let mut sha1 = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
    sha1.update(key.as_bytes());
    sha1.update(MIX);
    STANDARD.encode(sha1.finish())
}

impl Wish {
    /// Whether it came over HTTP/2, where success is said by a 2xx.
    pub(super) fn is_extended(&self) -> bool {
        matches!(self, Self::Http2(..))
    }

    /// Whether what the upstream says is the answer to what it was asked; where it is `searched`, no extension was.
    pub(super) fn is_answered(&self, response: &HeaderMap, searched: bool) -> bool {
        if searched && response.contains_key(header::SEC_WEBSOCKET_EXTENSIONS) {
            return false;
        }
        let Self::Http2(_, key) = self else { return true };
        let accept = response.get(header::SEC_WEBSOCKET_ACCEPT);
        accept.is_some_and(|accept| accept.as_bytes() == accept_of(key).as_bytes())
    }

    /// The guest's side, once it is told of the switch.
    async fn guest(self) -> Option<Box<dyn Talk>> {
        Some(match self {
            Self::Http1(on) => Box::new(TokioIo::new(on.await.ok()?)),
            Self::Http2(promise, _) => Box::new(promise.kept().await?),
        })
    }

    /// Lets both sides speak from here on, until one ends or the rules cut it.
    pub(super) fn grant(
        self,
        conn: &HttpConn,
        mut response: Response<Received>,
        mut record: Record,
        ticket: Arc<Ticket>,
        patterns: Option<Arc<Patterns>>,
        sought: Sought,
    ) -> Response<Body> {
        let upstream = hyper::upgrade::on(&mut response);
        let (mut parts, _) = response.into_parts();
        super::headers::strip_hop_by_hop(&mut parts.headers);
        if let Some(patterns) = &patterns {
            // A reason phrase of the server's own is text too.
            parts.extensions.remove::<ReasonPhrase>();
            super::response::clean_headers(&mut parts.headers, patterns);
        }
        if self.is_extended() {
            parts.status = StatusCode::OK;
            parts.version = Version::HTTP_2;
            parts.headers.remove(header::SEC_WEBSOCKET_ACCEPT);
            if !conn.has_room_for(&mut parts.headers) {
                return conn.deny(record, Reason::Limit, None, Some(TOO_MANY_HEADS), &HeaderMap::new());
            }
        } else {
            ask(&mut parts.headers);
        }
        record.status(parts.status.as_u16());
        let (shared, entry, slot) = (conn.shared.clone(), conn.entry.clone(), conn.slot.clone());
        conn.shared.tasks.spawn(async move {
            let counters = record.counters.clone();
            let talk = async {
                let (guest, upstream) = tokio::join!(self.guest(), upstream);
                let (guest, upstream) = (guest?, upstream.ok()?);
                let guest = Prefixed::new(Bytes::new(), guest)
                    .counted(record.counters.clone())
                    .throttled(entry.clone());
                let upstream = Prefixed::new(Bytes::new(), TokioIo::new(upstream)).throttled(entry);
                talk::both(guest, upstream, sought).await.err()
            };
            tokio::select! {
                end = talk => if let Some(end) = end {
                    tracing::debug!(%end, "a WebSocket broke off");
                    if let Some(reason) = end.reason() {
                        record.verdict(Verdict::Deny { reason });
                    }
                },
                () = ticket.revoked.cancelled() => if !ticket.is_expired() {
                    record.verdict(Verdict::Deny { reason: Reason::Revoked });
                },
                () = counters.still(shared.config.timeouts.idle) => {}
                () = shared.stop.cancelled() => {}
            }
            // The connection that was switched is the guest's still, and counts as one until here.
            drop(slot);
        });
        Response::from_parts(parts, body::full(Bytes::new()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_key_of_the_rfc_has_the_accept_of_the_rfc() {
        let key = HeaderValue::from_static("dGhlIHNhbXBsZSBub25jZQ==");
        assert_eq!(accept_of(&key), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
