//! What is told of VMs: events, attempts that are counted instead, and the counters of all frames. Nothing here is judged by.

use super::Address;

/// Octets of the event ring buffer.
pub const RING_BYTES: u32 = 1 << 20;
/// Events that a VM can send in one go.
pub const EVENT_BURST: u32 = 512;
/// Events a second that a VM can send in the long run.
pub const EVENT_RATE: u64 = 200;
/// Length of a per-reason counter array; a power of two so that the verifier sees its bound in a mask.
pub const REASONS: usize = 64;

const _: () = assert!(crate::Reason::COUNT <= REASONS);

/// Most attempts of one VM that are told apart while they go on; what is beyond is told one by one, or counted as lost.
pub const MAX_ATTEMPTS_PER_VM: u32 = 1024;
/// Most of all VMs together.
pub const MAX_ATTEMPTS: u32 = 1 << 18;

/// One thing that a VM tries, however often. The first time is told by an [`Event`], the others are counted.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct AttemptKey {
    /// The VM.
    pub slot: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// `EVENT_…`.
    pub verdict: u8,
    /// A [`crate::Reason`].
    pub reason: u8,
    /// 1 for IPv6.
    pub v6: u8,
    /// Destination address.
    pub destination: Address,
    /// Destination port, where the protocol has ports; the type of an ICMP message.
    pub port: u16,
    /// Zero.
    pub pad: u16,
}

/// How often it was tried; one for each processor.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attempts {
    /// Attempts that no event of the ring buffer stands for; only ever rises.
    pub count: u64,
    /// The last one: nanoseconds of the monotonic clock.
    pub seen: u64,
}

/// Token bucket of a VM's events.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Bucket {
    /// When it was last filled up: nanoseconds of the monotonic clock.
    pub filled: u64,
    /// What is left.
    pub tokens: u32,
    /// How many entries of attempts the programs made; user space counts what it removes in a map of its own.
    pub made: u32,
}

/// How many of the reasons, from the first, let frames through.
pub const PASSING: usize = 8;

const _: () =
    assert!((crate::Reason::NoRule as usize) < PASSING && (crate::Reason::Answer as usize) < PASSING);

/// What every frame is counted in, by slot, one set for each processor: small and quick to find.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Frames that were let through, by reason.
    pub passed: [u64; PASSING],
    /// Frames from the guest.
    pub packets_out: u64,
    /// Octets from the guest.
    pub bytes_out: u64,
    /// Frames to the guest.
    pub packets_in: u64,
    /// Octets to the guest.
    pub bytes_in: u64,
}

/// What frames that go nowhere are counted in, by slot, one set for each processor.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drops {
    /// Frames that were dropped or refused, by reason.
    pub dropped: [u64; REASONS],
    /// Events that the token bucket or a full ring buffer kept back.
    pub events_lost: u64,
}

/// A slot that is no VM's: its counters hold what came from taps that no VM has.
pub const NO_SLOT: u32 = u32::MAX;

/// `Event::verdict`: a rule allowed it.
pub const EVENT_ALLOWED: u8 = 0;
/// `Event::verdict`: it was dropped or refused.
pub const EVENT_DENIED: u8 = 1;
/// `Event::verdict`: no rule allows it; the VM's mode let it pass.
pub const EVENT_TOLERATED: u8 = 2;

/// What the ring buffer carries: one thing that a VM tried and that the proxy does not see.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// Nanoseconds of the monotonic clock.
    pub time: u64,
    /// The VM.
    pub slot: u32,
    /// IP protocol number.
    pub protocol: u8,
    /// `EVENT_…`.
    pub verdict: u8,
    /// A [`crate::Reason`].
    pub reason: u8,
    /// 1 for IPv6.
    pub v6: u8,
    /// Source address.
    pub source: [u8; 16],
    /// Destination address.
    pub destination: [u8; 16],
    /// Source port, where the protocol has ports.
    pub source_port: u16,
    /// Destination port, where the protocol has ports; the type of an ICMP message.
    pub port: u16,
    /// Octets of the frame.
    pub length: u32,
}
