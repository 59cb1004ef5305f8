//! A stream whose every octet is written down as it comes: what hosts of an attacker see, whatever they make of it. Each
//! octet stands as one character (U+0000 to U+00FF), so that nothing is lost to a decoding.

use super::{Ends, Shared};
use serde_json::json;
use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// The stream.
pub(super) struct Tapped<S> {
    stream: S,
    shared: Shared,
    ends: Ends,
    layer: &'static str,
}

impl<S> Tapped<S> {
    /// Writes down what comes from this stream; `layer` says what was taken off before (`wire`: nothing, `tls`).
    pub(super) fn new(stream: S, shared: Shared, ends: Ends, layer: &'static str) -> Self {
        Self { stream, shared, ends, layer }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Tapped<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        let came = &buf.filled()[before..];
        if !came.is_empty() {
            let octets: String = came.iter().map(|octet| char::from(*octet)).collect();
            self.shared.journal.note(&json!({
                "kind": "octets", "site": self.ends.site.name, "local": self.ends.local, "peer": self.ends.peer,
                "layer": self.layer, "octets": octets,
            }));
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tapped<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}
