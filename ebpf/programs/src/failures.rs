//! ICMP reports of failures, which are about a flow: their payload begins with a packet of it (RFC 792, RFC 4443 section 3).
//!
//! The host's connection tracking finds the connection that a report speaks of by that packet, whoever sent the report. Must let
//! none through, either way, that is about another than the VM's own flow.

use crate::{flows, maps::Scratch, skb::Skb};
use tapgate_ebpf_common::{
    maps::{Address, FlowKey, Vm},
    packet::{ETHERNET, ICMP, ICMP6, IPV4, IPV6, Packet},
};

/// Octets of an ICMP header.
const ICMP_HEADER: usize = 8;

/// The flow of a report that reaches the guest: the packet inside is the guest's own.
#[inline(never)]
pub fn to_guest(skb: &Skb, vm: &Vm, v6: bool, key: &mut FlowKey) -> bool {
    inside(skb, vm, v6, true, key).is_some()
}

/// Whether a report of the guest's is about a flow that it has with whom it reports to: the packet inside came from there.
#[inline(never)]
pub fn by_guest(skb: &Skb, vm: &Vm, scratch: &mut Scratch) -> bool {
    let Scratch { header, key, .. } = scratch;
    inside(skb, vm, header.v6, false, key).is_some()
        && key.remote.octets() == header.destination
        && flows::find(key).is_some()
}

/// The flow of the packet inside; `sent` says that it must be the guest's own, else one to it.
#[inline(always)]
fn inside(skb: &Skb, vm: &Vm, v6: bool, sent: bool, key: &mut FlowKey) -> Option<()> {
    let ports: [u8; 8];
    if v6 {
        const AT: usize = ETHERNET + IPV6 + ICMP_HEADER;
        let h: [u8; 40] = skb.read(AT)?;
        let (mut source, mut destination) = ([0; 16], [0; 16]);
        source.copy_from_slice(&h[8..24]);
        destination.copy_from_slice(&h[24..40]);
        let (own, remote) = if sent { (source, destination) } else { (destination, source) };
        if own != vm.v6.octets() {
            return None;
        }
        key.remote = Address::new(remote);
        key.protocol = h[6];
        ports = skb.read(AT + IPV6)?;
    } else {
        const AT: usize = ETHERNET + IPV4 + ICMP_HEADER;
        let h: [u8; 20] = skb.read(AT)?;
        let (source, destination) = ([h[12], h[13], h[14], h[15]], [h[16], h[17], h[18], h[19]]);
        let (own, remote) = if sent { (source, destination) } else { (destination, source) };
        if h[0] != 0x45 || own != vm.v4.to_ne_bytes() {
            return None;
        }
        key.remote = Address::of_v4(u32::from_ne_bytes(remote));
        key.protocol = h[9];
        ports = skb.read(AT + IPV4)?;
    }
    let port = |at: usize| u16::from_be_bytes([ports[at], ports[at + 1]]);
    let (source, destination) = (port(0), port(2));
    key.slot = vm.slot as u16;
    key.v6 = v6 as u8;
    (key.port, key.remote_port) = match key.protocol {
        ICMP | ICMP6 => (port(4), 0),
        _ if sent => (source, destination),
        _ => (destination, source),
    };
    Some(())
}
