//! Forwarded flows, how many a VM may hold and open, and the datagrams that come to it in fragments. Nothing here decides what may flow.

use super::Address;

/// Most forwarded flows of all VMs together.
pub const MAX_FLOWS: u32 = 1 << 20;
/// Most forwarded flows of one VM: it fills its own share and nobody else's.
pub const MAX_FLOWS_PER_VM: u32 = 8192;

/// A flow that is forwarded in the kernel, as the guest sees it. Six words: it is hashed and compared for every frame.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The VM.
    pub slot: u16,
    /// IP protocol number.
    pub protocol: u8,
    /// 1 for IPv6.
    pub v6: u8,
    /// The guest's port, or the identifier of a ping.
    pub port: u16,
    /// The other end's port; 0 for a ping.
    pub remote_port: u16,
    /// The other end.
    pub remote: Address,
}

/// `Flow::state`: an answer came.
pub const FLOW_ANSWERED: u16 = 1;
/// `Flow::state`: the guest ended its side.
pub const FLOW_FIN_OUT: u16 = 2;
/// `Flow::state`: the other end ended its side.
pub const FLOW_FIN_IN: u16 = 4;
/// `Flow::state`: no rule allows it; the VM's mode lets it pass.
pub const FLOW_TOLERATED: u16 = 8;

/// What is known of a forwarded flow. What every frame needs comes first, for it to lie on few lines of the cache.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// The policy generation that it was judged under.
    pub policy: u32,
    /// `FLOW_…`.
    pub state: u16,
    /// The timer tick of `seen`, its lowest bits: within one tick the clock says nothing new.
    pub tick: u16,
    /// TCP: the next sequence number of the guest, as its last frame says.
    pub next: u32,
    /// TCP: the next sequence number that the guest expects.
    pub expected: u32,
    /// When a frame of it was last seen: nanoseconds of the monotonic clock.
    pub seen: u64,
    /// Frames from the guest.
    pub packets_out: u64,
    /// Octets from the guest.
    pub bytes_out: u64,
    /// Frames to the guest.
    pub packets_in: u64,
    /// Octets to the guest.
    pub bytes_in: u64,
    /// When it began.
    pub began: u64,
}

/// How many flows of a VM were made and ended by the programs. User space counts what it removes in a map of its own,
/// so that each number has one writer; the difference is what the VM holds. Lost updates of two processors are put right
/// there, whenever user space goes through the flows.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FlowCount {
    /// Made.
    pub opened: u64,
    /// Removed.
    pub closed: u64,
    /// When `tokens` was last filled up: nanoseconds of the monotonic clock.
    pub filled: u64,
    /// Flows that may be opened before more time goes by. The host remembers each for longer than it lasts here, and looking
    /// through what it remembers is what a new one costs.
    pub tokens: u32,
    /// Zero.
    pub pad: u32,
}

impl FlowCount {
    /// Takes a flow's token, at this time and rate. The first time finds a full bucket, for `filled` is zero.
    #[inline(always)]
    pub fn take_token(&mut self, time: u64, rate: u32) -> bool {
        const SECOND: u64 = 1_000_000_000;
        const HOUR: u64 = 3600 * SECOND;
        let rate = if rate == 0 { 1 } else { rate as u64 };
        let elapsed = time.saturating_sub(self.filled);
        // Below 2^62 for an hour of a million a second.
        let gained = if elapsed > HOUR { MAX_FLOWS_PER_VM as u64 } else { elapsed * rate / SECOND };
        if self.filled == 0 || self.tokens as u64 + gained >= MAX_FLOWS_PER_VM as u64 {
            self.tokens = MAX_FLOWS_PER_VM;
            self.filled = time;
        } else {
            self.tokens += gained as u32;
            // What is left of a token's time counts for the next.
            self.filled += gained * SECOND / rate;
        }
        if self.tokens == 0 {
            return false;
        }
        self.tokens -= 1;
        true
    }
}

/// Datagrams to guests whose first fragment has come and whose others are still to come.
pub const MAX_FRAGMENTS: u32 = 16_384;

/// What the fragments of one datagram to a guest have in common.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FragmentKey {
    /// The VM.
    pub slot: u32,
    /// The datagram's number.
    pub id: u32,
    /// Where it comes from.
    pub remote: Address,
    /// IP protocol number.
    pub protocol: u8,
    /// 1 for IPv6.
    pub v6: u8,
    /// Zero.
    pub pad: u16,
}

/// What the first fragment of a datagram was found to be: an answer to a flow of the guest.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fragment {
    /// When it came: nanoseconds of the monotonic clock.
    pub began: u64,
    /// The policy generation that its flow was judged under.
    pub policy: u32,
    /// Zero.
    pub pad: u32,
}
