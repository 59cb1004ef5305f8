//! The first bytes of a guest's connection, read until what they are is certain, and kept for replay.
//!
//! No verdict before the whole ClientHello or request line; one deadline over all of it; a bound on size.

mod first_line;
pub(crate) mod http1;
pub(crate) mod tls;

use bytes::{Bytes, BytesMut};
use first_line::{Line, first_line};
use std::io;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _},
    time::{Duration, Instant, timeout_at},
};

/// Where reading starts; a hello with a post-quantum key share fits.
const START: usize = 4 * 1024;
/// The most that is read before a verdict: the largest handshake message that rustls takes.
pub(crate) const MOST: usize = 64 * 1024;
/// Longest first line that is still taken for the beginning of an HTTP request.
const MAX_LINE: usize = 16 * 1024;
/// What a client that knows HTTP/2 to be spoken sends first (RFC 9113 §3.4).
const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What a connection turned out to be.
#[derive(Debug)]
pub(crate) enum First {
    /// TLS, with its whole hello.
    Tls(tls::Hello),
    /// TLS whose hello is not one.
    BadHello,
    /// HTTP/1.x: the first line is whole and says so.
    Http1,
    /// HTTP/2 without TLS.
    Http2,
    /// Some server could take it for HTTP, and it is not, or not for every server.
    BadHttp,
    /// Something else.
    Other,
    /// Nothing yet: perhaps the server speaks first, perhaps the guest is slow.
    Silent,
    /// The guest closed before it said anything.
    Closed,
}

/// Whether more is needed to know.
enum Guess {
    Known(First),
    /// It can only be TLS or HTTP: worth the whole deadline.
    More(First),
    /// Nothing has come: worth a short wait.
    Silence,
}

/// Reads until it is known what is spoken. Everything read comes back too.
pub(crate) async fn peek<S: AsyncRead + Unpin>(
    stream: &mut S,
    deadline: Duration,
    server_first: Duration,
) -> io::Result<(First, Bytes)> {
    let start = Instant::now();
    let mut buffer = BytesMut::with_capacity(START);
    let mut hello = tls::HelloReader::default();
    let mut closed = false;
    loop {
        let (until, otherwise) = match guess(&buffer, &mut hello) {
            Guess::Known(first) => return Ok((first, buffer.freeze())),
            Guess::More(otherwise) if closed || buffer.len() >= MOST => {
                return Ok((otherwise, buffer.freeze()));
            }
            Guess::More(otherwise) => (start + deadline, otherwise),
            Guess::Silence if closed => return Ok((First::Closed, Bytes::new())),
            Guess::Silence => (start + server_first.min(deadline), First::Silent),
        };
        if buffer.capacity() == buffer.len() {
            buffer.reserve(buffer.len().clamp(START, MOST));
        }
        match timeout_at(until, stream.read_buf(&mut buffer)).await {
            Ok(Ok(0)) => closed = true,
            Ok(Ok(_)) => {}
            Ok(Err(error)) => return Err(error),
            Err(_elapsed) => return Ok((otherwise, buffer.freeze())),
        }
    }
}

fn guess(bytes: &[u8], hello: &mut tls::HelloReader) -> Guess {
    let Some(first) = bytes.first() else { return Guess::Silence };
    if *first == tls::HANDSHAKE {
        // SSH, Redis and the like never begin so; a record's second byte is its major version.
        if bytes.get(1).is_some_and(|major| *major != 3) {
            return Guess::Known(First::Other);
        }
        return match hello.advance(bytes) {
            Ok(Some(hello)) => Guess::Known(First::Tls(hello)),
            Ok(None) => Guess::More(First::BadHello),
            Err(_) => Guess::Known(First::BadHello),
        };
    }
    if tls::before_hello(bytes) {
        return if bytes.len() < 5 { Guess::More(First::BadHello) } else { Guess::Known(First::BadHello) };
    }
    if bytes.starts_with(HTTP2_PREFACE) {
        return Guess::Known(First::Http2);
    }
    if HTTP2_PREFACE.starts_with(bytes) {
        return Guess::More(First::BadHttp);
    }
    match first_line(&bytes[..bytes.len().min(MAX_LINE)]) {
        Line::Request => Guess::Known(First::Http1),
        Line::Malformed => Guess::Known(First::BadHttp),
        Line::Unlike => Guess::Known(First::Other),
        Line::Partial if bytes.len() >= MAX_LINE => Guess::Known(First::BadHttp),
        Line::Partial => Guess::More(First::BadHttp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn of(chunks: &[&[u8]]) -> First {
        let mut stream = tokio_test_stream(chunks);
        peek(&mut stream, Duration::from_secs(5), Duration::from_secs(5)).await.unwrap().0
    }

    /// A reader that gives the chunks one at a time, then ends.
    fn tokio_test_stream(chunks: &[&[u8]]) -> impl AsyncRead + Unpin + use<> {
        let chunks: Vec<io::Result<Bytes>> = chunks.iter().map(|c| Ok(Bytes::copy_from_slice(c))).collect();
        tokio_util::io::StreamReader::new(futures_util::stream::iter(chunks))
    }

    #[tokio::test]
    async fn protocols_are_told_apart() {
        assert!(matches!(of(&[b"GET / HTTP/1.1\r\nHost: a\r\n"]).await, First::Http1));
        assert!(matches!(of(&[b"G", b"E", b"T", b" ", b"/ HTTP/1.", b"1\r\n"]).await, First::Http1));
        assert!(matches!(of(&[b"GET http://a/ HTTP/1.0\n"]).await, First::Http1));
        assert!(matches!(of(&[b"PRI * HTTP/2.0\r\n\r\nSM", b"\r\n\r\n"]).await, First::Http2));
        assert!(matches!(of(&[b"SSH-2.0-OpenSSH_9.2\r\n"]).await, First::Other));
        assert!(matches!(of(&[b"PING\r\n"]).await, First::Other));
        assert!(matches!(of(&[b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n"]).await, First::BadHttp));
        assert!(matches!(of(&[b"\r", b"\nGET / HTTP/1.1\r\n"]).await, First::BadHttp));
        assert!(matches!(of(&[b"GET / HTTP/1.1 \r\n"]).await, First::BadHttp));
        assert!(matches!(of(&[b"\x05\x01\x00"]).await, First::Other));
        assert!(matches!(of(&[b"\0\0\0\x08\x04\xd2\x16\x2f"]).await, First::Other));
        assert!(matches!(of(&[]).await, First::Closed));
    }

    #[tokio::test]
    async fn what_begins_like_http_and_never_ends_is_refused() {
        assert!(matches!(of(&[b"GET / HTT"]).await, First::BadHttp));
        let long = [b"GET /".as_slice(), &vec![b'a'; MAX_LINE]].concat();
        assert!(matches!(of(&[&long]).await, First::BadHttp));
    }

    #[tokio::test]
    async fn a_first_flight_that_never_ends_has_one_deadline_and_one_bound() {
        for start in [&b"\x16\x03\x01\x02\x00\x01"[..], b"GET / HT", b"PRI * HT"] {
            let (mut guest, mut ours) = tokio::io::duplex(64);
            tokio::io::AsyncWriteExt::write_all(&mut guest, start).await.unwrap();
            let (first, raw) =
                peek(&mut ours, Duration::from_millis(20), Duration::from_secs(60)).await.unwrap();
            assert!(matches!(first, First::BadHello | First::BadHttp), "{first:?}");
            assert_eq!(raw, start, "what was read is kept");
        }
        // Records without end, of a hello that announces more than is read.
        let record = [&b"\x16\x03\x01\x40\x00\x01\xff\xff\xff"[..], &[0; 0x4000 - 4]].concat();
        let endless = record.repeat(40);
        let mut all = endless.as_slice();
        let (first, raw) = peek(&mut all, Duration::from_secs(60), Duration::from_secs(60)).await.unwrap();
        assert!(matches!(first, First::BadHello), "{first:?}");
        assert!(raw.len() <= 2 * MOST, "{}", raw.len());
    }

    #[tokio::test]
    async fn silence_is_told_from_everything_that_is_said() {
        let (_guest, mut ours) = tokio::io::duplex(64);
        let (first, raw) = peek(&mut ours, Duration::from_secs(60), Duration::from_millis(20)).await.unwrap();
        assert!(matches!(first, First::Silent) && raw.is_empty(), "{first:?}");
    }

    #[tokio::test]
    async fn a_broken_hello_is_refused() {
        // What some servers pass over before the hello.
        for before in [&b"\x15\x03\x01\0\x02\x01\x5a"[..], b"\x14\x03\x03\0\x01\x01", b"\x15\x03"] {
            assert!(matches!(of(&[&before[..1], &before[1..]]).await, First::BadHello), "{before:?}");
        }
        assert!(matches!(of(&[b"\x15\x03\0\0\x08\x04"]).await, First::Other));
        assert!(matches!(of(&[b"\x16\x03\x01\0\x05hello"]).await, First::BadHello));
        assert!(matches!(of(&[b"\x16\x03\x01\x02\0\x01"]).await, First::BadHello));
        assert!(matches!(of(&[b"\x16\x05"]).await, First::Other));
    }
}
