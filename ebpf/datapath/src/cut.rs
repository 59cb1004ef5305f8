//! Cuts a forwarded TCP connection that lost its rule: a reset to the guest and one to the other end, as if each came from
//! its peer. An end that misses its reset gets another for its next segment.

use crate::{DatapathError, rules::address_of};
use nix::libc;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use tapgate_ebpf_common::{
    maps::{Flow, FlowKey},
    net::MARK_UPLINK,
    packet::{ACK, RST},
};
use tapgate_netns::Netns;

const TCP_HEADER: usize = 20;

/// Raw sockets of the egress namespace.
#[derive(Debug)]
pub(crate) struct Cutter {
    to_guest: Socket,
    to_remote: Socket,
}

impl Cutter {
    pub(crate) fn open(egress: &Netns) -> Result<Self, DatapathError> {
        let open = || -> std::io::Result<Self> {
            let raw = || Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW)));
            let (to_guest, to_remote) = (raw()?, raw()?);
            to_remote.set_mark(MARK_UPLINK)?;
            for socket in [&to_guest, &to_remote] {
                socket.set_nonblocking(true)?;
            }
            Ok(Self { to_guest, to_remote })
        };
        egress.run(open)?.map_err(DatapathError::Raw)
    }

    /// Resets both ends. What cannot be sent is left to the ends' next segments.
    pub(crate) fn cut(&self, key: &FlowKey, flow: &Flow, guest: IpAddr) {
        let remote = address_of(&key.remote, key.v6 != 0);
        let (IpAddr::V4(guest), IpAddr::V4(remote)) = (guest, remote) else { return };
        let inward = reset(remote, guest, key.remote_port, key.port, flow.expected, flow.next);
        let outward = reset(guest, remote, key.port, key.remote_port, flow.next, flow.expected);
        for (socket, packet, to) in [(&self.to_guest, inward, guest), (&self.to_remote, outward, remote)] {
            if let Err(error) = socket.send_to(&packet, &SocketAddr::from((to, 0)).into()) {
                tracing::debug!(slot = key.slot, %error, "a reset could not be sent");
            }
        }
    }
}

/// An IPv4 packet with a TCP reset.
fn reset(
    from: Ipv4Addr,
    to: Ipv4Addr,
    port: u16,
    to_port: u16,
    sequence: u32,
    acknowledged: u32,
) -> [u8; 40] {
    let mut packet = [0; 20 + TCP_HEADER];
    packet[0] = 0x45;
    packet[2..4].copy_from_slice(&(20 + TCP_HEADER as u16).to_be_bytes());
    packet[6] = 0x40;
    packet[8] = 64;
    packet[9] = 6;
    packet[12..16].copy_from_slice(&from.octets());
    packet[16..20].copy_from_slice(&to.octets());
    // The kernel fills in the IP checksum.
    let tcp = &mut packet[20..];
    tcp[0..2].copy_from_slice(&port.to_be_bytes());
    tcp[2..4].copy_from_slice(&to_port.to_be_bytes());
    tcp[4..8].copy_from_slice(&sequence.to_be_bytes());
    tcp[8..12].copy_from_slice(&acknowledged.to_be_bytes());
    tcp[12] = 5 << 4;
    tcp[13] = RST | ACK;
    let mut pseudo = Vec::with_capacity(12 + TCP_HEADER);
    pseudo.extend(from.octets());
    pseudo.extend(to.octets());
    pseudo.extend([0, 6, 0, TCP_HEADER as u8]);
    pseudo.extend_from_slice(tcp);
    let sum = checksum(&pseudo);
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    packet
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
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
        let packet =
            reset(Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(198, 51, 100, 7), 443, 40000, 1 << 31, 7);
        let mut pseudo = packet[12..20].to_vec();
        pseudo.extend([0, 6, 0, 20]);
        pseudo.extend_from_slice(&packet[20..]);
        assert_eq!(checksum(&pseudo), 0);
    }
}
