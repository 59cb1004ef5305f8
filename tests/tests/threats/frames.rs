//! HTTP/2 in raw frames (RFC 9113), as an attacker writes them: no state machine that would keep one from what is forbidden.

use std::{
    io::{self, ErrorKind, Read, Write},
    mem,
};

pub const DATA: u8 = 0;
pub const HEADERS: u8 = 1;
pub const RST_STREAM: u8 = 3;
pub const SETTINGS: u8 = 4;
pub const GOAWAY: u8 = 7;
pub const CONTINUATION: u8 = 9;
pub const END_STREAM: u8 = 1;
pub const END_HEADERS: u8 = 4;
const PING: u8 = 6;
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

pub fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals without indexing, no Huffman code (RFC 7541 §6.2.2).
pub fn fields(all: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| [&length(text.len())[..], text.as_bytes()].concat();
    all.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// A length with a prefix of seven bits (RFC 7541 §5.1).
pub fn length(length: usize) -> Vec<u8> {
    let Some(mut rest) = length.checked_sub(127) else { return vec![u8::try_from(length).unwrap()] };
    let mut bytes = vec![127];
    while rest >= 128 {
        bytes.push(u8::try_from(rest % 128).unwrap() | 128);
        rest /= 128;
    }
    bytes.push(u8::try_from(rest).unwrap());
    bytes
}

fn head(method: &str, scheme: &str, host: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    let own = [(":method", method), (":scheme", scheme), (":path", path), (":authority", host)];
    [fields(&own), fields(more)].concat()
}

/// A whole request.
pub fn get(stream: u32, scheme: &str, host: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_STREAM | END_HEADERS, stream, &head("GET", scheme, host, path, more))
}

/// The head of a request whose body follows.
pub fn post(stream: u32, scheme: &str, host: &str, path: &str, more: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, END_HEADERS, stream, &head("POST", scheme, host, path, more))
}

#[derive(Clone, Copy, Debug)]
pub struct Frame {
    pub kind: u8,
    pub flags: u8,
    pub stream: u32,
}

/// A connection, and all that came on it.
pub struct H2<S> {
    stream: io::Result<S>,
    waiting: Vec<u8>,
    all: Vec<u8>,
    ended: bool,
}

impl<S: Read + Write> H2<S> {
    /// Begins; what keeps it from that is what it receives.
    pub fn over(stream: io::Result<S>) -> Self {
        let mut peer = Self { stream, waiting: Vec::new(), all: Vec::new(), ended: false };
        peer.send(&[PREFACE, &frame(SETTINGS, 0, 0, b"")].concat());
        peer
    }

    pub fn send(&mut self, bytes: &[u8]) {
        if let Ok(stream) = &mut self.stream {
            let _ = stream.write_all(bytes).and_then(|()| stream.flush());
        }
    }

    /// The next frame; `None` at the end, however it comes.
    pub fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(head) = self.waiting.first_chunk::<9>() {
                let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
                let (kind, flags) = (head[3], head[4]);
                let stream = u32::from_be_bytes([head[5] & 127, head[6], head[7], head[8]]);
                if self.waiting.len() >= 9 + length {
                    let payload = self.waiting[9..9 + length].to_vec();
                    self.waiting.drain(..9 + length);
                    if kind == PING && flags == 0 {
                        self.send(&frame(PING, 1, 0, &payload));
                    }
                    return Some(Frame { kind, flags, stream });
                }
            }
            let mut buffer = [0; 16_384];
            let stream = self.stream.as_mut().ok()?;
            let count = match stream.read(&mut buffer) {
                Ok(count @ 1..) => count,
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    return None;
                }
                Ok(0) | Err(_) => {
                    self.ended = true;
                    return None;
                }
            };
            self.waiting.extend_from_slice(&buffer[..count]);
            self.all.extend_from_slice(&buffer[..count]);
        }
    }

    /// Reads until each of these streams has ended, or the connection has; all that came.
    pub fn answers(&mut self, streams: &[u32]) -> Vec<u8> {
        let mut open = streams.to_vec();
        while !open.is_empty() {
            let Some(frame) = self.next() else { break };
            let ends = frame.kind == RST_STREAM
                || [DATA, HEADERS].contains(&frame.kind) && frame.flags & END_STREAM != 0;
            open.retain(|stream| !(ends && *stream == frame.stream) && frame.kind != GOAWAY);
        }
        match &self.stream {
            Ok(_) => mem::take(&mut self.all),
            Err(error) => format!("no connection: {error}").into_bytes(),
        }
    }

    /// Reads until this kind of frame comes for the stream (0: for any), or until the end.
    pub fn until(&mut self, kinds: &[u8], stream: u32) -> Option<Frame> {
        loop {
            let frame = self.next()?;
            if kinds.contains(&frame.kind) && (stream == 0 || frame.stream == stream) {
                return Some(frame);
            }
        }
    }

    /// Reads until something is refused: a stream, or the connection, which may end before its GOAWAY can be read (TLS that
    /// could not write does not read on). False if all is kept open.
    pub fn refused(&mut self) -> bool {
        self.until(&[RST_STREAM, GOAWAY], 0).is_some() || self.ended
    }
}
