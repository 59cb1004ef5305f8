//! What reaches a guest: the gateway's own, and answers to flows that the guest began. Nothing else.

use crate::{
    flows,
    maps::{CONFIG, Maps, VMS},
    report::{self, Way},
    skb::{DROP, PASS, Skb},
};
use tapgate_ebpf_common::{
    Reason, Verdict,
    judge::judge,
    maps::{FlowKey, Vm, mapped},
    packet::{self, Ethertype, Header, ICMP, ICMP6, Packet},
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
    let header = match packet::ethernet(skb)?.kind {
        Ethertype::V4 => packet::ipv4(skb)?,
        Ethertype::V6 => packet::ipv6(skb)?,
        Ethertype::Vlan => return Err(Reason::Vlan),
        Ethertype::Arp | Ethertype::Other => return Err(Reason::Ethertype),
    };
    let own = if header.v6 { vm.v6 } else { mapped(vm.v4) };
    if header.destination != own {
        return Err(Reason::OtherVm);
    }
    let icmp = header.protocol == ICMP || header.protocol == ICMP6;
    let report = icmp && if header.v6 { matches!(header.icmp, 1..=4) } else { matches!(header.icmp, 3 | 11 | 12) };
    let key = if report {
        reported(skb, vm, &header).ok_or(Reason::NoRule)?
    } else {
        if icmp && header.icmp != if header.v6 { 129 } else { 0 } {
            return Err(Reason::Protocol);
        }
        FlowKey {
            slot: vm.slot,
            protocol: header.protocol,
            v6: header.v6 as u8,
            port: if icmp { header.source_port } else { header.port },
            remote: header.source,
            remote_port: if icmp { 0 } else { header.source_port },
            pad: 0,
        }
    };
    let flow = flows::find(&key).ok_or(Reason::NoRule)?;
    if flow.policy != vm.policy {
        if !still_allowed(vm, &key) {
            return Err(Reason::Revoked);
        }
        flow.policy = vm.policy;
    }
    if !report {
        flows::note_in(flow, &header, skb);
    }
    Ok(Reason::Cidr)
}

/// Judges the flow anew, as if the guest sent a frame of it.
#[inline(always)]
fn still_allowed(vm: &Vm, key: &FlowKey) -> bool {
    let v6 = key.v6 != 0;
    let header = Header {
        v6,
        protocol: key.protocol,
        flags: packet::ACK,
        icmp: if v6 { 128 } else { 8 },
        source: if v6 { vm.v6 } else { mapped(vm.v4) },
        destination: key.remote,
        source_port: key.port,
        port: key.remote_port,
        sequence: 0,
        acknowledged: 0,
        payload: 0,
        offset: 0,
    };
    matches!(judge(&header, vm, &Maps), Verdict::Uplink(_) | Verdict::Tolerate(_))
}

/// The flow that an ICMP report of a failure is about: its payload begins with the guest's own packet.
#[inline(always)]
fn reported(skb: &Skb, vm: &Vm, header: &Header) -> Option<FlowKey> {
    let at = header.offset + 8;
    let (source, remote, protocol, offset) = if header.v6 {
        let h: [u8; 40] = skb.read(at)?;
        let (mut source, mut remote) = ([0; 16], [0; 16]);
        source.copy_from_slice(&h[8..24]);
        remote.copy_from_slice(&h[24..40]);
        (source, remote, h[6], at + 40)
    } else {
        let h: [u8; 20] = skb.read(at)?;
        if h[0] != 0x45 {
            return None;
        }
        (mapped([h[12], h[13], h[14], h[15]]), mapped([h[16], h[17], h[18], h[19]]), h[9], at + 20)
    };
    if source != if header.v6 { vm.v6 } else { mapped(vm.v4) } {
        return None;
    }
    let ports: [u8; 8] = skb.read(offset)?;
    let ping = protocol == ICMP || protocol == ICMP6;
    Some(FlowKey {
        slot: vm.slot,
        protocol,
        v6: header.v6 as u8,
        port: if ping { u16::from_be_bytes([ports[4], ports[5]]) } else { u16::from_be_bytes([ports[0], ports[1]]) },
        remote,
        remote_port: if ping { 0 } else { u16::from_be_bytes([ports[2], ports[3]]) },
        pad: 0,
    })
}
