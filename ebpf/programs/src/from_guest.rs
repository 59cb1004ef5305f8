//! What a guest sends: read, judged, and marked for the one route that its verdict names.

use crate::{
    failures, flows,
    maps::{Maps, Scratch, policy, scratch, tap, vm},
    offload,
    report::{self, Way},
    skb::{DROP, PASS, Skb},
    sockets::{self, Found},
};
use tapgate_ebpf_common::{
    Reason, Verdict, glance,
    judge::{judge, read, service},
    maps::{EVENT_ALLOWED, EVENT_DENIED, EVENT_TOLERATED, FLOW_TOLERATED, Flow, FlowKey, Listener, Tap, Vm},
    net::{MARK_PROXY, MARK_REJECT, MARK_UPLINK},
    packet::{Header, Segment, TCP},
};

#[inline(always)]
pub fn run(skb: &Skb) -> i32 {
    // What the guest's side may have left in the mark is no verdict.
    skb.set_mark(0);
    if let Some(tap) = tap(skb.link()) {
        match known(skb, tap) {
            UNKNOWN => {}
            verdict => return verdict,
        }
    }
    let Some(vm) = vm(skb.link()) else {
        report::stray(Way::Out, skb);
        return DROP;
    };
    let Some(scratch) = scratch() else { return drop(skb, vm, Reason::Fault) };
    match parse(skb, vm, &mut scratch.header) {
        PARSED if offload::fits(skb, scratch.header.v6, scratch.header.protocol) => {
            classify(skb, vm, scratch)
        }
        PARSED => drop(skb, vm, Reason::Malformed),
        code if code & GATEWAY != 0 && offload::fits(skb, false, 0) => {
            pass(skb, vm.slot, MARK_PROXY, reason_of(code))
        }
        code if code & GATEWAY != 0 => drop(skb, vm, Reason::Malformed),
        code => drop(skb, vm, reason_of(code)),
    }
}

/// What no verdict is.
const UNKNOWN: i32 = -1;

/// A frame that is plainly of a known flow.
#[inline(always)]
fn known(skb: &Skb, tap: &Tap) -> i32 {
    let Some(sight) = glance::from_guest(&skb.front(), tap) else { return UNKNOWN };
    match flows::find(&sight.key) {
        Some(flow)
            if flow.policy == policy(tap) && offload::fits(skb, sight.key.v6 != 0, sight.key.protocol) =>
        {
            forward(skb, &sight.key, &sight.segment, flow)
        }
        _ => UNKNOWN,
    }
}

/// Everything else, once it is read. A function of its own, for the sake of the stack.
#[inline(never)]
fn classify(skb: &Skb, vm: &Vm, scratch: &mut Scratch) -> i32 {
    flows::key(&mut scratch.key, vm, &scratch.header);
    let verdict = match service(&scratch.header) {
        Some(verdict) => verdict,
        None => match flow(&scratch.header, &scratch.key) {
            None => decide(&scratch.header, vm),
            Some(flow) if flow.policy == vm.policy => {
                return forward(skb, &scratch.key, &scratch.header.segment(), flow);
            }
            Some(flow) => match decide(&scratch.header, vm) {
                Verdict::Uplink(_) | Verdict::Tolerate(_) => {
                    flow.policy = vm.policy;
                    return forward(skb, &scratch.key, &scratch.header.segment(), flow);
                }
                verdict => {
                    flows::close(&scratch.key);
                    // A connection is cut: whatever it might be now, it was not begun as that.
                    let cut = scratch.header.protocol == TCP && !scratch.header.opens();
                    if cut { Verdict::Refuse(Reason::Revoked) } else { verdict }
                }
            },
        },
    };
    carry_out(skb, vm, scratch, verdict)
}

/// The flow that it may be of. Of ICMP only the questions of pings are any: other messages have no identifier to be told by.
#[inline(always)]
fn flow(header: &Header, key: &FlowKey) -> Option<&'static mut Flow> {
    if header.is_icmp() && !header.pings() { None } else { flows::find(key) }
}

/// What no reason is: there is a header to judge.
const PARSED: u32 = 256;
/// Beside a reason: the gateway's own stack takes the frame.
const GATEWAY: u32 = 512;

#[inline(always)]
fn reason_of(code: u32) -> Reason {
    Reason::from_u8(code as u8).unwrap_or(Reason::Fault)
}

/// Reads the frame. A function of its own, for the sake of the stack, so its answer is a number.
#[inline(never)]
fn parse(skb: &Skb, vm: &Vm, header: &mut Header) -> u32 {
    match read(skb, vm, header) {
        Ok(()) => PARSED,
        Err(Verdict::Gateway(reason)) => GATEWAY | reason as u32,
        Err(Verdict::Drop(reason)) => reason as u32,
        Err(_) => Reason::Fault as u32,
    }
}

/// The rules' verdict. A function of its own, for the sake of the stack.
#[inline(never)]
fn decide(header: &Header, vm: &Vm) -> Verdict {
    judge(header, vm, &Maps)
}

/// Another frame of a flow that is known and allowed.
#[inline(always)]
fn forward(skb: &Skb, key: &FlowKey, segment: &Segment, flow: &mut Flow) -> i32 {
    let tolerated = flow.state & FLOW_TOLERATED != 0;
    if flows::note_out(flow, key.protocol, segment, skb) {
        flows::close(key);
    }
    pass(skb, key.slot as u32, MARK_UPLINK, if tolerated { Reason::NoRule } else { Reason::Cidr })
}

#[inline(always)]
fn carry_out(skb: &Skb, vm: &Vm, scratch: &mut Scratch, verdict: Verdict) -> i32 {
    let header = &scratch.header;
    match verdict {
        Verdict::Gateway(reason) => pass(skb, vm.slot, MARK_PROXY, reason),
        Verdict::Answer => match sockets::connection(skb, header) {
            Found::Connection | Found::TimeWait => pass(skb, vm.slot, MARK_PROXY, Reason::Answer),
            Found::Nothing => refuse(skb, vm, Reason::HostAddress),
        },
        Verdict::Proxy(listener, reason) => hand_over(skb, vm, header, listener, reason),
        Verdict::Uplink(reason) => out(skb, vm, scratch, reason, false),
        Verdict::Tolerate(reason) => out(skb, vm, scratch, reason, true),
        Verdict::Drop(reason) => {
            report::event(vm.slot, header, reason, EVENT_DENIED, skb);
            drop(skb, vm, reason)
        }
        Verdict::Refuse(reason) => {
            // One event for each attempt, not for what an attempt's remains still send.
            if header.protocol != TCP || header.opens() || reason == Reason::Revoked {
                report::event(vm.slot, header, reason, EVENT_DENIED, skb);
            }
            refuse(skb, vm, reason)
        }
    }
}

/// To a listener of the proxy. A connection that is there finds its socket by itself, on the local route that the mark
/// leads to; what belongs to none gets the stack's reset.
#[inline(always)]
fn hand_over(skb: &Skb, vm: &Vm, header: &Header, listener: Listener, reason: Reason) -> i32 {
    if header.protocol == TCP {
        if !header.opens() || sockets::connection(skb, header) == Found::Connection {
            return pass(skb, vm.slot, MARK_PROXY, reason);
        }
    }
    if sockets::assign(skb, listener, header.v6) {
        pass(skb, vm.slot, MARK_PROXY, reason)
    } else {
        drop(skb, vm, Reason::Fault)
    }
}

/// Out by the uplink, as a new flow.
#[inline(always)]
fn out(skb: &Skb, vm: &Vm, scratch: &mut Scratch, reason: Reason, tolerated: bool) -> i32 {
    let header = &scratch.header;
    if header.protocol == TCP {
        // A connection that the proxy has from before a rule was added stays the proxy's.
        if !header.opens() && sockets::connection(skb, header) == Found::Connection {
            return pass(skb, vm.slot, MARK_PROXY, reason);
        }
    } else if header.is_icmp() && !header.pings() {
        // A report of a failure is no flow, but about one.
        if failures::by_guest(skb, vm, scratch) {
            return pass(skb, vm.slot, MARK_UPLINK, reason);
        }
        report::event(vm.slot, &scratch.header, Reason::Protocol, EVENT_DENIED, skb);
        return drop(skb, vm, Reason::Protocol);
    }
    match flows::open(vm, scratch, tolerated, skb.len()) {
        Ok(()) => {
            let verdict = if tolerated { EVENT_TOLERATED } else { EVENT_ALLOWED };
            report::event(vm.slot, &scratch.header, reason, verdict, skb);
            pass(skb, vm.slot, MARK_UPLINK, reason)
        }
        Err(why) => {
            report::event(vm.slot, &scratch.header, why, EVENT_DENIED, skb);
            refuse(skb, vm, why)
        }
    }
}

#[inline(always)]
fn pass(skb: &Skb, slot: u32, mark: u32, reason: Reason) -> i32 {
    skb.set_mark(mark);
    report::passed(slot, reason, Way::Out, skb);
    PASS
}

#[inline(always)]
fn refuse(skb: &Skb, vm: &Vm, reason: Reason) -> i32 {
    skb.set_mark(MARK_REJECT);
    report::dropped(vm.slot, reason, Way::Out, skb);
    PASS
}

#[inline(always)]
fn drop(skb: &Skb, vm: &Vm, reason: Reason) -> i32 {
    report::dropped(vm.slot, reason, Way::Out, skb);
    DROP
}
