//! What was handed over to be written on a connection and is not written yet. The library copies heads into a buffer that grows
//! by any number of them, and gives back their shares with the copy: so they are handed over a few at a time, and each keeps its
//! share until it is written. Content needs no such care: its buffer is flushed piece by piece.
//!
//! Must never let trailers wait for requests: a request may wait for the end of another, and that for its trailers.

use http::{HeaderMap, HeaderValue};
use std::{
    io, mem,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{OwnedSemaphorePermit, Semaphore},
};

/// Heads handed over at one time, and trailers, in octets. What is longer goes alone.
const MOST: usize = 64 * 1024;
/// What finds room in the library's buffer without making it larger.
const SMALL: usize = 256;
/// What a field takes besides its text, in octets.
const FIELD: usize = 4;

/// A value that carries a share, and its place among what was handed over.
type Held = (HeaderValue, OwnedSemaphorePermit);

#[derive(Default)]
struct Copied(Mutex<Vec<Held>>);

impl Copied {
    fn lock(&self) -> MutexGuard<'_, Vec<Held>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Of one connection.
#[derive(Clone)]
pub(super) struct Outbox {
    heads: Arc<Semaphore>,
    trailers: Arc<Semaphore>,
    /// What the library has copied, or dropped, since all was written.
    copied: Arc<Copied>,
}

/// In place of a head's longest value: its end is that of the library's interest in the head.
struct Carried {
    held: Option<Held>,
    copied: Arc<Copied>,
}

impl AsRef<[u8]> for Carried {
    fn as_ref(&self) -> &[u8] {
        self.held.as_ref().map_or(b"", |(value, _)| value.as_bytes())
    }
}

impl Drop for Carried {
    fn drop(&mut self) {
        self.copied.lock().extend(self.held.take());
    }
}

impl Outbox {
    pub(super) fn new() -> Self {
        let room = || Arc::new(Semaphore::new(MOST));
        Self { heads: room(), trailers: room(), copied: Arc::default() }
    }

    /// The stream, which says when all is written.
    pub(super) fn of<S>(&self, inner: S) -> Watched<S> {
        Watched { inner, copied: self.copied.clone() }
    }

    /// The head, once there is room for it; so much stands beside its fields. `None` if the connection has ended.
    pub(super) async fn head(&self, fields: &mut HeaderMap, besides: usize) -> Option<()> {
        self.admit(&self.heads, fields, besides).await
    }

    /// The trailers, once there is room for them.
    pub(super) async fn trailers(self, mut fields: HeaderMap) -> Option<HeaderMap> {
        self.admit(&self.trailers, &mut fields, 0).await.map(|()| fields)
    }

    async fn admit(&self, room: &Arc<Semaphore>, fields: &mut HeaderMap, besides: usize) -> Option<()> {
        let each = fields.iter().map(|(name, value)| name.as_str().len() + value.len() + FIELD);
        let octets = each.fold(besides, usize::saturating_add);
        if octets <= SMALL {
            return Some(());
        }
        let octets = u32::try_from(octets.min(MOST)).ok()?;
        let permit = room.clone().acquire_many_owned(octets).await.ok()?;
        let longest = fields.values_mut().max_by_key(|value| value.len())?;
        let sensitive = longest.is_sensitive();
        let held = Some((mem::replace(longest, HeaderValue::from_static("")), permit));
        let carried = bytes::Bytes::from_owner(Carried { held, copied: self.copied.clone() });
        *longest = HeaderValue::from_maybe_shared(carried).ok()?;
        longest.set_sensitive(sensitive);
        Some(())
    }

    /// Nothing waits for a connection that has ended.
    pub(super) fn close(&self) {
        self.heads.close();
        self.trailers.close();
    }
}

/// A connection's stream. The library flushes it when all that it was handed is written.
pub(super) struct Watched<S> {
    inner: S,
    copied: Arc<Copied>,
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let written = mem::take(&mut *self.copied.lock());
        drop(written);
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
