//! Builds frames, octet by octet. Judges none.

use super::{MAC, OWN, OWN_V6, octets, v4, v6};
use tapgate_ebpf_common::net::GATEWAY_MAC;

pub fn ethernet(destination: [u8; 6], source: [u8; 6], kind: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = Vec::from(destination);
    frame.extend(source);
    frame.extend(kind.to_be_bytes());
    frame.extend(rest);
    frame
}

pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IP packet of the family of `to`, from `from`.
pub fn ip_from(from: &str, to: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    let (source, destination) = (octets(from), octets(to));
    let v6 = to.contains(':');
    let from_at = if v6 { 0 } else { 12 };
    let (source, destination) = (&source[from_at..], &destination[from_at..]);
    let at = match protocol {
        6 if body.len() >= 20 => Some(16),
        17 if body.len() >= 8 => Some(6),
        58 if body.len() >= 8 => Some(2),
        _ => None,
    };
    if let Some(at) = at {
        let length = (body.len() as u32).to_be_bytes();
        let sum = checksum(&[source, destination, &length, &[0, 0, 0, protocol], &body]);
        body[at..at + 2].copy_from_slice(&sum);
    } else if protocol == 1 && body.len() >= 8 {
        let sum = checksum(&[&body]);
        body[2..4].copy_from_slice(&sum);
    }
    let mut packet = Vec::new();
    if v6 {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend((body.len() as u16).to_be_bytes());
        packet.extend([protocol, 64]);
        packet.extend(source);
        packet.extend(destination);
    } else {
        packet.extend([0x45, 0]);
        packet.extend((20 + body.len() as u16).to_be_bytes());
        packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
        packet.extend(source);
        packet.extend(destination);
        let sum = checksum(&[&packet]);
        packet[10..12].copy_from_slice(&sum);
    }
    packet.extend(body);
    packet
}

/// A frame from the VM's own addresses to the gateway's MAC.
pub fn ip(to: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let own = if to.contains(':') { OWN_V6 } else { OWN };
    framed(&ip_from(own, to, protocol, body), to.contains(':'))
}

pub fn framed(packet: &[u8], v6: bool) -> Vec<u8> {
    ethernet(GATEWAY_MAC, MAC, if v6 { 0x86dd } else { 0x0800 }, packet)
}

pub fn tcp(port: u16, flags: u8) -> Vec<u8> {
    let mut h = Vec::from(40000u16.to_be_bytes());
    h.extend(port.to_be_bytes());
    h.extend([0, 0, 0, 9, 0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    h
}

pub fn udp(port: u16, body: &[u8]) -> Vec<u8> {
    let mut h = Vec::from(40000u16.to_be_bytes());
    h.extend(port.to_be_bytes());
    h.extend((8 + body.len() as u16).to_be_bytes());
    h.extend([0, 0]);
    h.extend(body);
    h
}

pub fn icmp(kind: u8) -> Vec<u8> {
    vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1, b'x', b'y']
}

pub fn arp(operation: u16, mac: [u8; 6], sender: &str, target: &str) -> Vec<u8> {
    let mut h = vec![0, 1, 8, 0, 6, 4];
    h.extend(operation.to_be_bytes());
    h.extend(mac);
    h.extend(v4(sender));
    h.extend([0; 6]);
    h.extend(v4(target));
    h
}

pub fn solicit(target: &str, option: Option<[u8; 6]>) -> Vec<u8> {
    let mut h = vec![135, 0, 0, 0, 0, 0, 0, 0];
    h.extend(v6(target));
    if let Some(mac) = option {
        h.extend([1, 1]);
        h.extend(mac);
    }
    h
}

pub(super) fn discovery(from: &str, body: &[u8], hops: u8) -> Vec<u8> {
    let mut packet = ip_from(from, "ff02::1:ff00:1", 58, body);
    packet[7] = hops;
    ethernet([0x33, 0x33, 0xff, 0, 0, 1], MAC, 0x86dd, &packet)
}

pub(super) fn with(mut frame: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut frame);
    frame
}

pub const SYN: u8 = 2;
pub const ACK: u8 = 16;

/// The first packet of a TCP connection.
pub fn syn(to: &str, port: u16) -> Vec<u8> {
    ip(to, 6, &tcp(port, SYN))
}
