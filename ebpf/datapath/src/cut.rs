//! Cuts a forwarded TCP connection that lost its rule: a reset to the guest and one to the other end, as if each came from
//! its peer. An end that misses its reset gets another for its next segment.

use crate::{DatapathError, rules::address_of};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, SocketAddr};
use tapgate_ebpf_common::{
    maps::{Flow, FlowKey},
    net::MARK_UPLINK,
    packet::{ACK, RST, TCP},
};
use tapgate_netns::Netns;

const TCP_HEADER: u8 = 20;
const HOPS: u8 = 64;

/// Raw sockets of the egress namespace: one for each end, in each family.
#[derive(Debug)]
pub(crate) struct Cutter {
    v4: Ends,
    /// None where the kernel has no IPv6.
    v6: Option<Ends>,
}

#[derive(Debug)]
struct Ends {
    guest: Socket,
    remote: Socket,
}

impl Ends {
    fn open(domain: Domain) -> std::io::Result<Self> {
        let raw = || -> std::io::Result<Socket> {
            let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)))?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        let ends = Self { guest: raw()?, remote: raw()? };
        ends.remote.set_mark(MARK_UPLINK)?;
        Ok(ends)
    }
}

impl Cutter {
    pub(crate) fn open(egress: &Netns) -> Result<Self, DatapathError> {
        let open = || Ok(Self { v4: Ends::open(Domain::IPV4)?, v6: Ends::open(Domain::IPV6).ok() });
        egress.run(open)?.map_err(DatapathError::Raw)
    }

    /// Resets both ends. What cannot be sent is left to the ends' next segments.
    pub(crate) fn cut(&self, key: &FlowKey, flow: &Flow, guest: IpAddr) {
        let remote = address_of(&key.remote.octets(), key.v6 != 0);
        let ends = if key.v6 != 0 { self.v6.as_ref() } else { Some(&self.v4) };
        let Some(ends) = ends else { return };
        let inward = reset((remote, key.remote_port), (guest, key.port), flow.expected, flow.next);
        let outward = reset((guest, key.port), (remote, key.remote_port), flow.next, flow.expected);
        for (socket, packet, to) in [(&ends.guest, inward, guest), (&ends.remote, outward, remote)] {
            if let Err(error) = socket.send_to(&packet, &SocketAddr::from((to, 0)).into()) {
                tracing::debug!(slot = key.slot, %error, "a reset could not be sent");
            }
        }
    }
}

/// An IP packet with a TCP reset. The kernel fills in the checksum of an IPv4 header.
fn reset(from: (IpAddr, u16), to: (IpAddr, u16), sequence: u32, acknowledged: u32) -> Vec<u8> {
    let mut tcp = Vec::with_capacity(TCP_HEADER.into());
    tcp.extend(from.1.to_be_bytes());
    tcp.extend(to.1.to_be_bytes());
    tcp.extend(sequence.to_be_bytes());
    tcp.extend(acknowledged.to_be_bytes());
    tcp.extend([5 << 4, RST | ACK, 0, 0, 0, 0, 0, 0]);
    let (mut packet, addresses) = match (from.0, to.0) {
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            (vec![0x60, 0, 0, 0, 0, TCP_HEADER, TCP, HOPS], addresses)
        }
        (from, to) => {
            let octets = |address| match address {
                IpAddr::V4(v4) => v4.octets(),
                IpAddr::V6(_) => [0; 4],
            };
            let addresses = [octets(from), octets(to)].concat();
            (vec![0x45, 0, 0, 20 + TCP_HEADER, 0, 0, 0x40, 0, HOPS, TCP, 0, 0], addresses)
        }
    };
    // For both families the sum over the pseudo header is that over addresses, length and protocol.
    let pseudo = [&addresses[..], &[0, TCP, 0, TCP_HEADER], &tcp].concat();
    tcp[16..18].copy_from_slice(&checksum(&pseudo).to_be_bytes());
    packet.extend(addresses);
    packet.extend(tcp);
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let pair = |pair: &[u8]| u32::from(pair[0]) << 8 | pair.get(1).copied().map_or(0, u32::from);
    let mut sum: u32 = bytes.chunks(2).map(pair).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_has_a_checksum_that_verifies() {
        for (from, to, addresses, header) in [
            ("192.0.2.1", "198.51.100.7", 12, 20),
            ("2001:db8::1", "2001:db8:ffff:ffff:ffff:ffff:ffff:fffe", 8, 40),
        ] {
            let packet = reset((from.parse().unwrap(), 443), (to.parse().unwrap(), 40000), 1 << 31, 7);
            assert_eq!(packet.len(), header + 20);
            let pseudo = [&packet[addresses..header], &[0, 6, 0, 20], &packet[header..]].concat();
            assert_eq!(checksum(&pseudo), 0, "{from}");
        }
    }
}
