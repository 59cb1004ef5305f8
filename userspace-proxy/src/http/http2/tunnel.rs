//! A stream that carries another protocol's octets (RFC 8441): read and written like a connection, within its windows.

use super::{ping::Open, pipe::poll_room};
use bytes::{Buf as _, Bytes};
use h2::{Reason, RecvStream, SendStream};
use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::oneshot,
};

/// Both directions of one stream, polled by one task. Dropped before both have ended, it resets the stream.
pub(crate) struct Tunnel {
    from: RecvStream,
    to: SendStream<Bytes>,
    /// What was taken and is not read yet.
    rest: Bytes,
    ended: bool,
    open: Open,
}

impl Tunnel {
    pub(super) fn new(from: RecvStream, to: SendStream<Bytes>, open: Open) -> Self {
        Self { from, to, rest: Bytes::new(), ended: false, open }
    }
}

/// Goes with a request that may become a tunnel: kept once it was granted, and never if it was not.
#[derive(Clone)]
pub(crate) struct Promise(Arc<Mutex<Option<oneshot::Receiver<Tunnel>>>>);

impl Promise {
    pub(super) fn new() -> (oneshot::Sender<Tunnel>, Self) {
        let (keep, promised) = oneshot::channel();
        (keep, Self(Arc::new(Mutex::new(Some(promised)))))
    }

    /// Waits for it; `None` if it is not granted, or was given to another.
    pub(crate) async fn kept(self) -> Option<Tunnel> {
        let promised = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        promised?.await.ok()
    }
}

impl AsyncRead for Tunnel {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.rest.is_empty() {
            match ready!(self.from.poll_data(cx)) {
                Some(Ok(data)) => {
                    self.open.note();
                    self.rest = data;
                }
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) => {
                    return Poll::Ready(match error.reason() {
                        Some(Reason::NO_ERROR | Reason::CANCEL) => Ok(()),
                        _ => Err(io::Error::other(error)),
                    });
                }
            }
        }
        let length = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest[..length]);
        self.rest.advance(length);
        // It fails for a stream that is gone, which needs no window.
        let _ = self.from.flow_control().release_capacity(length);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tunnel {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        if buf.is_empty() {
            return Poll::Ready(Ok(0));
        }
        if let Poll::Ready(reason) = self.to.poll_reset(cx).map_err(io::Error::other)? {
            return Poll::Ready(Err(io::Error::other(h2::Error::from(reason))));
        }
        let room = ready!(poll_room(&mut self.to, buf.len(), cx)).map_err(io::Error::other)?;
        let sent = self.to.send_data(Bytes::copy_from_slice(&buf[..room]), false);
        Poll::Ready(sent.map(|()| room).map_err(io::Error::other))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.ended {
            return Poll::Ready(Ok(()));
        }
        self.ended = true;
        Poll::Ready(self.to.send_data(Bytes::new(), true).map_err(io::Error::other))
    }
}
