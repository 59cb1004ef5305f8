//! A quick look at a frame: whether it is a plain TCP or UDP packet of the VM's, and of which flow. For frames of flows
//! that are known, which are most.
//!
//! Reads words where the classifier reads octets, and decides nothing: what it does not recognise at once is left to the
//! classifier, and so is what belongs to no flow. Must never recognise what the classifier would refuse; a property test
//! holds the two against each other.

use crate::{
    maps::{Address, FlowKey, Tap, VM_IPV6, halves},
    net::GATEWAY_MAC,
    packet::{ACK, ETHERNET, FIN, IPV4, IPV6, RST, SYN, Segment, TCP, UDP},
};

const GATEWAY: [u16; 3] = halves(GATEWAY_MAC);
const IS_V4: u16 = 0x0800u16.to_be();
const IS_V6: u16 = 0x86ddu16.to_be();
/// More fragments, an offset, or the bit that is always zero.
const FRAGMENTED: u16 = 0xbfffu16.to_be();
const UDP_HEADER: usize = 8;
const TCP_HEADER: usize = 20;

/// A frame whose first octets lie in one piece. Values are as they are in memory: in the order of the wire.
pub trait Piece {
    /// Octets in the frame.
    fn length(&self) -> usize;
    /// Whether the frame carries a VLAN tag beside its octets.
    fn tagged(&self) -> bool;
    /// Whether so many octets lie in the piece.
    fn has(&self, octets: usize) -> bool;
    /// One octet; `has` must have confirmed it, as for the others.
    fn octet(&self, at: usize) -> u8;
    /// Two octets.
    fn half(&self, at: usize) -> u16;
    /// Four octets.
    fn word(&self, at: usize) -> u32;
}

/// What was seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sight {
    /// The flow that it would be of.
    pub key: FlowKey,
    /// The TCP part.
    pub segment: Segment,
}

/// Looks at a frame from the VM.
#[inline(always)]
pub fn from_guest(frame: &(impl Piece + ?Sized), tap: &Tap) -> Option<Sight> {
    if !frame.has(ETHERNET + IPV4 + UDP_HEADER) {
        return None;
    }
    let to_gateway =
        frame.half(0) == GATEWAY[0] && frame.half(2) == GATEWAY[1] && frame.half(4) == GATEWAY[2];
    let own = frame.half(6) == tap.mac[0] && frame.half(8) == tap.mac[1] && frame.half(10) == tap.mac[2];
    if to_gateway && own { look(frame, tap, true) } else { None }
}

/// Looks at a frame to the VM.
#[inline(always)]
pub fn to_guest(frame: &(impl Piece + ?Sized), tap: &Tap) -> Option<Sight> {
    if frame.has(ETHERNET + IPV4 + UDP_HEADER) { look(frame, tap, false) } else { None }
}

#[inline(always)]
fn look(frame: &(impl Piece + ?Sized), tap: &Tap, out: bool) -> Option<Sight> {
    if frame.tagged() {
        return None;
    }
    let kind = frame.half(12);
    if kind == IS_V4 {
        let total = u16::from_be(frame.half(ETHERNET + 2)) as usize;
        let (source, destination) = (frame.word(ETHERNET + 12), frame.word(ETHERNET + 16));
        let (own, remote) = if out { (source, destination) } else { (destination, source) };
        let plain = frame.octet(ETHERNET) == 0x45
            && frame.half(ETHERNET + 6) & FRAGMENTED == 0
            && total >= IPV4
            && ETHERNET + total <= frame.length();
        if !plain || own != tap.v4 {
            return None;
        }
        let key = FlowKey { remote: Address::of_v4(remote), ..empty(tap, frame.octet(ETHERNET + 9), false) };
        transport(frame, key, ETHERNET + IPV4, total - IPV4, out)
    } else if kind == IS_V6 && tap.flags & VM_IPV6 != 0 && frame.has(ETHERNET + IPV6 + UDP_HEADER) {
        let length = u16::from_be(frame.half(ETHERNET + 4)) as usize;
        let (source, destination) = (address(frame, ETHERNET + 8), address(frame, ETHERNET + 24));
        let (own, remote) = if out { (source, destination) } else { (destination, source) };
        let plain = frame.octet(ETHERNET) >> 4 == 6 && ETHERNET + IPV6 + length <= frame.length();
        if !plain || own != tap.v6 {
            return None;
        }
        let key = FlowKey { remote, ..empty(tap, frame.octet(ETHERNET + 6), true) };
        transport(frame, key, ETHERNET + IPV6, length, out)
    } else {
        None
    }
}

#[inline(always)]
fn empty(tap: &Tap, protocol: u8, v6: bool) -> FlowKey {
    FlowKey {
        slot: tap.slot as u16,
        protocol,
        v6: v6 as u8,
        port: 0,
        remote_port: 0,
        remote: Address([0; 4]),
    }
}

#[inline(always)]
fn address(frame: &(impl Piece + ?Sized), at: usize) -> Address {
    Address([frame.word(at), frame.word(at + 4), frame.word(at + 8), frame.word(at + 12)])
}

/// The transport header at the offset; `length` is what the IP header says is left.
#[inline(always)]
fn transport(
    frame: &(impl Piece + ?Sized),
    mut key: FlowKey,
    at: usize,
    length: usize,
    out: bool,
) -> Option<Sight> {
    let (source, destination) = (u16::from_be(frame.half(at)), u16::from_be(frame.half(at + 2)));
    (key.port, key.remote_port) = if out { (source, destination) } else { (destination, source) };
    if source == 0 || destination == 0 {
        return None;
    }
    if key.protocol == UDP {
        let own = u16::from_be(frame.half(at + 4)) as usize;
        let whole = own >= UDP_HEADER && own <= length;
        return if whole { Some(Sight { key, segment: Segment::default() }) } else { None };
    }
    if key.protocol != TCP || length < TCP_HEADER || !frame.has(at + TCP_HEADER) {
        return None;
    }
    let own = (frame.octet(at + 12) >> 4) as usize * 4;
    let flags = frame.octet(at + 13);
    let nonsense = flags & (SYN | ACK | RST | FIN) == 0 || (flags & SYN != 0 && flags & (FIN | RST) != 0);
    if own < TCP_HEADER || own > length || nonsense {
        return None;
    }
    let segment = Segment {
        flags,
        sequence: u32::from_be(frame.word(at + 4)),
        acknowledged: u32::from_be(frame.word(at + 8)),
        payload: (length - own) as u32,
    };
    Some(Sight { key, segment })
}

impl Piece for [u8] {
    fn length(&self) -> usize {
        self.len()
    }
    fn tagged(&self) -> bool {
        false
    }
    fn has(&self, octets: usize) -> bool {
        self.len() >= octets
    }
    fn octet(&self, at: usize) -> u8 {
        self[at]
    }
    fn half(&self, at: usize) -> u16 {
        u16::from_ne_bytes([self[at], self[at + 1]])
    }
    fn word(&self, at: usize) -> u32 {
        u32::from_ne_bytes([self[at], self[at + 1], self[at + 2], self[at + 3]])
    }
}
