//! The table of forwarded flows. A VM has its share of it; a full share refuses the VM's new flows and no other's.

use crate::{
    maps::{CONFIG, FLOW_COUNTS, FLOWS, FLOWS_EXPIRED, Scratch},
    report::{now, tick},
    skb::Skb,
};
use tapgate_ebpf_common::{
    Reason,
    maps::{
        Address, FLOW_ANSWERED, FLOW_FIN_IN, FLOW_FIN_OUT, FLOW_TOLERATED, Flow, FlowKey, MAX_FLOWS_PER_VM,
        Vm,
    },
    packet::{FIN, Header, RST, Segment, TCP},
};

const NO_EXIST: u64 = 1;

/// The flow of a frame from the guest.
#[inline(always)]
pub fn key(key: &mut FlowKey, vm: &Vm, header: &Header) {
    *key = FlowKey {
        slot: vm.slot as u16,
        protocol: header.protocol,
        v6: header.v6 as u8,
        port: header.source_port,
        remote_port: header.port,
        remote: Address::new(header.destination),
    };
}

#[inline(always)]
pub fn find(key: &FlowKey) -> Option<&'static mut Flow> {
    let flow = FLOWS.get_ptr_mut(key)?;
    // SAFETY: the memory stays the table's. If the entry is removed meanwhile it may become another flow's, whose policy then is of
    // another generation, so that it is judged anew. Each direction writes fields of its own; a lost update of a counter or of
    // the time does no harm.
    Some(unsafe { &mut *flow })
}

/// Takes a flow up. `Err` says why the VM cannot have another. A function of its own, for the sake of the stack.
#[inline(never)]
pub fn open(vm: &Vm, scratch: &mut Scratch, tolerated: bool, length: u32) -> Result<(), Reason> {
    let Scratch { header, key, flow, .. } = scratch;
    let counts = FLOW_COUNTS.get_ptr_mut(key.slot as u32).ok_or(Reason::Fault)?;
    let expired = FLOWS_EXPIRED.get_ptr(key.slot as u32).ok_or(Reason::Fault)?;
    // SAFETY: plain integers of a live entry; `opened` and `closed` are only ever added to.
    let held = unsafe { (*counts).opened.wrapping_sub((*counts).closed).wrapping_sub(*expired) };
    if held >= MAX_FLOWS_PER_VM as u64 {
        return Err(Reason::Limit);
    }
    let time = now();
    let rate = CONFIG.get(0).ok_or(Reason::Fault)?.flow_rate;
    // SAFETY: plain integers; two processors may both take the last token, a flow more does no harm.
    if !unsafe { (*counts).take_token(time, rate) } {
        return Err(Reason::Limit);
    }
    *flow = Flow {
        policy: vm.policy,
        state: if tolerated { FLOW_TOLERATED } else { 0 },
        tick: tick(),
        seen: time,
        began: time,
        next: header.segment().next(),
        expected: header.acknowledged,
        packets_out: 1,
        bytes_out: length as u64,
        packets_in: 0,
        bytes_in: 0,
    };
    match FLOWS.insert(&*key, &*flow, NO_EXIST) {
        Ok(()) => {
            // SAFETY: as above. Two processors may lose one; user space corrects the difference whenever it counts.
            unsafe { (*counts).opened = (*counts).opened.wrapping_add(1) };
            Ok(())
        }
        // Another processor was faster with the same flow.
        Err(error) if error == -17 => Ok(()),
        Err(_) => Err(Reason::Fault),
    }
}

/// Forgets a flow.
#[inline(always)]
pub fn close(key: &FlowKey) {
    if FLOWS.remove(key).is_ok() {
        if let Some(counts) = FLOW_COUNTS.get_ptr_mut(key.slot as u32) {
            // SAFETY: plain integers of a live entry, as in `open`.
            unsafe { (*counts).closed = (*counts).closed.wrapping_add(1) };
        }
    }
}

/// Notes that the flow lives. The clock is as exact as the timer tick, so it is asked once for each.
#[inline(always)]
fn touch(flow: &mut Flow) {
    let tick = tick();
    if flow.tick != tick {
        flow.tick = tick;
        flow.seen = now();
    }
}

/// Notes a frame from the guest. Says whether the flow is over.
#[inline(always)]
pub fn note_out(flow: &mut Flow, protocol: u8, segment: &Segment, skb: &Skb) -> bool {
    touch(flow);
    flow.packets_out += 1;
    flow.bytes_out += skb.len() as u64;
    if protocol != TCP {
        return false;
    }
    let after = segment.next();
    if segment.opens() {
        flow.state &= FLOW_TOLERATED;
        flow.next = after;
    } else {
        // Only forward: a retransmission says nothing new.
        if after.wrapping_sub(flow.next) < 1 << 31 {
            flow.next = after;
        }
        flow.expected = segment.acknowledged;
    }
    if segment.flags & FIN != 0 {
        flow.state |= FLOW_FIN_OUT;
    }
    segment.flags & RST != 0
}

/// Notes a frame to the guest. A reset from outside may be forged: the guest decides whether it believes it, and the flow
/// expires by itself.
#[inline(always)]
pub fn note_in(flow: &mut Flow, protocol: u8, flags: u8, skb: &Skb) {
    touch(flow);
    flow.packets_in += 1;
    flow.bytes_in += skb.len() as u64;
    if flow.state & FLOW_ANSWERED == 0 {
        flow.state |= FLOW_ANSWERED;
    }
    if protocol == TCP && flags & FIN != 0 {
        flow.state |= FLOW_FIN_IN;
    }
}
