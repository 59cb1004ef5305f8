//! An audit event as a slot holds it, and the way back. What does not fit is cut: of the path its end, of many secrets' names those
//! that are too many (then the last one is [`MORE`]). Must never panic on what it reads.

use crate::layout::{BODY, ID, Kind, check, slot};
use std::net::{IpAddr, Ipv6Addr};
use tapgate_model::{AuditEvent, EventId, Mode, Note, Protocol, Reason, Verdict, VmId};

/// Stands for names of secrets that found no room; no secret has such a name.
const MORE: &str = "...";
/// Octets that names of secrets may take of what is left: a path takes the rest.
const NAMES: usize = 320;
const MODES: [Mode; 2] = [Mode::Enforce, Mode::Warn];

/// Puts values one after another into a body.
struct Pen<'a> {
    body: &'a mut [u8; BODY],
    at: usize,
}

impl Pen<'_> {
    fn octets(&mut self, octets: &[u8]) {
        let end = self.at + octets.len();
        if let Some(room) = self.body.get_mut(self.at..end) {
            room.copy_from_slice(octets);
            self.at = end;
        }
    }

    /// A text with its length before it: as much of it as there is room for, up to `most` octets.
    fn text(&mut self, text: Option<&str>, most: usize) {
        let Some(text) = text else { return self.octets(&u16::MAX.to_le_bytes()) };
        let mut length = text.len().min(most).min(self.left().saturating_sub(2));
        while !text.is_char_boundary(length) {
            length -= 1;
        }
        self.octets(&(length as u16).to_le_bytes());
        self.octets(&text.as_bytes()[..length]);
    }

    fn names(&mut self, names: &[String]) {
        let room = NAMES.min(self.left() / 3);
        let mut taken = 0;
        // The last place is for who finds none.
        let fits = names.iter().take_while(|name| {
            taken += name.len() + 2;
            taken + MORE.len() + 2 <= room
        });
        let fits = fits.count().min(usize::from(u8::MAX) - 1);
        let more = fits < names.len();
        self.octets(&[fits as u8 + u8::from(more)]);
        names.iter().take(fits).for_each(|name| self.text(Some(name), room));
        if more {
            self.text(Some(MORE), MORE.len());
        }
    }

    fn left(&self) -> usize {
        BODY - self.at
    }
}

/// Writes the event, without its count and its VM. Answers how many octets it takes.
pub(crate) fn write(body: &mut [u8; BODY], event: &AuditEvent) -> usize {
    let mut pen = Pen { body, at: 0 };
    pen.octets(&event.timestamp_us.to_le_bytes());
    for number in [event.bytes_out, event.bytes_in, event.duration_ms] {
        pen.octets(&number.to_le_bytes());
    }
    let verdict = match event.verdict {
        Verdict::Allow { .. } => 0,
        Verdict::Deny { .. } => 1,
        Verdict::Tolerate { .. } => 2,
    };
    let mode = MODES.iter().position(|mode| *mode == event.mode).unwrap_or(0);
    let protocol = Protocol::ALL.iter().position(|protocol| *protocol == event.protocol).unwrap_or(0);
    let family = match event.address {
        None => 0,
        Some(IpAddr::V4(_)) => 4,
        Some(IpAddr::V6(_)) => 6,
    };
    let there = u8::from(event.port.is_some()) | u8::from(event.status.is_some()) << 1;
    pen.octets(&[verdict, event.verdict.reason() as u8, mode as u8, protocol as u8, family, there]);
    pen.octets(&event.port.unwrap_or(0).to_le_bytes());
    pen.octets(&event.status.unwrap_or(0).to_le_bytes());
    let address = match event.address {
        None => [0; 16],
        Some(IpAddr::V4(v4)) => v4.to_ipv6_mapped().octets(),
        Some(IpAddr::V6(v6)) => v6.octets(),
    };
    pen.octets(&address);
    pen.text(Some(event.user.as_str()), ID - 1);
    pen.text(event.id.as_ref().map(EventId::as_str), ID - 1);
    pen.text(event.verdict.rule().map(|rule| rule.as_str()), ID - 1);
    pen.text(event.host.as_ref().map(|host| host.as_str()), 255);
    pen.text(event.method.as_deref(), 128);
    pen.names(&event.secrets);
    pen.names(&event.secrets_withheld);
    pen.text(event.path.as_deref(), BODY);
    pen.at
}

/// Takes values one after another out of a body.
struct Reader<'a>(&'a [u8]);

impl<'a> Reader<'a> {
    fn octets<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (octets, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*octets)
    }

    fn number(&mut self) -> Option<u64> {
        self.octets().map(u64::from_le_bytes)
    }

    fn short(&mut self) -> Option<u16> {
        self.octets().map(u16::from_le_bytes)
    }

    fn text(&mut self) -> Option<Option<&'a str>> {
        let length = self.short()?;
        if length == u16::MAX {
            return Some(None);
        }
        let (text, rest) = self.0.split_at_checked(length.into())?;
        self.0 = rest;
        std::str::from_utf8(text).ok().map(Some)
    }

    /// A text that is of some form, if it is there.
    fn parsed<T: std::str::FromStr>(&mut self) -> Option<Option<T>> {
        match self.text()? {
            None => Some(None),
            Some(text) => text.parse().ok().map(Some),
        }
    }

    fn names(&mut self) -> Option<Vec<String>> {
        let [count] = self.octets()?;
        (0..count).map(|_| self.text()?.map(str::to_owned)).collect()
    }
}

fn event(vm: VmId, count: u32, body: &[u8]) -> Option<AuditEvent> {
    let mut body = Reader(body);
    let timestamp_us = body.octets().map(i64::from_le_bytes)?;
    let (bytes_out, bytes_in, duration_ms) = (body.number()?, body.number()?, body.number()?);
    let [verdict, reason, mode, protocol, family, there] = body.octets()?;
    let (port, status) = (body.short()?, body.short()?);
    let address = Ipv6Addr::from(body.octets::<16>()?);
    let user = body.parsed()??;
    let id = body.parsed()?;
    let rule = body.parsed()?;
    let host = body.text()?;
    let reason = Reason::from_u8(reason)?;
    Some(AuditEvent {
        id,
        timestamp_us,
        vm,
        user,
        host: match host {
            None => None,
            Some(host) => Some(tapgate_model::HostName::parse_wire(host.as_bytes()).ok()?),
        },
        address: match family {
            0 => None,
            4 => Some(IpAddr::V4(address.to_ipv4_mapped()?)),
            6 => Some(IpAddr::V6(address)),
            _ => return None,
        },
        port: (there & 1 != 0).then_some(port),
        status: (there & 2 != 0).then_some(status),
        protocol: *Protocol::ALL.get(usize::from(protocol))?,
        verdict: match verdict {
            0 => Verdict::Allow { rule, reason },
            1 => Verdict::Deny { reason },
            2 => Verdict::Tolerate { reason },
            _ => return None,
        },
        mode: *MODES.get(usize::from(mode))?,
        method: body.text()?.map(str::to_owned),
        secrets: body.names()?,
        secrets_withheld: body.names()?,
        path: body.text()?.map(str::to_owned),
        bytes_out,
        bytes_in,
        duration_ms,
        count,
        note: Note::default(),
    })
}

/// An id with its length before it.
pub(crate) fn id(text: &str) -> [u8; ID] {
    let mut id = [0; ID];
    let octets = &text.as_bytes()[..text.len().min(ID - 1)];
    id[0] = octets.len() as u8;
    id[1..=octets.len()].copy_from_slice(octets);
    id
}

fn read_id<T: std::str::FromStr>(octets: &[u8]) -> Option<T> {
    let (length, octets) = octets.split_first()?;
    std::str::from_utf8(octets.get(..usize::from(*length))?).ok()?.parse().ok()
}

/// What a slot turned out to hold.
pub(crate) enum Found {
    Nothing,
    Event { kind: Kind, event: Box<AuditEvent>, claim: Option<(EventId, i64)> },
    Lost { vm: Option<VmId>, count: u64, claim: Option<i64> },
}

/// Reads a slot as it is in the file.
pub(crate) fn read(octets: &[u8]) -> Found {
    let word = |at: usize| {
        octets.get(at..).and_then(<[u8]>::first_chunk).map_or(0, |word: &[u8; 8]| u64::from_le_bytes(*word))
    };
    let part = |at: usize, length: usize| octets.get(at..at + length).unwrap_or_default();
    let state = word(slot::STATE);
    let kind = Kind::of(state);
    if state == Kind::Free as u64 {
        return Found::Nothing;
    }
    let vm = part(slot::VM, ID);
    let vm: Option<VmId> = (check(0, vm) == word(slot::VM_CHECK)).then(|| read_id(vm)).flatten();
    // Of one that was just begun, or is not ours, there may be no count yet.
    let count = u32::try_from(word(slot::COUNT)).unwrap_or(1).max(1);
    let (id, seq) = (part(slot::CLAIM_ID, ID), word(slot::CLAIM));
    let claimed = seq > 0 && check(seq, id) == word(slot::CLAIM_CHECK);
    let seq = claimed.then(|| i64::try_from(seq).ok()).flatten();
    let lost = |claim| Found::Lost { vm: vm.clone(), count: count.into(), claim };
    let body = usize::try_from(state >> 8).ok().filter(|length| *length <= BODY);
    let body = body.map(|length| part(slot::BODY, length));
    let Some(body) = body.filter(|body| check(state, body) == word(slot::CHECK)) else { return lost(None) };
    match (kind, &vm) {
        // As many as could ever be: what says more was not written by us.
        (Some(Kind::Lost), _) => Found::Lost { vm, count: word(slot::COUNT).clamp(1, 1 << 40), claim: seq },
        (Some(kind @ (Kind::Undecided | Kind::UnderWay | Kind::Ended)), Some(known)) => {
            match event(known.clone(), count, body) {
                Some(event) => Found::Event { kind, event: event.into(), claim: read_id(id).zip(seq) },
                None => lost(None),
            }
        }
        _ => lost(None),
    }
}
