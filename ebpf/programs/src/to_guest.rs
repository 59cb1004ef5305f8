//! What reaches a guest: the gateway's own, and answers to flows that the guest began. Nothing else.

use crate::{
    failures, flows, fragments,
    maps::{CONFIG, Maps, Scratch, policy, scratch, tap, vm},
    report::{self, Way},
    skb::{DROP, PASS, Skb},
};
use tapgate_ebpf_common::{
    Reason, Verdict, glance,
    judge::judge,
    maps::{Address, Flow, FlowKey, Tap, Vm},
    packet::{self, Ethertype, Header},
};

#[inline(always)]
pub fn run(skb: &Skb) -> i32 {
    let from = skb.came_by();
    if let Some(tap) = tap(skb.link()) {
        if from != 0 && from == uplink() && known(skb, tap) {
            report::passed(tap.slot, Reason::Cidr, Way::In, skb);
            return PASS;
        }
    }
    let Some(vm) = vm(skb.link()) else {
        report::stray(Way::In, skb);
        return DROP;
    };
    match admit(skb, vm, from) {
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
fn admit(skb: &Skb, vm: &Vm, from: u32) -> Result<Reason, Reason> {
    if from == 0 {
        return Ok(Reason::Answer);
    }
    if from != uplink() {
        return Err(Reason::OtherVm);
    }
    match classify(skb, vm) {
        ADMITTED => Ok(Reason::Cidr),
        reason => Err(reason_of(reason)),
    }
}

/// The device that answers come in by; without a configuration no device.
#[inline(always)]
fn uplink() -> u32 {
    CONFIG.get(0).map_or(0, |config| config.uplink)
}

/// Whether the frame is plainly of a known flow.
#[inline(always)]
fn known(skb: &Skb, tap: &Tap) -> bool {
    let Some(sight) = glance::to_guest(&skb.front(), tap) else { return false };
    match flows::find(&sight.key) {
        Some(flow) if flow.policy == policy(tap) => {
            flows::note_in(flow, sight.key.protocol, sight.segment.flags, skb);
            true
        }
        _ => false,
    }
}

/// What no reason is: the frame may pass.
pub const ADMITTED: u32 = 256;
/// What no reason is: a fragment, of IPv4 or of IPv6.
const PIECE_V4: u32 = 257;
const PIECE_V6: u32 = 258;

#[inline(always)]
fn reason_of(code: u32) -> Reason {
    Reason::from_u8(code as u8).unwrap_or(Reason::Fault)
}

/// Everything else: the reason why it may not pass, if it may not. What it calls are functions of their own, for the sake of
/// the stack.
#[inline(always)]
fn classify(skb: &Skb, vm: &Vm) -> u32 {
    let Some(Scratch { header, key, .. }) = scratch() else { return Reason::Fault as u32 };
    match parse(skb, header) {
        ADMITTED => {}
        PIECE_V4 => return fragments::admit(skb, vm, false, header, key),
        PIECE_V6 => return fragments::admit(skb, vm, true, header, key),
        reason => return reason,
    }
    admit_whole(skb, vm, header, key)
}

/// Whether a frame that is no fragment may pass.
#[inline(never)]
fn admit_whole(skb: &Skb, vm: &Vm, header: &mut Header, key: &mut FlowKey) -> u32 {
    match judge_answer(skb, vm, header, key) {
        Ok(()) => ADMITTED,
        Err(reason) => reason as u32,
    }
}

/// Reads the frame.
#[inline(never)]
fn parse(skb: &Skb, header: &mut Header) -> u32 {
    let kind = match packet::ethernet(skb) {
        Ok(frame) => frame.kind,
        Err(reason) => return reason as u32,
    };
    let (read, piece) = match kind {
        Ethertype::V4 => (packet::ipv4(skb, header), PIECE_V4),
        Ethertype::V6 => (packet::ipv6(skb, header), PIECE_V6),
        Ethertype::Vlan => return Reason::Vlan as u32,
        Ethertype::Arp | Ethertype::Other => return Reason::Ethertype as u32,
    };
    match read {
        Ok(()) => ADMITTED,
        Err(Reason::Fragment) => piece,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn judge_answer(skb: &Skb, vm: &Vm, header: &mut Header, key: &mut FlowKey) -> Result<(), Reason> {
    if header.destination != vm.own(header.v6) {
        return Err(Reason::OtherVm);
    }
    let icmp = header.is_icmp();
    let report =
        icmp && if header.v6 { matches!(header.icmp, 1..=4) } else { matches!(header.icmp, 3 | 11 | 12) };
    if report {
        if !failures::to_guest(skb, vm, header.v6, key) {
            return Err(Reason::NoRule);
        }
    } else {
        if icmp && header.icmp != if header.v6 { 129 } else { 0 } {
            return Err(Reason::Protocol);
        }
        *key = FlowKey {
            slot: vm.slot as u16,
            protocol: header.protocol,
            v6: header.v6 as u8,
            port: if icmp { header.source_port } else { header.port },
            remote_port: if icmp { 0 } else { header.source_port },
            remote: Address::new(header.source),
        };
    }
    let flags = header.flags;
    let flow = answered(vm, key, header)?;
    if !report {
        flows::note_in(flow, key.protocol, flags, skb);
    }
    Ok(())
}

/// The flow, if the VM has it and its policy still allows it.
#[inline(always)]
pub fn answered(vm: &Vm, key: &FlowKey, header: &mut Header) -> Result<&'static mut Flow, Reason> {
    let flow = flows::find(key).ok_or(Reason::NoRule)?;
    if flow.policy != vm.policy {
        if !still_allowed(vm, key, header) {
            return Err(Reason::Revoked);
        }
        flow.policy = vm.policy;
    }
    Ok(flow)
}

/// Judges the flow anew, as if the guest sent a frame of it. Makes that frame's header of the one that came.
#[inline(never)]
fn still_allowed(vm: &Vm, key: &FlowKey, header: &mut Header) -> bool {
    header.v6 = key.v6 != 0;
    header.protocol = key.protocol;
    header.flags = packet::ACK;
    header.icmp = if header.v6 { 128 } else { 8 };
    header.source = vm.own(header.v6);
    header.destination = key.remote.octets();
    header.source_port = key.port;
    header.port = key.remote_port;
    matches!(judge(header, vm, &Maps), Verdict::Uplink(_) | Verdict::Tolerate(_))
}
