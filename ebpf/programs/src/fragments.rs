//! Fragments towards a guest. The first one carries the ports, so it is judged as a whole datagram would be; the others
//! pass if their first one did, a moment ago.
//!
//! They come in order: the host puts every datagram together before it translates its address, and takes it apart again.
//! One that comes before its first is dropped. Nothing here is for what a guest sends: it may send no fragment.

use crate::{
    flows,
    maps::FRAGMENTS,
    report::now,
    skb::Skb,
    to_guest::{ADMITTED, answered},
};
use tapgate_ebpf_common::{
    Reason,
    maps::{Address, FlowKey, Fragment, FragmentKey, Vm},
    packet::{ETHERNET, Header, ICMP, ICMP6, IPV4, IPV6, Packet, UDP},
};

/// How long after the first of them the others may come.
const PATIENCE: u64 = 1_000_000_000;
const FRAGMENT_HEADER: usize = 8;

/// Whether the fragment may pass: the reason if it may not. A function of its own, for the sake of the stack.
#[inline(never)]
pub fn admit(skb: &Skb, vm: &Vm, v6: bool, header: &mut Header, key: &mut FlowKey) -> u32 {
    match judge(skb, vm, v6, header, key) {
        Ok(()) => ADMITTED,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn judge(skb: &Skb, vm: &Vm, v6: bool, header: &mut Header, key: &mut FlowKey) -> Result<(), Reason> {
    let (fragment, offset, at) = if v6 { read_v6(skb, vm)? } else { read_v4(skb, vm)? };
    if offset != 0 {
        let first = FRAGMENTS.get_ptr(&fragment).ok_or(Reason::Fragment)?;
        // SAFETY: the entry lives until after the program's run.
        let first = unsafe { *first };
        let fresh = now().saturating_sub(first.began) < PATIENCE;
        return if fresh && first.policy == vm.policy { Ok(()) } else { Err(Reason::Fragment) };
    }
    let h: [u8; 8] = skb.read(at).ok_or(Reason::Malformed)?;
    let number = |at: usize| u16::from_be_bytes([h[at], h[at + 1]]);
    let (port, remote_port) = match fragment.protocol {
        UDP => (number(2), number(0)),
        ICMP if !v6 && h[0] == 0 => (number(4), 0),
        ICMP6 if v6 && h[0] == 129 => (number(4), 0),
        _ => return Err(Reason::Fragment),
    };
    *key = FlowKey {
        slot: vm.slot as u16,
        protocol: fragment.protocol,
        v6: v6 as u8,
        port,
        remote_port,
        remote: fragment.remote,
    };
    let flow = answered(vm, key, header)?;
    flows::note_in(flow, fragment.protocol, 0, skb);
    let first = Fragment { began: now(), policy: vm.policy, pad: 0 };
    FRAGMENTS.insert(&fragment, &first, 0).map_err(|_| Reason::Fault)
}

/// What the fragments have in common, where this one belongs, and where its payload begins.
type Part = (FragmentKey, u16, usize);

#[inline(always)]
fn read_v4(skb: &Skb, vm: &Vm) -> Result<Part, Reason> {
    let h: [u8; IPV4] = skb.read(ETHERNET).ok_or(Reason::Malformed)?;
    if [h[16], h[17], h[18], h[19]] != vm.v4.to_ne_bytes() {
        return Err(Reason::OtherVm);
    }
    let key = FragmentKey {
        slot: vm.slot,
        id: u16::from_be_bytes([h[4], h[5]]) as u32,
        remote: Address::of_v4(u32::from_ne_bytes([h[12], h[13], h[14], h[15]])),
        protocol: h[9],
        v6: 0,
        pad: 0,
    };
    Ok((key, u16::from_be_bytes([h[6], h[7]]) & 0x1fff, ETHERNET + IPV4))
}

#[inline(always)]
fn read_v6(skb: &Skb, vm: &Vm) -> Result<Part, Reason> {
    let h: [u8; IPV6] = skb.read(ETHERNET).ok_or(Reason::Malformed)?;
    let f: [u8; FRAGMENT_HEADER] = skb.read(ETHERNET + IPV6).ok_or(Reason::Malformed)?;
    let mut address = [0; 16];
    address.copy_from_slice(&h[24..40]);
    if address != vm.v6.octets() {
        return Err(Reason::OtherVm);
    }
    address.copy_from_slice(&h[8..24]);
    let key = FragmentKey {
        slot: vm.slot,
        id: u32::from_be_bytes([f[4], f[5], f[6], f[7]]),
        remote: Address::new(address),
        protocol: f[0],
        v6: 1,
        pad: 0,
    };
    Ok((key, u16::from_be_bytes([f[2], f[3]]) >> 3, ETHERNET + IPV6 + FRAGMENT_HEADER))
}
