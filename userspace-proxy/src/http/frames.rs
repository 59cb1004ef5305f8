//! WebSocket's frames (RFC 6455 §5) from a server to a guest, cleaned of real values on their way.
//!
//! A message keeps its borders; a frame may become several, as an intermediary's may where no extension was agreed on (§5.4).
//! Must never gather a message, nor give out what is no frame: behind it nothing could be told from anything.

use crate::secret::{clean::Cleaner, patterns::Patterns};
use std::sync::Arc;

/// Longest payload of a control frame (§5.5).
const MOST_OF_CONTROL: usize = 125;
/// What a close frame begins with: its status code.
const CODE: usize = 2;
/// Longest head of a frame that is not masked.
const MOST_OF_HEAD: usize = 10;

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const OPCODE: u8 = 0x0f;
const MASKED: u8 = 0x80;
const CONTINUATION: u8 = 0;
const TEXT: u8 = 1;
const BINARY: u8 = 2;
const CLOSE: u8 = 8;
const PONG: u8 = 10;

/// What a server may not send.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoFrame {
    /// Only clients mask.
    #[error("a masked frame")]
    Masked,
    /// No extension was agreed on that would give it a meaning.
    #[error("a reserved bit or opcode")]
    Reserved,
    /// A message inside another, or the rest of none.
    #[error("a frame out of its turn")]
    Turn,
    /// A control frame of more than 125 octets or in parts.
    #[error("a control frame that is too long or in parts")]
    Control,
    /// One that says that it has more than 2⁶³ octets.
    #[error("a length beyond 2^63")]
    Length,
}

/// The frame that is being read.
enum At {
    /// Its head, as far as it is there.
    Head(Vec<u8>),
    /// Its payload, of which so much is to come.
    Data { left: u64, last: bool },
    /// The payload of a control frame, as far as it is there.
    Control { first: u8, payload: Vec<u8>, length: usize },
}

/// Reads frames as their octets come in.
pub(super) struct Frames {
    patterns: Arc<Patterns>,
    at: At,
    /// The message that is under way.
    message: Option<Message>,
}

struct Message {
    cleaner: Cleaner,
    /// The opcode of the next frame that the guest gets of it.
    opcode: u8,
}

impl Frames {
    pub(super) fn new(patterns: Arc<Patterns>) -> Self {
        Self { patterns, at: At::Head(Vec::with_capacity(MOST_OF_HEAD)), message: None }
    }

    /// Looks for these from here on, in what is held too.
    pub(super) fn look_for(&mut self, patterns: Arc<Patterns>) {
        if let Some(message) = &mut self.message {
            message.cleaner.look_for(patterns.clone());
        }
        self.patterns = patterns;
    }

    /// Takes the next octets, and adds what the guest gets of them.
    pub(super) fn feed(&mut self, mut octets: &[u8], out: &mut Vec<u8>) -> Result<(), NoFrame> {
        loop {
            match &mut self.at {
                At::Head(head) => {
                    let [octet, rest @ ..] = octets else { return Ok(()) };
                    octets = rest;
                    head.push(*octet);
                    let Some((first, length)) = read_head(head)? else { continue };
                    self.begin(first, length)?;
                }
                At::Data { left, last } => {
                    let now = usize::try_from(*left).unwrap_or(usize::MAX).min(octets.len());
                    if now == 0 && *left > 0 {
                        return Ok(());
                    }
                    let (part, rest) = octets.split_at(now);
                    octets = rest;
                    *left -= part.len() as u64;
                    let (whole, last) = (*left == 0, *last);
                    self.message(part, whole && last, out)?;
                    if whole {
                        self.at = At::Head(Vec::with_capacity(MOST_OF_HEAD));
                    }
                }
                At::Control { first, payload, length } => {
                    let now = (*length - payload.len()).min(octets.len());
                    if now == 0 && *length > payload.len() {
                        return Ok(());
                    }
                    let (part, rest) = octets.split_at(now);
                    octets = rest;
                    payload.extend_from_slice(part);
                    if payload.len() == *length {
                        control(*first, payload, &self.patterns, out);
                        self.at = At::Head(Vec::with_capacity(MOST_OF_HEAD));
                    }
                }
            }
        }
    }

    fn begin(&mut self, first: u8, length: u64) -> Result<(), NoFrame> {
        let (opcode, last) = (first & OPCODE, first & FIN != 0);
        if opcode >= CLOSE {
            let length = usize::try_from(length).ok().filter(|length| *length <= MOST_OF_CONTROL && last);
            let length = length.ok_or(NoFrame::Control)?;
            self.at = At::Control { first, payload: Vec::with_capacity(length), length };
            return Ok(());
        }
        match (opcode, &self.message) {
            (CONTINUATION, Some(_)) => {}
            (TEXT | BINARY, None) => {
                self.message = Some(Message { cleaner: Cleaner::new(self.patterns.clone()), opcode });
            }
            _ => return Err(NoFrame::Turn),
        }
        self.at = At::Data { left: length, last };
        Ok(())
    }

    /// The next part of the message that is under way. Its end is not kept waiting for: no client has it before it is whole.
    fn message(&mut self, part: &[u8], end: bool, out: &mut Vec<u8>) -> Result<(), NoFrame> {
        let message = self.message.as_mut().ok_or(NoFrame::Turn)?;
        let mut clean = message.cleaner.feed(part);
        if end {
            clean.extend(message.cleaner.finish());
        } else if clean.is_empty() {
            return Ok(());
        }
        write(if end { message.opcode | FIN } else { message.opcode }, &clean, out);
        message.opcode = CONTINUATION;
        if end {
            self.message = None;
        }
        Ok(())
    }
}

/// First octet and length, once the head is whole.
fn read_head(head: &[u8]) -> Result<Option<(u8, u64)>, NoFrame> {
    let [first, rest @ ..] = head else { return Ok(None) };
    let known = [CONTINUATION, TEXT, BINARY].contains(&(first & OPCODE))
        || (CLOSE..=PONG).contains(&(first & OPCODE));
    if first & RESERVED != 0 || !known {
        return Err(NoFrame::Reserved);
    }
    let [second, rest @ ..] = rest else { return Ok(None) };
    if second & MASKED != 0 {
        return Err(NoFrame::Masked);
    }
    let length = match (second, rest) {
        (126, [high, low]) => u64::from(u16::from_be_bytes([*high, *low])),
        (127, rest) => match rest.first_chunk::<8>() {
            Some(length) => u64::from_be_bytes(*length),
            None => return Ok(None),
        },
        (126, _) => return Ok(None),
        (short, _) => u64::from(*short),
    };
    if length > i64::MAX.unsigned_abs() { Err(NoFrame::Length) } else { Ok(Some((*first, length))) }
}

/// A control frame is short and whole. One that would be too long with a placeholder in it says nothing instead.
fn control(first: u8, payload: &[u8], patterns: &Patterns, out: &mut Vec<u8>) {
    let Some(clean) = patterns.clean_whole(payload) else { return write(first, payload, out) };
    let nothing = if first & OPCODE == CLOSE { CODE.min(payload.len()) } else { 0 };
    let fits = clean.len() <= MOST_OF_CONTROL;
    write(first, if fits { &clean } else { payload.get(..nothing).unwrap_or_default() }, out);
}

fn write(first: u8, payload: &[u8], out: &mut Vec<u8>) {
    out.push(first);
    match (u8::try_from(payload.len()), u16::try_from(payload.len())) {
        (Ok(short @ 0..=125), _) => out.push(short),
        (_, Ok(length)) => {
            out.push(126);
            out.extend(length.to_be_bytes());
        }
        _ => {
            out.push(127);
            out.extend((payload.len() as u64).to_be_bytes());
        }
    }
    out.extend_from_slice(payload);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::substitute::tests::policy;

    const VALUE: &str = "ghp_value-of-a-token";

    fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        write(first, payload, &mut out);
        out
    }

    fn frames() -> Frames {
        let policy = policy(&[("a", VALUE, &["*"])]);
        Frames::new(Patterns::new(policy.secrets.iter()).unwrap().unwrap())
    }

    /// What a client makes of it: messages and control frames, in turn.
    fn read(mut octets: &[u8]) -> Vec<(u8, String)> {
        let (mut all, mut message) = (Vec::new(), None::<(u8, Vec<u8>)>);
        while !octets.is_empty() {
            let head = (1..).find_map(|end| read_head(&octets[..end]).unwrap().map(|head| (end, head)));
            let (end, (first, length)) = head.unwrap();
            let (payload, rest) = octets[end..].split_at(usize::try_from(length).unwrap());
            octets = rest;
            let text = |octets: &[u8]| String::from_utf8(octets.to_vec()).unwrap();
            match first & OPCODE {
                CONTINUATION => message.as_mut().unwrap().1.extend_from_slice(payload),
                TEXT | BINARY => assert!(message.replace((first & OPCODE, payload.to_vec())).is_none()),
                opcode => {
                    assert!(length <= 125);
                    all.push((opcode, text(payload)));
                    continue;
                }
            }
            if first & FIN != 0 {
                let (opcode, payload) = message.take().unwrap();
                all.push((opcode, text(&payload)));
            }
        }
        assert!(message.is_none());
        all
    }

    #[test]
    fn values_in_frames_are_found_across_every_border() {
        let long = format!("{}{VALUE}{}", "x".repeat(70_000), "y".repeat(300));
        let sent = [
            frame(TEXT, b"a ghp_val"),
            frame(9 | FIN, format!("ping {VALUE}").as_bytes()),
            frame(CONTINUATION, b""),
            frame(CONTINUATION | FIN, b"ue-of-a-token b"),
            frame(BINARY | FIN, long.as_bytes()),
            frame(TEXT | FIN, b""),
            frame(CLOSE | FIN, format!("  {VALUE}").as_bytes()),
        ]
        .concat();
        let wanted = [
            (9, "ping IRONSH_PROXY_a".to_owned()),
            (TEXT, "a IRONSH_PROXY_a b".into()),
            (BINARY, long.replace(VALUE, "IRONSH_PROXY_a")),
            (TEXT, String::new()),
            (CLOSE, "  IRONSH_PROXY_a".into()),
        ];
        for size in [1, 2, 3, 7, 20, 1000, 16_384, sent.len()] {
            let (mut frames, mut out) = (frames(), Vec::new());
            sent.chunks(size).for_each(|chunk| frames.feed(chunk, &mut out).unwrap());
            assert_eq!(read(&out), wanted, "{size}");
        }
    }

    #[test]
    fn what_holds_no_value_stays_as_it_is() {
        let sent = [
            frame(TEXT | FIN, b"hello"),
            frame(PONG | FIN, b""),
            frame(BINARY, &[7; 126]),
            frame(FIN, &[0; 65_536]),
        ];
        let mut out = Vec::new();
        frames().feed(&sent.concat(), &mut out).unwrap();
        assert_eq!(out, sent.concat());
    }

    #[test]
    fn a_control_frame_that_grows_too_long_says_nothing() {
        let policy = policy(&[("a-secret-with-a-long-name-indeed", "abcd", &["*"])]);
        let patterns = Patterns::new(policy.secrets.iter()).unwrap().unwrap();
        let mut out = Vec::new();
        Frames::new(patterns)
            .feed(&frame(CLOSE | FIN, &[b"\x03\xe8".as_slice(), &b"abcd ".repeat(20)].concat()), &mut out)
            .unwrap();
        assert_eq!(out, [CLOSE | FIN, 2, 3, 0xe8]);
    }

    #[test]
    fn what_is_no_frame_of_a_server_ends_it() {
        for (octets, why) in [
            (&b"\x81\x84"[..], NoFrame::Masked),
            (b"\xc1", NoFrame::Reserved),
            (b"\x83", NoFrame::Reserved),
            (b"\x8b", NoFrame::Reserved),
            (b"\x80\x01", NoFrame::Turn),
            (b"\x01\x01a\x01\x01", NoFrame::Turn),
            (b"\x89\x7e\x00\x7e", NoFrame::Control),
            (b"\x09\x00", NoFrame::Control),
            (b"\x82\x7f\x80\x00\x00\x00\x00\x00\x00\x00", NoFrame::Length),
            (b"HTTP/1.1 200 OK", NoFrame::Reserved),
        ] {
            assert_eq!(frames().feed(octets, &mut Vec::new()), Err(why), "{octets:?}");
        }
    }
}
