//! What reaches a guest: the gateway's own, and answers to flows that the guest began. Nothing else.

use crate::{
    flows,
    maps::{CONFIG, Maps, Scratch, VMS, scratch},
    report::{self, Way},
    skb::{DROP, PASS, Skb},
};
use tapgate_ebpf_common::{
    Reason, Verdict,
    judge::judge,
    maps::{FlowKey, Vm, mapped},
    packet::{self, ETHERNET, Ethertype, Header, ICMP, ICMP6, IPV4, IPV6, Packet},
};

#[inline(always)]
pub fn run(skb: &Skb) -> i32 {
    let Some(vm) = VMS.get_ptr(skb.link()) else {
        report::stray(Way::In, skb);
        return DROP;
    };
    // SAFETY: the entry is replaced, never written, and lives until after the program's run.
    let vm = unsafe { &*vm };
    match admit(skb, vm) {
        Ok(reason) => {
            report::passed(vm.slot, reason, Way::In, skb);
            PASS
        }
        Err(reason) => {
            report::dropped(vm.slot, reason, Way::In, skb);
            DROP
        }
    }
}

#[inline(always)]
fn admit(skb: &Skb, vm: &Vm) -> Result<Reason, Reason> {
    let from = skb.came_by();
    if from == 0 {
        return Ok(Reason::Answer);
    }
    let config = CONFIG.get(0).ok_or(Reason::Fault)?;
    if from != config.uplink {
        return Err(Reason::OtherVm);
    }
    let Scratch { header, key, .. } = scratch().ok_or(Reason::Fault)?;
    match packet::ethernet(skb)?.kind {
        Ethertype::V4 => packet::ipv4(skb, header)?,
        Ethertype::V6 => packet::ipv6(skb, header)?,
        Ethertype::Vlan => return Err(Reason::Vlan),
        Ethertype::Arp | Ethertype::Other => return Err(Reason::Ethertype),
    }
    let own = if header.v6 { vm.v6 } else { mapped(vm.v4) };
    if header.destination != own {
        return Err(Reason::OtherVm);
    }
    let icmp = header.protocol == ICMP || header.protocol == ICMP6;
    let report =
        icmp && if header.v6 { matches!(header.icmp, 1..=4) } else { matches!(header.icmp, 3 | 11 | 12) };
    if report {
        reported(skb, vm, header, key).ok_or(Reason::NoRule)?;
    } else {
        if icmp && header.icmp != if header.v6 { 129 } else { 0 } {
            return Err(Reason::Protocol);
        }
        *key = FlowKey {
            slot: vm.slot,
            protocol: header.protocol,
            v6: header.v6 as u8,
            port: if icmp { header.source_port } else { header.port },
            remote: header.source,
            remote_port: if icmp { 0 } else { header.source_port },
            pad: 0,
        };
    }
    let flow = flows::find(key).ok_or(Reason::NoRule)?;
    if !report {
        flows::note_in(flow, header, skb);
    }
    if flow.policy != vm.policy {
        if !still_allowed(vm, key, header) {
            return Err(Reason::Revoked);
        }
        flow.policy = vm.policy;
    }
    Ok(Reason::Cidr)
}

/// Judges the flow anew, as if the guest sent a frame of it. Makes that frame's header of the one that came.
#[inline(always)]
fn still_allowed(vm: &Vm, key: &FlowKey, header: &mut Header) -> bool {
    header.protocol = key.protocol;
    header.flags = packet::ACK;
    header.icmp = if header.v6 { 128 } else { 8 };
    header.source = header.destination;
    header.destination = key.remote;
    header.source_port = key.port;
    header.port = key.remote_port;
    matches!(judge(header, vm, &Maps), Verdict::Uplink(_) | Verdict::Tolerate(_))
}

/// The flow that an ICMP report of a failure is about: its payload begins with the guest's own packet.
#[inline(always)]
fn reported(skb: &Skb, vm: &Vm, header: &Header, key: &mut FlowKey) -> Option<()> {
    let ports: [u8; 8];
    if header.v6 {
        const AT: usize = ETHERNET + IPV6 + 8;
        let h: [u8; 40] = skb.read(AT)?;
        if h[8..24] != vm.v6 {
            return None;
        }
        key.remote.copy_from_slice(&h[24..40]);
        key.protocol = h[6];
        ports = skb.read(AT + IPV6)?;
    } else {
        const AT: usize = ETHERNET + IPV4 + 8;
        let h: [u8; 20] = skb.read(AT)?;
        if h[0] != 0x45 || h[12..16] != vm.v4 {
            return None;
        }
        key.remote = mapped([h[16], h[17], h[18], h[19]]);
        key.protocol = h[9];
        ports = skb.read(AT + IPV4)?;
    }
    let ping = key.protocol == ICMP || key.protocol == ICMP6;
    key.slot = vm.slot;
    key.v6 = header.v6 as u8;
    key.port = if ping {
        u16::from_be_bytes([ports[4], ports[5]])
    } else {
        u16::from_be_bytes([ports[0], ports[1]])
    };
    key.remote_port = if ping { 0 } else { u16::from_be_bytes([ports[2], ports[3]]) };
    key.pad = 0;
    Some(())
}
