//! Heads that come before an answer (RFC 9110 §15.2), such as 103 (Early Hints): passed on cleaned like an answer's, whatever
//! either side speaks above HTTP/1.0. They are hints: one for which there is no room is left out.
//!
//! Must never pass on one that belongs to another request than the one under way, nor in the midst of another message.

use super::{headers::strip_hop_by_hop, response};
use crate::{secret::patterns::Patterns, table::VmEntry};
use bytes::{Buf as _, Bytes};
use http::{HeaderMap, Response, StatusCode, header};
use std::{
    collections::VecDeque,
    io,
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context, Poll, Waker, ready},
};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// For one request.
const MOST: usize = 8;
/// Longest fields of one, in octets as HTTP/1.1 writes them.
const LONGEST: usize = 16 * 1024;

#[derive(Default)]
struct Queue {
    /// The request under way that may have some, by number; 0 if there is none.
    request: u64,
    last: u64,
    heads: VecDeque<Response<()>>,
    /// Of the task that writes to the guest, while a request may have some.
    writer: Option<Waker>,
    /// Of who waits until all are written.
    waiting: Option<Waker>,
}

/// What is to be written to a guest between two messages: of a connection of HTTP/1.1, or of one stream of HTTP/2.
#[derive(Clone, Default)]
pub(super) struct Interim(Arc<Mutex<Queue>>);

impl Interim {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Passes on what comes before the answer to one request, until the turn is dropped.
    pub(super) fn pass_on(&self, patterns: Option<Arc<Patterns>>, entry: Arc<VmEntry>) -> Turn {
        let number = {
            let mut queue = self.lock();
            queue.last += 1;
            queue.request = queue.last;
            queue.last
        };
        let heard = Heard { to: self.clone(), number, seen: AtomicUsize::new(0), patterns, entry };
        Turn(Arc::new(heard))
    }

    /// Asks for the body of the request under way, which waits for that (RFC 9110 §10.1.1).
    pub(super) fn ask(&self) {
        let mut head = Response::new(());
        *head.status_mut() = StatusCode::CONTINUE;
        let request = self.lock().request;
        if request != 0 {
            self.push(request, head);
        }
    }

    fn end(&self) {
        let mut queue = self.lock();
        *queue = Queue { last: queue.last, ..Queue::default() };
    }

    fn push(&self, request: u64, head: Response<()>) {
        let mut queue = self.lock();
        if queue.request == request {
            queue.heads.push_back(head);
            if let Some(writer) = queue.writer.take() {
                writer.wake();
            }
        }
    }

    /// The next to write; the task is woken when another comes.
    pub(super) fn next(&self, cx: &Context<'_>) -> Option<Response<()>> {
        let mut queue = self.lock();
        let next = queue.heads.pop_front();
        if queue.heads.is_empty()
            && let Some(waiting) = queue.waiting.take()
        {
            waiting.wake();
        }
        if queue.request != 0 {
            queue.writer = Some(cx.waker().clone());
        }
        next
    }
}

/// The time of one request, in which its heads are passed on.
pub(super) struct Turn(Arc<Heard>);

/// Hears the heads of one request, and forgets them once its turn is over.
pub(super) struct Heard {
    to: Interim,
    number: u64,
    seen: AtomicUsize,
    patterns: Option<Arc<Patterns>>,
    entry: Arc<VmEntry>,
}

impl Turn {
    /// Where what is heard in this turn is to be said.
    pub(super) fn heard(&self) -> Arc<Heard> {
        self.0.clone()
    }

    /// Ready when all that came is on its way, so that the answer may follow.
    pub(super) async fn written(&self) {
        std::future::poll_fn(|cx| {
            let mut queue = self.0.to.lock();
            if queue.heads.is_empty() {
                return Poll::Ready(());
            }
            queue.waiting = Some(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.to.end();
    }
}

impl Heard {
    /// Passes one on, if there is room for it.
    pub(super) fn hear(&self, status: StatusCode, fields: &HeaderMap) {
        // What these say is between this side and the server.
        let ours = matches!(status, StatusCode::CONTINUE | StatusCode::SWITCHING_PROTOCOLS);
        if ours || self.seen.fetch_add(1, Ordering::Relaxed) >= MOST {
            return;
        }
        let mut head = Response::new(());
        *head.status_mut() = status;
        *head.headers_mut() = fields.clone();
        let fields = head.headers_mut();
        strip_hop_by_hop(fields);
        fields.remove(header::TE);
        fields.remove(response::ALT_SVC);
        if let Some(patterns) = &self.patterns {
            response::clean_headers(fields, patterns);
        }
        let length: usize = fields.iter().map(|(name, value)| name.as_str().len() + value.len() + 4).sum();
        if length <= LONGEST && self.entry.heads.take_head(fields) {
            self.to.push(self.number, head);
        }
    }
}

/// A head as HTTP/1.1 writes it, and what carries its share of what is not written yet.
struct Written {
    text: Vec<u8>,
    _head: Response<()>,
}

impl AsRef<[u8]> for Written {
    fn as_ref(&self) -> &[u8] {
        &self.text
    }
}

fn written(head: Response<()>) -> Bytes {
    // The reason is this side's own word: a server's is text that could hold a value.
    let mut text = format!("HTTP/1.1 {}\r\n", head.status()).into_bytes();
    for (name, value) in head.headers() {
        for part in [name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"] {
            text.extend_from_slice(part);
        }
    }
    text.extend_from_slice(b"\r\n");
    Bytes::from_owner(Written { text, _head: head })
}

/// A guest's stream that such heads are written to. The library flushes when all that it had to say is written: between two
/// messages, or before the first octet of one.
pub(super) struct WithInterim<S> {
    inner: S,
    interim: Interim,
    /// The rest of one that was begun, which goes before anything else.
    begun: Bytes,
}

impl<S> WithInterim<S> {
    pub(super) fn new(inner: S) -> (Self, Interim) {
        let interim = Interim::default();
        (Self { inner, interim: interim.clone(), begun: Bytes::new() }, interim)
    }
}

impl<S: AsyncWrite + Unpin> WithInterim<S> {
    fn poll_begun(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.begun.is_empty() {
            match ready!(Pin::new(&mut self.inner).poll_write(cx, &self.begun))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                length => self.begun.advance(length),
            }
        }
        self.begun = Bytes::new();
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for WithInterim<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_read(cx, buf)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for WithInterim<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_begun(cx))?;
        Pin::new(&mut this.inner).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        ready!(this.poll_begun(cx))?;
        Pin::new(&mut this.inner).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            ready!(this.poll_begun(cx))?;
            match this.interim.next(cx) {
                Some(head) => this.begun = written(head),
                None => return Pin::new(&mut this.inner).poll_flush(cx),
            }
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn a_head_goes_whole_between_messages_and_only_in_its_requests_turn() {
        let (inner, mut guest) = tokio::io::duplex(4);
        let (mut stream, interim) = WithInterim::new(inner);
        let read = tokio::spawn(async move {
            let mut all = String::new();
            guest.read_to_string(&mut all).await.unwrap();
            all
        });
        let hint = |text: &str| {
            let mut head = Response::builder().status(103).body(()).unwrap();
            head.headers_mut().insert("x", text.parse().unwrap());
            head
        };
        let open = |number| interim.lock().request = number;
        open(7);
        interim.push(6, hint("late"));
        stream.write_all(b"answer").await.unwrap();
        interim.push(7, hint("one"));
        // In the midst of a message it waits; after it, it is not torn.
        stream.write_all(b" whole").await.unwrap();
        let _ = std::future::poll_fn(|cx| Poll::Ready(Pin::new(&mut stream).poll_flush(cx))).await;
        stream.write_all(b"next").await.unwrap();
        interim.push(7, hint("never"));
        interim.end();
        stream.flush().await.unwrap();
        drop(stream);
        assert_eq!(read.await.unwrap(), "answer wholeHTTP/1.1 103 Early Hints\r\nx: one\r\n\r\nnext");
    }
}
