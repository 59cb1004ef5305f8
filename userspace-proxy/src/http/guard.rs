//! Stands between a guest's stream and the HTTP library: follows HTTP/1 framing and lets a request head through only
//! once it is whole and has one meaning.
//!
//! A bad head is replaced by a harmless one, and the refusal is kept for the handler to answer with; nothing that
//! follows it is read. Nor is what follows a head that asks for another protocol, until the handler grants it. Must never
//! hand the library an octet of a head that was not checked.

use crate::peek::http1::{Framing, Refused, check_head};
use bytes::{Buf as _, BytesMut};
use std::{
    io,
    mem::MaybeUninit,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, ready},
};
use tapgate_model::Reason;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// Longest head; with the library's own bound the smaller one holds.
pub(crate) const MAX_HEAD: usize = 64 * 1024;
/// Longest line in chunked framing: size and extensions. Extensions of an attacker's length carry things nowhere.
const MAX_CHUNK_LINE: usize = 256;
/// Longest trailer section.
const MAX_TRAILERS: usize = 16 * 1024;
/// Read at a time where it has to be looked at: a TLS record.
const PIECE: usize = 16 * 1024;
/// What the library reads in a bad head's stead.
const HARMLESS: &[u8] = b"GET / HTTP/1.1\r\nHost: refused.invalid\r\nConnection: close\r\n\r\n";

/// Which request was refused for its head or for the framing of its body, counted from 0, and why.
#[derive(Clone, Default)]
pub struct Refusal(Arc<Mutex<Option<(u64, Refused)>>>);

impl Refusal {
    fn set(&self, number: u64, why: Refused) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some((number, why));
    }

    /// Why this request was refused, if it was.
    pub fn of(&self, number: u64) -> Option<Refused> {
        let refusal = *self.0.lock().unwrap_or_else(PoisonError::into_inner);
        refusal.filter(|(refused, _)| *refused == number).map(|(_, why)| why)
    }
}

/// Whether the guest may speak the other protocol that it asked for.
#[derive(Clone, Default)]
pub struct Switch(Arc<AtomicBool>);

impl Switch {
    /// From here on, the stream is let through as it is, if a head asked for that.
    pub fn grant(&self) {
        self.0.store(true, Ordering::Release);
    }

    fn is_granted(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }
}

#[derive(Clone, Copy, Debug)]
enum Part {
    /// Gathering a head; so many octets were searched for its end.
    Head(usize),
    /// So many octets of a body are left.
    Body(u64),
    /// At a chunk's size line.
    ChunkSize,
    /// So many octets of a chunk are left, its CR LF not counted.
    Chunk(u64),
    /// At the CR LF after a chunk.
    ChunkEnd,
    /// In the trailers: so many octets have passed.
    Trailers(usize),
    /// After a head that asks for another protocol: the library sees the end unless it is granted.
    Asked,
    /// Another protocol from here on.
    Tunnel,
    /// Refused, or broken beyond an answer: the library sees the end.
    End,
}

/// A guest's stream, guarded.
pub struct GuardedIo<S> {
    inner: S,
    /// Read from the guest. Holds no memory while the guest is silent.
    raw: BytesMut,
    /// So many octets of it were looked at and let through.
    passed: usize,
    part: Part,
    heads: u64,
    refusal: Refusal,
    switch: Switch,
    eof: bool,
}

impl<S> GuardedIo<S> {
    /// Guards the stream from its first request on.
    pub fn new(inner: S) -> Self {
        Self {
            inner,
            raw: BytesMut::new(),
            passed: 0,
            part: Part::Head(0),
            heads: 0,
            refusal: Refusal::default(),
            switch: Switch::default(),
            eof: false,
        }
    }

    /// Where a refusal is kept.
    pub fn refusal(&self) -> Refusal {
        self.refusal.clone()
    }

    /// Where another protocol is granted.
    pub fn switch(&self) -> Switch {
        self.switch.clone()
    }

    fn refuse(&mut self, why: Refused) {
        self.refusal.set(self.heads, why);
        self.heads += 1;
        self.broken();
        self.raw.extend_from_slice(HARMLESS);
        self.passed = self.raw.len();
    }

    /// What is still to be looked at.
    fn fresh(&self) -> &[u8] {
        &self.raw[self.passed..]
    }

    /// Moves the next `length` octets through.
    fn pass(&mut self, length: usize) {
        self.passed += length;
    }

    /// The length of the next line, its CR LF included.
    fn line(&self, most: usize) -> Result<Option<usize>, ()> {
        let fresh = self.fresh();
        match fresh.iter().position(|b| *b == b'\n') {
            Some(0) => Err(()),
            Some(end) if end > most || fresh[end - 1] != b'\r' => Err(()),
            Some(end) => Ok(Some(end + 1)),
            None if fresh.len() > most => Err(()),
            None => Ok(None),
        }
    }

    /// Takes one step; false if more input is needed first.
    fn step(&mut self) -> bool {
        let fresh = self.fresh();
        if fresh.is_empty() {
            return false;
        }
        match self.part {
            Part::Head(searched) => return self.head(searched),
            Part::Body(_) | Part::Chunk(_) | Part::Tunnel => {
                let length = fresh.len();
                let length = self.left().map_or(length, |left| length.min(left));
                self.pass(length);
                self.used(length);
            }
            Part::ChunkEnd => match fresh {
                b"\r" => return false,
                _ if fresh.starts_with(b"\r\n") => {
                    self.pass(2);
                    self.part = Part::ChunkSize;
                }
                _ => self.broken_body(),
            },
            Part::ChunkSize => match self.line(MAX_CHUNK_LINE) {
                Ok(None) => return false,
                Ok(Some(length)) => match chunk_size(&fresh[..length - 2]) {
                    Some(size) => {
                        self.pass(length);
                        self.part = if size == 0 { Part::Trailers(0) } else { Part::Chunk(size) };
                    }
                    None => self.broken_body(),
                },
                Err(()) => self.broken_body(),
            },
            Part::Trailers(passed) => match self.line(MAX_TRAILERS.saturating_sub(passed)) {
                Ok(None) => return false,
                Ok(Some(length)) if length > 2 && matches!(fresh[0], b' ' | b'\t') => self.broken_body(),
                Ok(Some(length)) => {
                    self.pass(length);
                    self.part = if length == 2 { Part::Head(0) } else { Part::Trailers(passed + length) };
                }
                Err(()) => self.broken_body(),
            },
            Part::Asked | Part::End => self.broken(),
        }
        true
    }

    /// How much of what comes next is content, which needs no look; none means all.
    fn left(&self) -> Option<usize> {
        match self.part {
            Part::Body(left) | Part::Chunk(left) => Some(usize::try_from(left).unwrap_or(usize::MAX)),
            Part::Tunnel => None,
            _ => Some(0),
        }
    }

    /// Counts content that has passed.
    fn used(&mut self, length: usize) {
        self.part = match self.part {
            Part::Body(left) if left == length as u64 => Part::Head(0),
            Part::Body(left) => Part::Body(left - length as u64),
            Part::Chunk(left) if left == length as u64 => Part::ChunkEnd,
            Part::Chunk(left) => Part::Chunk(left - length as u64),
            part => part,
        };
    }

    /// Framing inside a body is wrong: the library sees the body cut short, and fails the request.
    fn broken_body(&mut self) {
        let why = (Reason::BadRequest, "the framing of the request's body is wrong");
        self.refusal.set(self.heads.saturating_sub(1), why);
        self.broken();
    }

    /// Nothing more is read.
    fn broken(&mut self) {
        self.raw.truncate(self.passed);
        self.part = Part::End;
    }

    fn head(&mut self, searched: usize) -> bool {
        let fresh = self.fresh();
        let from = searched.saturating_sub(3);
        let end = fresh[from..].windows(4).position(|window| window == b"\r\n\r\n").map(|at| from + at + 4);
        match end {
            Some(end) if end <= MAX_HEAD => match check_head(&fresh[..end]) {
                Ok(head) => {
                    self.part = match (head.upgrade, head.framing) {
                        (true, Framing::Length(0)) => Part::Asked,
                        (true, _) => {
                            self.refuse((Reason::BadRequest, "an Upgrade with a body"));
                            return true;
                        }
                        (_, Framing::Length(0)) => Part::Head(0),
                        (_, Framing::Length(length)) => Part::Body(length),
                        (_, Framing::Chunked) => Part::ChunkSize,
                    };
                    self.pass(end);
                    self.heads += 1;
                }
                Err(why) => self.refuse(why),
            },
            None if fresh.len() < MAX_HEAD => {
                // A bare LF or a NUL never becomes a good head; waiting for its end would only take time.
                let odd = |at: usize, b: u8| b == 0 || b == b'\n' && (at == 0 || fresh[at - 1] != b'\r');
                if fresh[searched..].iter().enumerate().any(|(at, b)| odd(searched + at, *b)) {
                    self.refuse((Reason::BadRequest, "a line that does not end in CR LF"));
                    return true;
                }
                self.part = Part::Head(fresh.len());
                return false;
            }
            _ => self.refuse((Reason::BadRequest, "the request head is longer than 64 KiB")),
        }
        true
    }
}

/// A chunk's size: hexadecimal digits, then nothing or extensions (RFC 9112 §7.1.1), which mean nothing to anyone.
fn chunk_size(line: &[u8]) -> Option<u64> {
    let digits = line.split(|b| *b == b';').next().unwrap_or_default();
    let plain = !digits.is_empty() && digits.len() <= 15 && digits.iter().all(u8::is_ascii_hexdigit);
    let clean = line.iter().all(|b| !b.is_ascii_control() || *b == b'\t');
    if !(plain && clean) {
        return None;
    }
    u64::from_str_radix(std::str::from_utf8(digits).ok()?, 16).ok()
}

impl<S: AsyncRead + Unpin> GuardedIo<S> {
    /// Reads content to where it is wanted, past the buffer.
    fn poll_content(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        most: usize,
    ) -> Poll<io::Result<()>> {
        let mut into = ReadBuf::new(buf.initialize_unfilled_to(most));
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut into))?;
        let length = into.filled().len();
        buf.advance(length);
        self.eof = length == 0;
        self.used(length);
        Poll::Ready(Ok(()))
    }

    /// Reads what has to be looked at.
    fn poll_more(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut piece = [const { MaybeUninit::<u8>::uninit() }; PIECE];
        let mut piece = ReadBuf::uninit(&mut piece);
        ready!(Pin::new(&mut self.inner).poll_read(cx, &mut piece))?;
        self.eof = piece.filled().is_empty();
        self.raw.extend_from_slice(piece.filled());
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for GuardedIo<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        loop {
            if this.passed > 0 {
                let length = this.passed.min(buf.remaining());
                buf.put_slice(&this.raw[..length]);
                this.raw.advance(length);
                this.passed -= length;
                if this.raw.is_empty() {
                    this.raw = BytesMut::new();
                }
                return Poll::Ready(Ok(()));
            }
            if matches!(this.part, Part::Asked) && this.switch.is_granted() {
                this.part = Part::Tunnel;
            }
            if matches!(this.part, Part::Asked | Part::End) || this.eof && this.raw.is_empty() {
                return Poll::Ready(Ok(()));
            }
            if this.step() {
                continue;
            }
            if this.eof {
                // A head or a chunk line that was never finished.
                return Poll::Ready(Ok(()));
            }
            let most = this.left().map_or(buf.remaining(), |left| left.min(buf.remaining()));
            if most > 0 {
                return this.poll_content(cx, buf, most);
            }
            ready!(this.poll_more(cx))?;
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for GuardedIo<S> {
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
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::AsyncReadExt as _;

    async fn through(input: &[u8], size: usize) -> (Vec<u8>, Refusal) {
        let chunks: Vec<io::Result<bytes::Bytes>> =
            input.chunks(size).map(|chunk| Ok(bytes::Bytes::copy_from_slice(chunk))).collect();
        let stream = tokio_util::io::StreamReader::new(futures_util::stream::iter(chunks));
        let mut guarded = GuardedIo::new(stream);
        let refusal = guarded.refusal();
        let mut all = Vec::new();
        guarded.read_to_end(&mut all).await.unwrap();
        (all, refusal)
    }

    #[tokio::test]
    async fn good_requests_pass_as_they_are_however_split() {
        let input = b"POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello\
            POST /b HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=y\r\nGET /\r\n0\r\nT: u\r\n\r\n\
            GET /c HTTP/1.1\r\nHost: a\r\n\r\n";
        for size in [1, 2, 3, 7, 64, 4096] {
            let (all, refusal) = through(input, size).await;
            assert_eq!(String::from_utf8_lossy(&all), String::from_utf8_lossy(input), "{size}");
            assert!((0..5).all(|n| refusal.of(n).is_none()));
        }
    }

    #[tokio::test]
    async fn a_bad_head_never_reaches_the_library() {
        let good = b"GET /a HTTP/1.1\r\nHost: a\r\n\r\n";
        let bad = b"POST /b HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /evil HTTP/1.1\r\n\r\n";
        for size in [1, 5, 4096] {
            let (all, refusal) = through(&[good.as_slice(), bad].concat(), size).await;
            assert_eq!(all, [good.as_slice(), HARMLESS].concat());
            assert!(refusal.of(0).is_none());
            assert_eq!(refusal.of(1).unwrap().0, Reason::BadRequest);
        }
    }

    #[tokio::test]
    async fn chunks_that_two_parsers_could_read_differently_end_the_stream() {
        let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
        let long = format!("5;{}\r\nhello\r\n0\r\n\r\n", "x".repeat(300));
        for body in [
            "5\nhello\r\n0\r\n\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
            "5 \r\nhello\r\n0\r\n\r\n",
            "\r\n",
            "-1\r\n",
            "5\r\nhelloX\r\n0\r\n\r\n",
            "fffffffffffffffff\r\n",
            "5;a\rb\r\nhello\r\n0\r\n\r\n",
            &long,
        ] {
            let (all, _) = through([head, body].concat().as_bytes(), 4096).await;
            assert!(!all.ends_with(b"0\r\n\r\n"), "{body:?}");
        }
    }

    #[tokio::test]
    async fn what_follows_an_upgrade_waits_for_the_grant() {
        let head = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
        let input = [head.as_slice(), b"GET /x HTTP/1.1\r\n\r\n"].concat();
        let mut guarded = GuardedIo::new(input.as_slice());
        let mut all = Vec::new();
        guarded.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, head);
        guarded.switch().grant();
        guarded.read_to_end(&mut all).await.unwrap();
        assert_eq!(all, input);
    }

    #[tokio::test]
    async fn heads_are_bounded() {
        let endless = [b"GET / HTTP/1.1\r\nHost: a\r\nX: ".as_slice(), &vec![b'a'; 2 * MAX_HEAD]].concat();
        let (all, refusal) = through(&endless, 4096).await;
        assert_eq!(all, HARMLESS);
        assert!(refusal.of(0).is_some());
    }
}
