//! Streams with bytes put back in front, counted, or closed politely. Owns no decisions.

use crate::{audit::Counters, table::VmEntry, throttle::Pause};
use bytes::{Buf as _, Bytes};
use socket2::{SockRef, TcpKeepalive};
use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, atomic::Ordering},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadBuf},
    net::TcpStream,
};

/// A stream whose first bytes were read already and are read again; what passes is counted.
pub(crate) struct Prefixed<S> {
    prefix: Bytes,
    inner: S,
    counters: Option<Arc<Counters>>,
    bound: Option<Arc<VmEntry>>,
    pause: Pause,
}

impl<S> Prefixed<S> {
    /// Puts the bytes back.
    pub(crate) fn new(prefix: Bytes, inner: S) -> Self {
        Self { prefix, inner, counters: None, bound: None, pause: Pause::default() }
    }

    /// Reads no faster than the VM may move.
    pub(crate) fn throttled(mut self, entry: Arc<VmEntry>) -> Self {
        self.bound = Some(entry);
        self
    }

    /// Counts what is read as from the guest, and what is written as to it.
    pub(crate) fn counted(mut self, counters: Arc<Counters>) -> Self {
        self.counters = Some(counters);
        self
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefixed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        ready!(self.pause.poll(cx));
        let before = buf.filled().len();
        if self.prefix.is_empty() {
            ready!(Pin::new(&mut self.inner).poll_read(cx, buf))?;
        } else {
            let length = self.prefix.len().min(buf.remaining());
            buf.put_slice(&self.prefix[..length]);
            self.prefix.advance(length);
        }
        let read = buf.filled().len() - before;
        if let Some(counters) = &self.counters {
            counters.out.fetch_add(read as u64, Ordering::Relaxed);
        }
        if let Some(entry) = &self.bound {
            let pause = entry.throttle.spend(read, Instant::now());
            self.pause.begin(pause);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefixed<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let length = ready!(Pin::new(&mut self.inner).poll_write(cx, buf))?;
        if let Some(counters) = &self.counters {
            counters.r#in.fetch_add(length as u64, Ordering::Relaxed);
        }
        Poll::Ready(Ok(length))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let length = ready!(Pin::new(&mut self.inner).poll_write_vectored(cx, bufs))?;
        if let Some(counters) = &self.counters {
            counters.r#in.fetch_add(length as u64, Ordering::Relaxed);
        }
        Poll::Ready(Ok(length))
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

/// Sends small writes at once, and finds out about a peer that is gone.
pub(crate) fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let keepalive =
        TcpKeepalive::new().with_time(Duration::from_secs(120)).with_interval(Duration::from_secs(30));
    let _ = SockRef::from(stream).set_tcp_keepalive(&keepalive);
}

/// Says a last word and closes so that the other side can read it: unread input would turn the close into a reset.
pub(crate) async fn farewell<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, last: &[u8]) {
    let patience = Duration::from_secs(1);
    let _ = tokio::time::timeout(patience, async {
        stream.write_all(last).await?;
        stream.shutdown().await?;
        // Not a part of every connection's own memory.
        let mut sink = vec![0u8; 4096];
        let mut left = 64 * 1024usize;
        while left > 0 {
            match stream.read(&mut sink).await? {
                0 => break,
                length => left = left.saturating_sub(length),
            }
        }
        io::Result::Ok(())
    })
    .await;
}
