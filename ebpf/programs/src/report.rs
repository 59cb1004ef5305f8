//! Counts every frame and reports what the proxy does not see. A VM that floods uses up its own bucket only, and
//! what is kept back is counted.

use crate::{
    maps::{ATTEMPTS, ATTEMPTS_GONE, BUCKETS, DROPS, EVENTS, TRAFFIC, scratch},
    skb::Skb,
};
use aya_ebpf::helpers::{bpf_jiffies64, bpf_ktime_get_coarse_ns};
use tapgate_ebpf_common::{
    Reason,
    maps::{
        Address, AttemptKey, Attempts, Bucket, Drops, EVENT_BURST, EVENT_RATE, Event, MAX_ATTEMPTS_PER_VM,
        NO_SLOT, PASSING, REASONS, Traffic,
    },
    packet::{Header, ICMP, ICMP6},
};

const SECOND: u64 = 1_000_000_000;
const NO_EXIST: u64 = 1;

/// Nanoseconds of the monotonic clock, as exact as the timer tick.
#[inline(always)]
pub fn now() -> u64 {
    // SAFETY: the helper has no arguments and cannot fail.
    unsafe { bpf_ktime_get_coarse_ns() }
}

/// The timer tick, its lowest bits: a word of memory, where the clock is a call.
#[inline(always)]
pub fn tick() -> u16 {
    // SAFETY: as above.
    unsafe { bpf_jiffies64() as u16 }
}

#[inline(always)]
fn drops(slot: u32) -> Option<&'static mut Drops> {
    let drops = DROPS.get_ptr_mut(slot)?;
    // SAFETY: the entry is this processor's own, and lives until after the program's run.
    Some(unsafe { &mut *drops })
}

#[derive(Clone, Copy)]
pub enum Way {
    Out,
    In,
}

/// Counts a frame that was let through.
#[inline(always)]
pub fn passed(slot: u32, reason: Reason, way: Way, skb: &Skb) {
    if let Some(traffic) = add(slot, way, skb.len()) {
        traffic.passed[reason as usize & (PASSING - 1)] += 1;
    }
}

/// Counts a frame that was dropped or refused.
#[inline(always)]
pub fn dropped(slot: u32, reason: Reason, way: Way, skb: &Skb) {
    #[cfg(feature = "log")]
    log(slot, reason as u32, matches!(way, Way::Out) as u32, skb);
    add(slot, way, skb.len());
    if let Some(drops) = drops(slot) {
        drops.dropped[reason as usize & (REASONS - 1)] += 1;
    }
}

/// For people, in development builds.
#[cfg(feature = "log")]
#[inline(never)]
fn log(slot: u32, reason: u32, from_guest: u32, skb: &Skb) {
    let context = aya_ebpf::programs::TcContext::new(skb.raw());
    aya_log_ebpf::debug!(
        &context,
        "slot {}: dropped, reason {}, from guest {}, {} octets",
        slot,
        reason,
        from_guest,
        skb.len()
    );
}

#[inline(always)]
fn add(slot: u32, way: Way, length: u32) -> Option<&'static mut Traffic> {
    let traffic = TRAFFIC.get_ptr_mut(slot)?;
    // SAFETY: the entry is this processor's own.
    let traffic = unsafe { &mut *traffic };
    match way {
        Way::Out => {
            traffic.packets_out += 1;
            traffic.bytes_out += length as u64;
        }
        Way::In => {
            traffic.packets_in += 1;
            traffic.bytes_in += length as u64;
        }
    }
    Some(traffic)
}

/// Counts a frame on a tap that no VM has.
#[inline(always)]
pub fn stray(way: Way, skb: &Skb) {
    dropped(NO_SLOT, Reason::UnknownVm, way, skb);
}

/// Reports what the guest tried: the first time by an event, as far as its bucket goes, and by counting from then on. A
/// function of its own, for the sake of the stack.
#[inline(never)]
pub fn event(slot: u32, header: &Header, reason: Reason, verdict: u8, skb: &Skb) {
    let Some(scratch) = scratch() else { return lost(slot) };
    let icmp = header.protocol == ICMP || header.protocol == ICMP6;
    let key = &mut scratch.attempt;
    *key = AttemptKey {
        slot,
        protocol: header.protocol,
        verdict,
        reason: reason as u8,
        v6: header.v6 as u8,
        destination: Address::new(header.destination),
        port: if icmp { header.icmp as u16 } else { header.port },
        pad: 0,
    };
    let time = now();
    if let Some(attempts) = ATTEMPTS.get_ptr_mut(&*key) {
        // SAFETY: the entry is this processor's own, and lives until after the program's run.
        let attempts = unsafe { &mut *attempts };
        attempts.count += 1;
        attempts.seen = time;
        return;
    }
    let (Some(bucket), Some(gone)) = (BUCKETS.get_ptr_mut(slot), ATTEMPTS_GONE.get_ptr(slot)) else {
        return lost(slot);
    };
    // SAFETY: plain integers. Two processors may both take the last token; an event more does no harm.
    let bucket = unsafe { &mut *bucket };
    let told = may_report(bucket, time) && tell(key, header, time, skb);
    let first = Attempts { count: !told as u64, seen: time };
    // SAFETY: a plain integer.
    let held = bucket.made.wrapping_sub(unsafe { *gone });
    if held < MAX_ATTEMPTS_PER_VM && ATTEMPTS.insert(&*key, &first, NO_EXIST).is_ok() {
        bucket.made = bucket.made.wrapping_add(1);
    } else if !told {
        lost(slot);
    }
}

/// Puts the event into the ring buffer, if there is room.
#[inline(always)]
fn tell(key: &AttemptKey, header: &Header, time: u64, skb: &Skb) -> bool {
    let Some(mut entry) = EVENTS.reserve::<Event>(0) else { return false };
    entry.write(Event {
        time,
        slot: key.slot,
        protocol: key.protocol,
        verdict: key.verdict,
        reason: key.reason,
        v6: key.v6,
        source: header.source,
        destination: header.destination,
        source_port: header.source_port,
        port: key.port,
        length: skb.len(),
    });
    entry.submit(0);
    true
}

#[inline(always)]
fn lost(slot: u32) {
    if let Some(drops) = drops(slot) {
        drops.events_lost += 1;
    }
}

#[inline(always)]
fn may_report(bucket: &mut Bucket, time: u64) -> bool {
    let gained = time.saturating_sub(bucket.filled) / (SECOND / EVENT_RATE);
    if gained > 0 {
        let tokens = bucket.tokens as u64 + gained;
        bucket.tokens = if tokens > EVENT_BURST as u64 { EVENT_BURST } else { tokens as u32 };
        bucket.filled = time;
    }
    if bucket.tokens == 0 {
        return false;
    }
    bucket.tokens -= 1;
    true
}
