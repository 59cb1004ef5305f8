//! The guest's side of HTTP/2, octet by octet: the cases of RFC 9113 and RFC 7541 by section, and requests that smuggle in
//! HTTP/2's framing. What is malformed never becomes a request at an upstream.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::Duration;
use support::{ATTACKER, OTHER, SERVER, World, world};
use tapgate_model::Mode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

// Frame types and flags (RFC 9113 §6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const PRIORITY: u8 = 2;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PUSH_PROMISE: u8 = 5;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;

// Error codes (§7).
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const REFUSED_STREAM: u32 = 7;
const COMPRESSION_ERROR: u32 = 9;
const ENHANCE_YOUR_CALM: u32 = 11;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A field as a literal without indexing, no Huffman code (RFC 7541 §6.2.2).
fn field(name: &[u8], value: &[u8]) -> Vec<u8> {
    let short = |text: &[u8]| {
        let length = u8::try_from(text.len()).unwrap();
        assert!(length < 127);
        [&[length], text].concat()
    };
    [&[0][..], &short(name), &short(value)].concat()
}

fn fields(all: &[(&str, &str)]) -> Vec<u8> {
    all.iter().flat_map(|(name, value)| field(name.as_bytes(), value.as_bytes())).collect()
}

/// `GET http://b.example/`, and more fields.
fn get(more: &[(&str, &str)]) -> Vec<u8> {
    let plain = [(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "b.example")];
    [fields(&plain), fields(more)].concat()
}

fn post(more: &[(&str, &str)]) -> Vec<u8> {
    let plain = [(":method", "POST"), (":scheme", "http"), (":path", "/"), (":authority", "b.example")];
    [fields(&plain), fields(more)].concat()
}

fn setting(id: u16, value: u32) -> Vec<u8> {
    frame(SETTINGS, 0, 0, &[&id.to_be_bytes()[..], &value.to_be_bytes()].concat())
}

#[derive(Debug)]
struct Frame {
    kind: u8,
    flags: u8,
    stream: u32,
    payload: Vec<u8>,
}

impl Frame {
    fn code(&self) -> u32 {
        let at = if self.kind == GOAWAY { 4 } else { 0 };
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

/// What has to come back.
#[derive(Clone, Copy, Debug)]
enum Expect {
    /// The connection ends, with one of these codes if it says one.
    Connection(&'static [u32]),
    /// This stream ends, or the connection does, with one of these codes.
    Stream(u32, &'static [u32]),
    /// An answer on this stream with this status.
    Answer(u32, &'static [u8]),
    /// An acknowledged PING: the connection lives.
    Lives,
}

struct Peer(TcpStream, Vec<u8>);

impl Peer {
    async fn new(w: &World) -> Self {
        let mut stream = w.connect((OTHER, 80)).await;
        stream.write_all(&[PREFACE, &frame(SETTINGS, 0, 0, b"")].concat()).await.unwrap();
        Self(stream, Vec::new())
    }

    /// The next frame; `None` at the end, however it comes.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if self.1.len() >= 9 {
                let length = u32::from_be_bytes([0, self.1[0], self.1[1], self.1[2]]) as usize;
                if self.1.len() >= 9 + length {
                    let stream = u32::from_be_bytes(self.1[5..9].try_into().unwrap()) & 0x7fff_ffff;
                    let frame = Frame {
                        kind: self.1[3],
                        flags: self.1[4],
                        stream,
                        payload: self.1[9..9 + length].to_vec(),
                    };
                    self.1.drain(..9 + length);
                    return Some(frame);
                }
            }
            match self.0.read_buf(&mut self.1).await {
                Ok(1..) => {}
                _ => return None,
            }
        }
    }

    async fn meets(&mut self, expect: Expect) -> Result<(), String> {
        let mut seen = Vec::new();
        loop {
            let next = tokio::time::timeout(Duration::from_secs(10), self.next()).await;
            let Ok(next) = next else { return Err(format!("nothing came after {seen:?}")) };
            let Some(frame) = next else {
                return match expect {
                    Expect::Connection(_) | Expect::Stream(..) => Ok(()),
                    _ => Err(format!("it ended after {seen:?}")),
                };
            };
            match (expect, frame.kind) {
                (Expect::Connection(codes) | Expect::Stream(_, codes), GOAWAY) => {
                    let right = codes.contains(&frame.code());
                    return right.then_some(()).ok_or(format!("GOAWAY {}", frame.code()));
                }
                (Expect::Stream(stream, codes), RST_STREAM) if frame.stream == stream => {
                    let right = codes.contains(&frame.code());
                    return right.then_some(()).ok_or(format!("RST_STREAM {}", frame.code()));
                }
                (Expect::Answer(stream, status), HEADERS) if frame.stream == stream => {
                    // The first field is the status: indexed for the common ones, else a literal of index 8.
                    let right = frame.payload.starts_with(status);
                    return right.then_some(()).ok_or(format!("{:x?}", frame.payload));
                }
                (Expect::Lives, PING) if frame.flags == ACK => return Ok(()),
                _ => seen.push((frame.kind, frame.flags, frame.stream, frame.payload.len())),
            }
        }
    }
}

async fn start(w: &mut World) {
    w.zone.set("b.example", &[OTHER]);
    w.serve((OTHER, 80), None).await;
    w.serve((SERVER, 80), None).await;
    w.serve((ATTACKER, 80), None).await;
    w.rules(Mode::Enforce, &["b.example"], &[]);
}

const OK: &[u8] = &[0x88];

#[test]
fn framing_and_streams_are_as_the_rfc_says() {
    use Expect::{Answer, Connection, Lives, Stream};
    let ping = frame(PING, 0, 0, b"12345678");
    let head = frame(HEADERS, END_STREAM | END_HEADERS, 1, &get(&[]));
    let open = frame(HEADERS, END_HEADERS, 1, &post(&[]));
    let cut = frame(HEADERS, END_STREAM, 1, &get(&[]));
    let update = |stream, by: u32| frame(WINDOW_UPDATE, 0, stream, &by.to_be_bytes());
    let protocol: &[u32] = &[PROTOCOL_ERROR];
    // The library says PROTOCOL_ERROR for these, which is true and less precise.
    let size: &[u32] = &[FRAME_SIZE_ERROR, PROTOCOL_ERROR];
    let compression: &[u32] = &[COMPRESSION_ERROR, PROTOCOL_ERROR];
    let flow: &[u32] = &[FLOW_CONTROL_ERROR, PROTOCOL_ERROR];
    let closed: &[u32] = &[STREAM_CLOSED, PROTOCOL_ERROR];
    let cases: Vec<(&str, Vec<u8>, Expect)> = vec![
        ("3.4 a request", head.clone(), Answer(1, OK)),
        ("4.1 an unknown frame is ignored", [frame(0x16, 0, 0, b"x"), ping.clone()].concat(), Lives),
        ("4.1 an unknown flag is ignored", frame(PING, 0x16, 0, b"12345678"), Lives),
        ("4.1 the reserved bit is ignored", frame(PING, 0, 1 << 31, b"12345678"), Lives),
        (
            "4.2 DATA over the bound",
            [open.clone(), frame(DATA, 0, 1, &[0; 16_385])].concat(),
            Stream(1, size),
        ),
        ("4.2 HEADERS over the bound", frame(HEADERS, 5, 1, &[0; 16_385]), Connection(size)),
        ("4.3 a block that does not decode", frame(HEADERS, 5, 1, &[0x40]), Connection(compression)),
        (
            "4.3 PRIORITY inside a block",
            [cut.clone(), frame(PRIORITY, 0, 1, &[0, 0, 0, 3, 1])].concat(),
            Connection(protocol),
        ),
        (
            "4.3 another stream inside a block",
            [cut.clone(), frame(HEADERS, 5, 3, &get(&[]))].concat(),
            Connection(protocol),
        ),
        ("5.1 idle: DATA", frame(DATA, END_STREAM, 1, b"x"), Connection(protocol)),
        ("5.1 idle: RST_STREAM", frame(RST_STREAM, 0, 1, &[0, 0, 0, 8]), Connection(protocol)),
        ("5.1 idle: WINDOW_UPDATE", update(1, 1), Connection(protocol)),
        ("5.1 idle: CONTINUATION", frame(CONTINUATION, END_HEADERS, 1, &get(&[])), Connection(protocol)),
        (
            "5.1 half closed: DATA",
            [head.clone(), frame(DATA, END_STREAM, 1, b"x")].concat(),
            Stream(1, closed),
        ),
        (
            "5.1 half closed: HEADERS",
            [head.clone(), frame(HEADERS, 5, 1, &get(&[]))].concat(),
            Stream(1, closed),
        ),
        ("5.1.1 an even stream", frame(HEADERS, 5, 2, &get(&[])), Connection(protocol)),
        (
            "5.1.1 a smaller stream",
            [frame(HEADERS, 5, 5, &get(&[])), frame(HEADERS, 5, 3, &get(&[]))].concat(),
            Connection(closed),
        ),
        ("6.1 DATA on 0", frame(DATA, END_STREAM, 0, b"x"), Connection(protocol)),
        (
            "6.1 more padding than payload",
            [open.clone(), frame(DATA, END_STREAM | PADDED, 1, &[9, b'x'])].concat(),
            Stream(1, protocol),
        ),
        ("6.2 HEADERS on 0", frame(HEADERS, 5, 0, &get(&[])), Connection(protocol)),
        (
            "6.2 more padding than payload",
            frame(HEADERS, 5 | PADDED, 1, &[&[255][..], &get(&[])].concat()),
            Connection(protocol),
        ),
        ("6.3 PRIORITY on 0", frame(PRIORITY, 0, 0, &[0, 0, 0, 3, 1]), Connection(protocol)),
        (
            "6.3 PRIORITY of another size",
            [open.clone(), frame(PRIORITY, 0, 1, &[0; 4])].concat(),
            Stream(1, size),
        ),
        ("6.4 RST_STREAM on 0", frame(RST_STREAM, 0, 0, &[0, 0, 0, 8]), Connection(protocol)),
        (
            "6.4 RST_STREAM of another size",
            [open.clone(), frame(RST_STREAM, 0, 1, &[0; 3])].concat(),
            Connection(size),
        ),
        ("6.5 an acknowledgement with a payload", frame(SETTINGS, ACK, 0, &[0; 6]), Connection(size)),
        ("6.5 SETTINGS on a stream", frame(SETTINGS, 0, 1, b""), Connection(protocol)),
        ("6.5 SETTINGS of another size", frame(SETTINGS, 0, 0, &[0; 3]), Connection(size)),
        ("6.5.2 ENABLE_PUSH of 2", setting(2, 2), Connection(protocol)),
        ("6.5.2 too large a window", setting(4, 1 << 31), Connection(flow)),
        ("6.5.2 too small a frame", setting(5, 16_383), Connection(protocol)),
        ("6.5.2 too large a frame", setting(5, 1 << 24), Connection(protocol)),
        ("6.5.2 an unknown setting is ignored", [setting(0xff, 1), ping.clone()].concat(), Lives),
        ("6.7 PING is answered", ping.clone(), Lives),
        ("6.7 PING on a stream", frame(PING, 0, 1, b"12345678"), Connection(protocol)),
        ("6.7 PING of another size", frame(PING, 0, 0, b"123456"), Connection(size)),
        ("6.8 GOAWAY on a stream", frame(GOAWAY, 0, 1, &[0; 8]), Connection(protocol)),
        ("6.9 an increment of 0, connection", update(0, 0), Connection(protocol)),
        ("6.9 an increment of 0, stream", [open.clone(), update(1, 0)].concat(), Stream(1, protocol)),
        ("6.9 WINDOW_UPDATE of another size", frame(WINDOW_UPDATE, 0, 0, &[0; 3]), Connection(size)),
        (
            "6.9.1 a window that overflows, connection",
            [update(0, 0x7fff_ffff), update(0, 0x7fff_ffff)].concat(),
            Connection(flow),
        ),
        (
            "6.9.1 a window that overflows, stream",
            [open.clone(), update(1, 0x7fff_ffff), update(1, 0x7fff_ffff)].concat(),
            Stream(1, flow),
        ),
        (
            "6.10 CONTINUATION after the end",
            [head.clone(), frame(CONTINUATION, END_HEADERS, 1, b"")].concat(),
            Connection(protocol),
        ),
        (
            "6.10 CONTINUATION on 0",
            [cut.clone(), frame(CONTINUATION, END_HEADERS, 0, b"")].concat(),
            Connection(protocol),
        ),
        (
            "6.10 a block in pieces",
            [
                cut.clone(),
                frame(CONTINUATION, 0, 1, b""),
                frame(CONTINUATION, END_HEADERS, 1, &fields(&[("x-a", "b")])),
            ]
            .concat(),
            Answer(1, OK),
        ),
        (
            "8.4 PUSH_PROMISE of a client",
            frame(PUSH_PROMISE, END_HEADERS, 1, &[0, 0, 0, 2]),
            Connection(protocol),
        ),
        ("7541 2.3.3 an index that is not there", frame(HEADERS, 5, 1, &[0xc8]), Connection(compression)),
        (
            "7541 4.2 a size update at the end",
            frame(HEADERS, 5, 1, &[get(&[]), vec![0x21]].concat()),
            Connection(compression),
        ),
        (
            "7541 5.2 padding that is no padding",
            frame(HEADERS, 5, 1, &[get(&[]), vec![0, 1, b'a', 0x81, 0x00]].concat()),
            Connection(compression),
        ),
        ("7541 6.1 index 0", frame(HEADERS, 5, 1, &[0x80]), Connection(compression)),
        (
            "7541 6.3 a table over the bound",
            frame(HEADERS, 5, 1, &[vec![0x3f, 0xe1, 0xff, 0x03], get(&[])].concat()),
            Connection(compression),
        ),
    ];
    world(|mut w| async move {
        start(&mut w).await;
        let mut failed = Vec::new();
        for (case, bytes, expect) in &cases {
            let mut peer = Peer::new(&w).await;
            let _ = peer.0.write_all(bytes).await;
            if let Err(why) = peer.meets(*expect).await {
                failed.push(format!("{case}: {why}"));
            }
        }
        assert!(failed.is_empty(), "{} of {}:\n{}", failed.len(), cases.len(), failed.join("\n"));
    });
}

#[test]
fn a_malformed_request_reaches_no_upstream() {
    let with = |change: &[(&str, &str)]| {
        let mut plain =
            vec![(":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "b.example")];
        for (name, value) in change {
            plain.retain(|(known, _)| known != name);
            if !value.is_empty() {
                plain.push((name, value));
            }
        }
        fields(&plain)
    };
    let raw = |name: &[u8], value: &[u8]| [get(&[]), field(name, value)].concat();
    let heads: Vec<(&str, Vec<u8>)> = vec![
        ("8.2.1 an upper-case name", get(&[("X-Up", "1")])),
        ("8.2.1 a name with a colon", raw(b"a:b", b"1")),
        ("8.2.1 a name with a space", raw(b"a b", b"1")),
        ("8.2.1 a name with CR LF", raw(b"a\r\nhost", b"evil.example")),
        ("8.2.1 an empty name", raw(b"", b"1")),
        ("8.2.1 a value with CR LF", raw(b"x", b"1\r\nHost: evil.example")),
        ("8.2.1 a value with LF", raw(b"x", b"1\nHost: evil.example")),
        ("8.2.1 a value with NUL", raw(b"x", b"1\0")),
        ("8.2.2 connection", get(&[("connection", "close")])),
        ("8.2.2 keep-alive", get(&[("keep-alive", "1")])),
        ("8.2.2 proxy-connection", get(&[("proxy-connection", "close")])),
        ("8.2.2 transfer-encoding", get(&[("transfer-encoding", "chunked")])),
        ("8.2.2 upgrade", get(&[("upgrade", "websocket")])),
        ("8.2.2 te other than trailers", get(&[("te", "trailers, deflate")])),
        ("8.3 an unknown pseudo-field", get(&[(":other", "1")])),
        ("8.3 a response's pseudo-field", get(&[(":status", "200")])),
        ("8.3 a pseudo-field after others", [fields(&[("x", "1")]), get(&[])].concat()),
        ("8.3.1 no :method", with(&[(":method", "")])),
        ("8.3.1 no :scheme", with(&[(":scheme", "")])),
        ("8.3.1 no :path", with(&[(":path", "")])),
        (
            "8.3.1 an empty :path",
            [fields(&[(":method", "GET"), (":scheme", "http"), (":path", ""), (":authority", "b.example")])]
                .concat(),
        ),
        ("8.3.1 two :method", get(&[(":method", "POST")])),
        ("8.3.1 two :path", get(&[(":path", "/2")])),
        ("8.3.1 two :scheme", get(&[(":scheme", "http")])),
        ("8.3.1 two :authority", get(&[(":authority", "evil.example")])),
        ("8.3.1 another host", get(&[("host", "evil.example")])),
        ("8.3.1 two hosts", get(&[("host", "b.example"), ("host", "b.example")])),
        ("8.3.1 userinfo", with(&[(":authority", "b.example@evil.example")])),
        (":authority with CR LF", with(&[(":authority", "b.example\r\nX: y")])),
        (":authority with a path", with(&[(":authority", "b.example/evil.example")])),
        (
            ":path with a space and a version",
            with(&[(":path", "/ HTTP/1.1\r\nHost: evil.example\r\n\r\nGET /")]),
        ),
        (":path with a bare space", with(&[(":path", "/a b")])),
        (":path with CR", with(&[(":path", "/\rx")])),
        (":path without a slash", with(&[(":path", "evil.example/")])),
        (":method with CR LF", with(&[(":method", "GET / HTTP/1.1\r\nX:")])),
        (":scheme with CR LF", with(&[(":scheme", "http\r\nx")])),
        (":scheme of the other kind", with(&[(":scheme", "https")])),
        (":scheme that is none", with(&[(":scheme", "file")])),
        ("8.5 CONNECT", fields(&[(":method", "CONNECT"), (":authority", "b.example:443")])),
        ("8.5 CONNECT with a path", with(&[(":method", "CONNECT")])),
        ("8441 :protocol without CONNECT", [get(&[]), fields(&[(":protocol", "websocket")])].concat()),
    ];
    let bodies: Vec<(&str, Vec<u8>)> = vec![
        (
            "8.1.1 a content-length that is too long",
            [frame(HEADERS, 4, 1, &post(&[("content-length", "9")])), frame(DATA, 1, 1, b"abc")].concat(),
        ),
        (
            "8.1.1 a content-length that is too short",
            [
                frame(HEADERS, 4, 1, &post(&[("content-length", "1")])),
                frame(DATA, 1, 1, b"aGET /evil HTTP/1.1\r\n\r\n"),
            ]
            .concat(),
        ),
        (
            "8.1.1 a content-length over two frames",
            [
                frame(HEADERS, 4, 1, &post(&[("content-length", "4")])),
                frame(DATA, 0, 1, b"abc"),
                frame(DATA, 1, 1, b"def"),
            ]
            .concat(),
        ),
        (
            "8.1.1 two lengths",
            [
                frame(HEADERS, 4, 1, &post(&[("content-length", "1"), ("content-length", "3")])),
                frame(DATA, 1, 1, b"abc"),
            ]
            .concat(),
        ),
        (
            "8.1.1 a length with a sign",
            [frame(HEADERS, 4, 1, &post(&[("content-length", "+3")])), frame(DATA, 1, 1, b"abc")].concat(),
        ),
        (
            "8.1 a second head",
            [frame(HEADERS, 4, 1, &post(&[])), frame(HEADERS, 4, 1, &fields(&[("x", "1")]))].concat(),
        ),
    ];
    world(|mut w| async move {
        start(&mut w).await;
        let mut failed = Vec::new();
        let heads = heads.into_iter().map(|(case, head)| (case, frame(HEADERS, 5, 1, &head), false));
        for (case, bytes, body) in heads.chain(bodies.into_iter().map(|(case, bytes)| (case, bytes, true))) {
            let mut peer = Peer::new(&w).await;
            let _ = peer.0.write_all(&bytes).await;
            // A reset, the end of the connection, or a 4xx.
            let (mut refused, mut last) = (false, None);
            while let Ok(next) = tokio::time::timeout(Duration::from_secs(10), peer.next()).await {
                refused = match &next {
                    None => true,
                    Some(frame) if [RST_STREAM, GOAWAY].contains(&frame.kind) => {
                        frame.code() == PROTOCOL_ERROR || frame.code() == COMPRESSION_ERROR
                    }
                    Some(frame) if frame.kind == HEADERS => {
                        // 400 is indexed; 403 and 421 are literals, whose Huffman code begins with that of `4`.
                        frame.payload[0] == 0x8c
                            || frame.payload[0] == 0x48 && frame.payload[2] & 0xfc == 0x68
                    }
                    Some(_) => continue,
                };
                last = next;
                break;
            }
            if !refused {
                failed.push(format!("{case}: not refused, {last:x?}"));
            }
            // A body's fault shows only after its head went on: then the upstream sees it cut short, and never whole.
            let seen = w.log.seen();
            let whole = seen.iter().any(|seen| !body || seen.body.len() >= 3 || seen.line.contains("evil"));
            if whole || seen.len() > 1 {
                failed.push(format!("{case}: the upstream saw {seen:?}"));
            }
            w.log.forget();
        }
        assert!(failed.is_empty(), "{}:\n{}", failed.len(), failed.join("\n"));
        assert!(!w.log.attacker_got("HTTP"));
    });
}

#[test]
fn a_pseudo_field_in_trailers_goes_no_further() {
    world(|mut w| async move {
        start(&mut w).await;
        // 8.1: the library drops the field where the RFC would have the stream reset.
        let trailers = frame(HEADERS, 5, 1, &fields(&[(":path", "/evil"), ("x-sum", "1")]));
        let mut peer = Peer::new(&w).await;
        peer.0.write_all(&[frame(HEADERS, 4, 1, &post(&[])), trailers].concat()).await.unwrap();
        let _ = peer.meets(Expect::Answer(1, OK)).await;
        let seen = w.log.seen();
        assert!(seen.len() == 1 && !seen[0].line.contains("evil"), "{seen:?}");
    });
}

#[test]
fn floods_cost_only_their_own_connection() {
    let open = |n: u32| frame(HEADERS, END_HEADERS, 2 * n + 1, &post(&[]));
    let ask = |n: u32| frame(HEADERS, END_STREAM | END_HEADERS, 2 * n + 1, &get(&[]));
    let floods: Vec<(&str, Vec<u8>)> = vec![
        (
            "rapid reset (CVE-2023-44487)",
            (0..5000)
                .flat_map(|n| [ask(n), frame(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8])].concat())
                .collect(),
        ),
        (
            "CONTINUATION without end",
            [
                frame(HEADERS, END_STREAM, 1, &get(&[])),
                (0..20_000).flat_map(|_| frame(CONTINUATION, 0, 1, &[0x40, 1, b'a', 1, b'b'])).collect(),
            ]
            .concat(),
        ),
        (
            "empty CONTINUATION without end",
            [
                frame(HEADERS, END_STREAM, 1, &get(&[])),
                (0..100_000).flat_map(|_| frame(CONTINUATION, 0, 1, b"")).collect(),
            ]
            .concat(),
        ),
        (
            "resets provoked by bad frames",
            [(0..5000)
                .flat_map(|n| [open(n), frame(WINDOW_UPDATE, 0, 2 * n + 1, &[0; 4])].concat())
                .collect::<Vec<_>>()]
            .concat(),
        ),
    ];
    world(move |mut w| async move {
        start(&mut w).await;
        for (case, bytes) in floods {
            let peer = Peer::new(&w).await;
            let (mut read, mut write) = peer.0.into_split();
            let all = async {
                let mut all = Vec::new();
                let _ = read.read_to_end(&mut all).await;
                all.len()
            };
            let (_, read) = tokio::join!(write.write_all(&bytes), all);
            // That it was read to its end is the point: the connection was closed.
            assert!(read < 1 << 20, "{case}");
            let mut other = Peer::new(&w).await;
            other.0.write_all(&ask(0)).await.unwrap();
            assert_eq!(other.meets(Expect::Answer(1, OK)).await, Ok(()), "after {case}");
        }
        // A thousand streams at once: as many as are allowed are served, the others refused and none kept waiting for ever.
        let mut peer = Peer::new(&w).await;
        let streams: Vec<u8> = (0..1000).flat_map(open).collect();
        peer.0.write_all(&streams).await.unwrap();
        assert_eq!(peer.meets(Expect::Stream(257, &[REFUSED_STREAM, ENHANCE_YOUR_CALM])).await, Ok(()));
        let mut other = Peer::new(&w).await;
        other.0.write_all(&ask(0)).await.unwrap();
        assert_eq!(other.meets(Expect::Answer(1, OK)).await, Ok(()));
    });
}

#[test]
fn flow_control_of_the_guest_is_kept() {
    world(|mut w| async move {
        start(&mut w).await;
        // 6.9.2: one octet at a time, as far as the guest grants it.
        let mut peer = Peer::new(&w).await;
        peer.0
            .write_all(&[setting(4, 1), frame(HEADERS, 5, 1, &get(&[("x-long", &"y".repeat(100))]))].concat())
            .await
            .unwrap();
        let mut octets = 0;
        while octets < 20 {
            let next = tokio::time::timeout(Duration::from_secs(10), peer.next()).await.unwrap().unwrap();
            if next.kind == DATA {
                assert_eq!(next.payload.len(), 1);
                octets += 1;
                peer.0.write_all(&frame(WINDOW_UPDATE, 0, 1, &1u32.to_be_bytes())).await.unwrap();
            }
        }
    });
}
