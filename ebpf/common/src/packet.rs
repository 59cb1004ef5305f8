//! Reads a frame: who sent it, where it goes, what it carries. Says nothing about whether it may.
//!
//! Works on any [`Packet`]: a byte slice natively, an skb (linear or paged) in the programs. Must never look beyond
//! what a length field and the frame both allow.

use crate::{Reason, maps::mapped};

/// Octets of an Ethernet header.
pub const ETHERNET: usize = 14;
/// Octets of the only IPv4 header that is read.
pub const IPV4: usize = 20;
/// Octets of an IPv6 header.
pub const IPV6: usize = 40;
/// IP protocol numbers that are told apart.
pub const ICMP: u8 = 1;
/// TCP.
pub const TCP: u8 = 6;
/// UDP.
pub const UDP: u8 = 17;
/// ICMPv6.
pub const ICMP6: u8 = 58;

/// TCP flags.
pub const FIN: u8 = 1;
/// Opens a connection.
pub const SYN: u8 = 2;
/// Ends it at once.
pub const RST: u8 = 4;
/// Acknowledges.
pub const ACK: u8 = 16;

/// A frame that can be read at any offset.
pub trait Packet {
    /// Octets in the frame.
    fn length(&self) -> usize;
    /// `N` octets from the offset, if the frame is that long.
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]>;
    /// Whether the frame carries a VLAN tag beside its octets.
    fn tagged(&self) -> bool {
        false
    }
}

impl Packet for [u8] {
    fn length(&self) -> usize {
        self.len()
    }
    fn read<const N: usize>(&self, offset: usize) -> Option<[u8; N]> {
        self.get(offset..)?.first_chunk().copied()
    }
}

/// An Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ethernet {
    /// Destination.
    pub destination: [u8; 6],
    /// Source.
    pub source: [u8; 6],
    /// What the frame carries.
    pub kind: Ethertype,
}

/// Ethertypes that are told apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ethertype {
    /// IPv4.
    V4,
    /// ARP.
    Arp,
    /// IPv6.
    V6,
    /// A VLAN tag of any kind.
    Vlan,
    /// Anything else.
    Other,
}

/// What an IP packet says about itself, as far as it is judged by it. Filled in place: the programs keep it in a map, for
/// their stack is small.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// IPv6.
    pub v6: bool,
    /// IP protocol number.
    pub protocol: u8,
    /// TCP flags.
    pub flags: u8,
    /// Type of an ICMP message.
    pub icmp: u8,
    /// Source.
    pub source: [u8; 16],
    /// Destination.
    pub destination: [u8; 16],
    /// Source port, or the identifier of a ping.
    pub source_port: u16,
    /// Destination port; 0 for a ping.
    pub port: u16,
    /// TCP sequence number.
    pub sequence: u32,
    /// TCP acknowledgement number.
    pub acknowledged: u32,
    /// Octets of TCP payload.
    pub payload: u32,
}

/// What a TCP segment says about its connection; all zero for other protocols.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Segment {
    /// Flags.
    pub flags: u8,
    /// Sequence number.
    pub sequence: u32,
    /// Acknowledgement number.
    pub acknowledged: u32,
    /// Octets of payload.
    pub payload: u32,
}

impl Segment {
    /// Whether it asks for a new connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// The sender's next sequence number after it.
    #[inline(always)]
    pub const fn next(&self) -> u32 {
        let controls = (self.flags & SYN != 0) as u32 + (self.flags & FIN != 0) as u32;
        self.sequence.wrapping_add(self.payload).wrapping_add(controls)
    }
}

impl Header {
    /// The TCP part.
    #[inline(always)]
    pub const fn segment(&self) -> Segment {
        Segment {
            flags: self.flags,
            sequence: self.sequence,
            acknowledged: self.acknowledged,
            payload: self.payload,
        }
    }

    #[inline(always)]
    fn begin(&mut self, v6: bool, protocol: u8) {
        self.v6 = v6;
        self.protocol = protocol;
        self.flags = 0;
        self.icmp = 0;
        self.source_port = 0;
        self.port = 0;
        self.sequence = 0;
        self.acknowledged = 0;
        self.payload = 0;
    }

    /// Whether it asks for a new connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.protocol == TCP && self.flags & (SYN | ACK | RST | FIN) == SYN
    }

    /// Whether it is a message of ICMP or of ICMPv6.
    #[inline(always)]
    pub const fn is_icmp(&self) -> bool {
        self.protocol == ICMP || self.protocol == ICMP6
    }

    /// Whether it is a question of a ping.
    #[inline(always)]
    pub const fn pings(&self) -> bool {
        match self.protocol {
            ICMP => self.icmp == 8,
            ICMP6 => self.icmp == 128,
            _ => false,
        }
    }
}

/// Reads the Ethernet header.
#[inline(always)]
pub fn ethernet(packet: &(impl Packet + ?Sized)) -> Result<Ethernet, Reason> {
    let h: [u8; ETHERNET] = packet.read(0).ok_or(Reason::Malformed)?;
    let kind = match [h[12], h[13]] {
        [0x08, 0x00] => Ethertype::V4,
        [0x08, 0x06] => Ethertype::Arp,
        [0x86, 0xdd] => Ethertype::V6,
        // 802.1Q, 802.1ad and the older tags of providers.
        [0x81, 0x00] | [0x88, 0xa8] | [0x91, 0x00] | [0x92, 0x00] | [0x93, 0x00] => Ethertype::Vlan,
        _ => Ethertype::Other,
    };
    Ok(Ethernet {
        destination: [h[0], h[1], h[2], h[3], h[4], h[5]],
        source: [h[6], h[7], h[8], h[9], h[10], h[11]],
        kind: if packet.tagged() { Ethertype::Vlan } else { kind },
    })
}

/// Reads an IPv4 packet: no options, no fragments, lengths that agree.
#[inline(always)]
pub fn ipv4(packet: &(impl Packet + ?Sized), header: &mut Header) -> Result<(), Reason> {
    let h: [u8; 20] = packet.read(ETHERNET).ok_or(Reason::Malformed)?;
    if h[0] >> 4 != 4 || h[0] & 15 < 5 {
        return Err(Reason::Malformed);
    }
    if h[0] & 15 > 5 {
        return Err(Reason::IpOptions);
    }
    let total = u16::from_be_bytes([h[2], h[3]]) as usize;
    if total < 20 || ETHERNET + total > packet.length() {
        return Err(Reason::Malformed);
    }
    let fragment = u16::from_be_bytes([h[6], h[7]]);
    if fragment & 0x8000 != 0 {
        return Err(Reason::Malformed);
    }
    if fragment & 0x3fff != 0 {
        return Err(Reason::Fragment);
    }
    header.begin(false, h[9]);
    header.source = mapped([h[12], h[13], h[14], h[15]]);
    header.destination = mapped([h[16], h[17], h[18], h[19]]);
    transport(packet, header, ETHERNET + IPV4, total - IPV4)
}

/// Reads an IPv6 packet: no extension header of any kind, lengths that agree.
#[inline(always)]
pub fn ipv6(packet: &(impl Packet + ?Sized), header: &mut Header) -> Result<(), Reason> {
    let h: [u8; 40] = packet.read(ETHERNET).ok_or(Reason::Malformed)?;
    if h[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    let length = u16::from_be_bytes([h[4], h[5]]) as usize;
    if ETHERNET + 40 + length > packet.length() {
        return Err(Reason::Malformed);
    }
    match h[6] {
        44 => return Err(Reason::Fragment),
        // Hop-by-hop, routing, ESP, AH, no next header, destination options, mobility, HIP, shim6, experiments.
        0 | 43 | 50 | 51 | 59 | 60 | 135 | 139 | 140 | 253 | 254 => return Err(Reason::Ipv6Extension),
        _ => {}
    }
    header.begin(true, h[6]);
    header.source.copy_from_slice(&h[8..24]);
    header.destination.copy_from_slice(&h[24..40]);
    transport(packet, header, ETHERNET + IPV6, length)
}

/// Reads the transport header; `length` is what the IP header says is left.
#[inline(always)]
fn transport(
    packet: &(impl Packet + ?Sized),
    header: &mut Header,
    offset: usize,
    length: usize,
) -> Result<(), Reason> {
    match header.protocol {
        TCP => {
            if length < 20 {
                return Err(Reason::Malformed);
            }
            let h: [u8; 20] = packet.read(offset).ok_or(Reason::Malformed)?;
            let own = (h[12] >> 4) as usize * 4;
            let flags = h[13];
            // No flag that means anything, or a SYN that ends at once: scanners' frames, nobody's connection.
            let nonsense =
                flags & (SYN | ACK | RST | FIN) == 0 || (flags & SYN != 0 && flags & (FIN | RST) != 0);
            if own < 20 || own > length || nonsense {
                return Err(Reason::Malformed);
            }
            header.flags = flags;
            header.source_port = u16::from_be_bytes([h[0], h[1]]);
            header.port = u16::from_be_bytes([h[2], h[3]]);
            header.sequence = u32::from_be_bytes([h[4], h[5], h[6], h[7]]);
            header.acknowledged = u32::from_be_bytes([h[8], h[9], h[10], h[11]]);
            header.payload = (length - own) as u32;
        }
        UDP => {
            if length < 8 {
                return Err(Reason::Malformed);
            }
            let h: [u8; 8] = packet.read(offset).ok_or(Reason::Malformed)?;
            let own = u16::from_be_bytes([h[4], h[5]]) as usize;
            // A segmented send (UDP GSO) says the length of one datagram, so `own` may be less, never more.
            if own < 8 || own > length {
                return Err(Reason::Malformed);
            }
            header.source_port = u16::from_be_bytes([h[0], h[1]]);
            header.port = u16::from_be_bytes([h[2], h[3]]);
        }
        ICMP if !header.v6 => icmp(packet, header, offset, length)?,
        ICMP6 if header.v6 => icmp(packet, header, offset, length)?,
        _ => return Ok(()),
    }
    let ports = header.protocol == TCP || header.protocol == UDP;
    if ports && (header.source_port == 0 || header.port == 0) {
        return Err(Reason::Malformed);
    }
    Ok(())
}

#[inline(always)]
fn icmp(
    packet: &(impl Packet + ?Sized),
    header: &mut Header,
    offset: usize,
    length: usize,
) -> Result<(), Reason> {
    if length < 8 {
        return Err(Reason::Malformed);
    }
    let h: [u8; 8] = packet.read(offset).ok_or(Reason::Malformed)?;
    header.icmp = h[0];
    if matches!((header.protocol, h[0]), (ICMP, 0 | 8) | (ICMP6, 128 | 129)) {
        header.source_port = u16::from_be_bytes([h[4], h[5]]);
    }
    Ok(())
}
