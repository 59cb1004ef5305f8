//! Keys and values of the BPF maps. Plain data without padding: what one side writes, the other reads as it is.
//!
//! Addresses are 16 octets everywhere; an IPv4 address is written as `::ffff:a.b.c.d`, which no frame can carry as
//! IPv6 (the ranges deny it), so the two families never meet.

/// Rises with every change of this file or of what the programs expect of the maps: names the pin directory.
pub const VERSION: u32 = 6;
/// Most VMs that the maps hold; slots are below it.
pub const MAX_VMS: u32 = 8192;
const _: () = assert!(MAX_VMS <= u16::MAX as u32);
/// Entries of the table of taps, a power of two: an index of a tap is found at its lowest bits.
pub const TAPS: u32 = 32_768;
/// Most `cidr` rules of all VMs together, both generations of a change counted.
pub const MAX_RULES: u32 = 4_000_000;
/// Most forwarded flows of all VMs together.
pub const MAX_FLOWS: u32 = 1 << 20;
/// Most forwarded flows of one VM: it fills its own share and nobody else's.
pub const MAX_FLOWS_PER_VM: u32 = 8192;
/// Most addresses of the host.
pub const MAX_HOST_ADDRESSES: u32 = 4096;
/// Octets of the event ring buffer.
pub const RING_BYTES: u32 = 1 << 20;
/// Events that a VM can send in one go.
pub const EVENT_BURST: u32 = 512;
/// Events a second that a VM can send in the long run.
pub const EVENT_RATE: u64 = 200;
/// Length of a per-reason counter array; a power of two so that the verifier sees its bound in a mask.
pub const REASONS: usize = 64;

const _: () = assert!(crate::Reason::COUNT <= REASONS);

/// An IPv4 address as the maps hold it.
#[inline(always)]
pub const fn mapped(a: [u8; 4]) -> [u8; 16] {
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, a[0], a[1], a[2], a[3]]
}

/// An address in words, octets in the order of the wire: copied, compared and hashed a word at a time.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Address(pub [u32; 4]);

impl Address {
    /// The address of these octets.
    #[inline(always)]
    pub const fn new(a: [u8; 16]) -> Self {
        Self([
            u32::from_ne_bytes([a[0], a[1], a[2], a[3]]),
            u32::from_ne_bytes([a[4], a[5], a[6], a[7]]),
            u32::from_ne_bytes([a[8], a[9], a[10], a[11]]),
            u32::from_ne_bytes([a[12], a[13], a[14], a[15]]),
        ])
    }

    /// The form of [`mapped`] of an IPv4 address that is a word already.
    #[inline(always)]
    pub const fn of_v4(word: u32) -> Self {
        Self([0, 0, u32::from_ne_bytes([0, 0, 0xff, 0xff]), word])
    }

    /// Its octets.
    #[inline(always)]
    pub const fn octets(&self) -> [u8; 16] {
        let ([a, b, c, d], [e, f, g, h]) = (self.0[0].to_ne_bytes(), self.0[1].to_ne_bytes());
        let ([i, j, k, l], [m, n, o, p]) = (self.0[2].to_ne_bytes(), self.0[3].to_ne_bytes());
        [a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p]
    }
}

/// A MAC address in halves, octets in the order of the wire.
#[inline(always)]
pub const fn halves(m: [u8; 6]) -> [u16; 3] {
    [u16::from_ne_bytes([m[0], m[1]]), u16::from_ne_bytes([m[2], m[3]]), u16::from_ne_bytes([m[4], m[5]])]
}

/// `Vm::flags`: what no rule allows passes and is recorded.
pub const VM_WARN: u32 = 1;
/// `Vm::flags`: a secret of the owner could apply, so ports 80 and 443 always pass the proxy.
pub const VM_SECRETS: u32 = 2;
/// `Vm::flags`: the VM has the IPv6 address in `Vm::v6`.
pub const VM_IPV6: u32 = 4;

/// `Vm::rules`: a group that holds nothing.
pub const NO_RULES: u32 = 0;

/// One VM as the programs see it; found by the index of its tap.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Vm {
    /// Its slot: the key of everything else about it.
    pub slot: u32,
    /// The generation of its policy: flows that were judged under another are judged anew.
    pub policy: u32,
    /// The groups of its own rules and of its account's, or [`NO_RULES`]: part of the rules' keys, so that changing the
    /// number changes them all at once.
    pub rules: [u32; 2],
    /// `VM_…`.
    pub flags: u32,
    /// Its MAC address, in the form of [`halves`].
    pub mac: [u16; 3],
    /// Zero.
    pub pad: u16,
    /// Its IPv4 address: a word, octets in the order of the wire.
    pub v4: u32,
    /// Its IPv6 address, where `VM_IPV6` is set.
    pub v6: Address,
}

impl Vm {
    /// Its MAC address.
    #[inline(always)]
    pub const fn mac_octets(&self) -> [u8; 6] {
        let [[a, b], [c, d], [e, f]] =
            [self.mac[0].to_ne_bytes(), self.mac[1].to_ne_bytes(), self.mac[2].to_ne_bytes()];
        [a, b, c, d, e, f]
    }

    /// Its address of one family.
    #[inline(always)]
    pub const fn own(&self, v6: bool) -> [u8; 16] {
        if v6 { self.v6.octets() } else { mapped(self.v4.to_ne_bytes()) }
    }
}

/// What a frame of a known flow is held against, found by the index of the tap without a search. It is a copy: where it
/// is another tap's, or nobody's, the frame is judged by [`Vm`] and the table.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tap {
    /// Index of the tap that it is about; 0 for none.
    pub link: u32,
    /// See [`Vm::policy`]. The one field that changes while frames come, always as a whole.
    pub policy: u32,
    /// See [`Vm::slot`].
    pub slot: u32,
    /// `VM_IPV6` or nothing.
    pub flags: u32,
    /// See [`Vm::mac`].
    pub mac: [u16; 3],
    /// Zero.
    pub pad: u16,
    /// See [`Vm::v4`].
    pub v4: u32,
    /// Zero.
    pub more_pad: u32,
    /// See [`Vm::v6`].
    pub v6: Address,
}

impl Tap {
    /// What the VM's frames on the tap are held against.
    pub const fn new(link: u32, vm: &Vm) -> Self {
        Self {
            link,
            policy: vm.policy,
            slot: vm.slot,
            flags: vm.flags & VM_IPV6,
            mac: vm.mac,
            pad: 0,
            v4: vm.v4,
            more_pad: 0,
            v6: vm.v6,
        }
    }

    /// Where the tap of this index has its entry.
    #[inline(always)]
    pub const fn place(link: u32) -> u32 {
        link & (TAPS - 1)
    }
}

/// What all VMs share.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// Index of the uplink in the egress namespace.
    pub uplink: u32,
    /// Flows a second that one VM may open in the long run; [`MAX_FLOWS_PER_VM`] in one go.
    pub flow_rate: u32,
    /// The range that guests' IPv4 addresses come from.
    pub guests_v4: [u8; 4],
    /// Its mask.
    pub mask_v4: [u8; 4],
    /// The range that guests' IPv6 addresses come from.
    pub guests_v6: [u8; 16],
    /// Its mask; all zero where there is none.
    pub mask_v6: [u8; 16],
}

impl Config {
    /// Whether guests' addresses come from the range that the address lies in.
    #[inline(always)]
    pub fn is_guest(&self, address: &[u8; 16], v6: bool) -> bool {
        if v6 {
            let mask = u128::from_ne_bytes(self.mask_v6);
            mask != 0 && u128::from_ne_bytes(*address) & mask == u128::from_ne_bytes(self.guests_v6)
        } else {
            let address = u32::from_ne_bytes([address[12], address[13], address[14], address[15]]);
            address & u32::from_ne_bytes(self.mask_v4) == u32::from_ne_bytes(self.guests_v4)
        }
    }
}

/// Key of a `cidr` rule, after the prefix length that the trie puts in front: prefixes begin with all bits of `group`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct RuleKey {
    /// Group of rules and family: see [`RuleKey::new`].
    pub group: u32,
    /// The network; IPv4 in the form of [`mapped`].
    pub network: [u8; 16],
}

impl RuleKey {
    /// The key of an address or network in a group of rules (numbered below 2³¹).
    #[inline(always)]
    pub const fn new(rules: u32, v6: bool, network: [u8; 16]) -> Self {
        Self { group: (rules << 1) | v6 as u32, network }
    }

    /// Length in the trie of a prefix of this family.
    pub const fn prefix(v6: bool, length: u8) -> u32 {
        32 + length as u32 + if v6 { 0 } else { 96 }
    }
}

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

/// Where the kernel that runs the programs keeps what `__sk_buff` does not show, in its `struct sk_buff`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SkbLayout {
    /// The octet with `ip_summed`.
    pub ip_summed: u32,
    /// The two bits of `ip_summed` in it. Both are set in `CHECKSUM_PARTIAL` alone (include/linux/skbuff.h): the checksum is still
    /// to be written.
    pub partial: u32,
    /// `csum_start`, in octets; `csum_offset` follows it.
    pub csum_start: u32,
    /// `mac_header`, in octets.
    pub mac_header: u32,
    /// Number of the kernel's function `bpf_cast_to_kern_ctx` in its BTF, whose answer lets fields be read as such; 0 where the
    /// kernel has none. The loader puts it into every [`CAST_CALL`] too.
    pub cast: u32,
}

/// A call of a kernel function (Documentation/bpf/standardization/instruction-set.rst: BPF_CALL with source 2) as it stands in
/// the object, with a number that is none where the loader writes the function's.
pub const CAST_CALL: u64 = 0x7467_cca5_0000_2085;

/// Where a listener of the proxy is in the socket map.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Listener {
    /// TCP that is not for a gateway service.
    Tcp = 0,
    /// DNS over TCP.
    DnsTcp = 1,
    /// DNS over UDP.
    DnsUdp = 2,
    /// The guest service.
    Service = 3,
}

/// How many listeners there are: four for IPv4, then the same four for IPv6.
pub const LISTENERS: u32 = 8;

impl Listener {
    /// The listener's place in the map: a socket takes packets of its own family only.
    #[inline(always)]
    pub const fn index(self, v6: bool) -> u32 {
        self as u32 + if v6 { LISTENERS / 2 } else { 0 }
    }
}

#[cfg(feature = "user")]
mod pod {
    #![expect(unsafe_code, reason = "a marker that plain data is plain data")]
    use super::*;

    macro_rules! plain {
        ($($name:ty = $size:literal),+ $(,)?) => {$(
            const _: () = assert!(size_of::<$name>() == $size);
            // SAFETY: `repr(C)`, integers and arrays of them only, and the size says that there is no padding.
            unsafe impl aya::Pod for $name {}
        )+};
    }

    plain! {
        Vm = 48, Tap = 48, Config = 48, RuleKey = 20, FlowKey = 24, Flow = 64, FlowCount = 32, Bucket = 16,
        Traffic = 96, Drops = 520, Event = 56, FragmentKey = 28, Fragment = 16, AttemptKey = 28, Attempts = 16, SkbLayout = 20,
    }
}
