//! The maps, by the names that user space knows them by.

use aya_ebpf::{
    bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC},
    macros::map,
    maps::{
        Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf, SockMap, lpm_trie::Key,
    },
};
use tapgate_ebpf_common::{
    judge::Tables,
    maps::{
        AttemptKey, Attempts, Bucket, Config, Drops, Flow, FlowCount, FlowKey, Fragment, FragmentKey,
        LISTENERS as LISTENER_COUNT, MAX_ATTEMPTS, MAX_FLOWS, MAX_FRAGMENTS, MAX_HOST_ADDRESSES, MAX_RULES,
        MAX_VMS, NO_RULES, RING_BYTES, RuleKey, TAPS as TAP_COUNT, Tap, Traffic, Vm,
    },
    packet::Header,
};

/// What all VMs share.
#[map]
pub static CONFIG: Array<Config> = Array::with_max_entries(1, 0);
/// Index of a tap → its VM.
#[map]
pub static VMS: HashMap<u32, Vm> = HashMap::with_max_entries(MAX_VMS, BPF_F_NO_PREALLOC);
/// Place of a tap's index → what its known flows are held against.
#[map]
pub static TAPS: Array<Tap> = Array::with_max_entries(TAP_COUNT, BPF_F_MMAPABLE);
/// The `cidr` rules of every VM.
#[map]
pub static RULES: LpmTrie<RuleKey, u8> = LpmTrie::with_max_entries(MAX_RULES, 0);
/// The host's own addresses.
#[map]
pub static HOST: HashMap<[u8; 16], u8> = HashMap::with_max_entries(MAX_HOST_ADDRESSES, BPF_F_NO_PREALLOC);
/// The proxy's listeners.
#[map]
pub static LISTENERS: SockMap = SockMap::with_max_entries(LISTENER_COUNT, 0);
/// Forwarded flows.
#[map]
pub static FLOWS: HashMap<FlowKey, Flow> = HashMap::with_max_entries(MAX_FLOWS, BPF_F_NO_PREALLOC);
/// Slot → flows that the programs made and ended.
#[map]
pub static FLOW_COUNTS: HashMap<u32, FlowCount> = HashMap::with_max_entries(MAX_VMS, BPF_F_NO_PREALLOC);
/// Slot → flows that user space removed; written by user space alone.
#[map]
pub static FLOWS_EXPIRED: HashMap<u32, u64> = HashMap::with_max_entries(MAX_VMS, BPF_F_NO_PREALLOC);
/// Slot → what every frame is counted in.
#[map]
pub static TRAFFIC: PerCpuArray<Traffic> = PerCpuArray::with_max_entries(MAX_VMS, 0);
/// Slot → what frames that go nowhere are counted in.
#[map]
pub static DROPS: PerCpuHashMap<u32, Drops> = PerCpuHashMap::with_max_entries(MAX_VMS, BPF_F_NO_PREALLOC);
/// Slot → what it may still report.
#[map]
pub static BUCKETS: HashMap<u32, Bucket> = HashMap::with_max_entries(MAX_VMS, BPF_F_NO_PREALLOC);
/// What VMs go on trying.
#[map]
pub static ATTEMPTS: PerCpuHashMap<AttemptKey, Attempts> =
    PerCpuHashMap::with_max_entries(MAX_ATTEMPTS, BPF_F_NO_PREALLOC);
/// How much of it user space has told; written by user space alone.
#[map]
pub static ATTEMPTS_TOLD: HashMap<AttemptKey, u64> =
    HashMap::with_max_entries(MAX_ATTEMPTS, BPF_F_NO_PREALLOC);
/// Slot → entries of attempts that user space removed; written by user space alone.
#[map]
pub static ATTEMPTS_GONE: HashMap<u32, u32> = HashMap::with_max_entries(MAX_VMS, BPF_F_NO_PREALLOC);
/// Datagrams to guests that are in the middle of their fragments. The oldest make way.
#[map]
pub static FRAGMENTS: LruHashMap<FragmentKey, Fragment> = LruHashMap::with_max_entries(MAX_FRAGMENTS, 0);
/// What VMs tried and the proxy does not see.
#[map]
pub static EVENTS: RingBuf = RingBuf::with_byte_size(RING_BYTES, 0);

/// What a run works on; too large for the stack.
#[repr(C)]
pub struct Scratch {
    pub header: Header,
    pub key: FlowKey,
    pub flow: Flow,
    pub attempt: AttemptKey,
}
/// Each processor's own; a run is never interrupted by another.
#[map]
static SCRATCH: PerCpuArray<Scratch> = PerCpuArray::with_max_entries(1, 0);

/// This run's scratch.
#[inline(always)]
pub fn scratch() -> Option<&'static mut Scratch> {
    let scratch = SCRATCH.get_ptr_mut(0)?;
    // SAFETY: the programs run with interrupts of their own kind off, so there is one user on each processor.
    Some(unsafe { &mut *scratch })
}

/// Each processor's copy of a VM's entry.
#[map]
static VM: PerCpuArray<Vm> = PerCpuArray::with_max_entries(1, 0);

/// The VM of the device, as of now. A copy: the kernel may give the memory of an entry that is replaced to another VM's at once, while
/// this run still reads it. What is still the entry after it was copied was it all the while.
#[inline(always)]
pub fn vm(link: u32) -> Option<&'static Vm> {
    let entry = VMS.get_ptr(link)?;
    let copy = VM.get_ptr_mut(0)?;
    // SAFETY: both are live values of their maps; nobody else has this processor's copy.
    unsafe { *copy = entry.read_volatile() };
    if VMS.get_ptr(link)? != entry {
        return None;
    }
    // SAFETY: as above.
    Some(unsafe { &*copy })
}

/// What frames of the device are held against, if it is a tap that has its entry.
#[inline(always)]
pub fn tap(link: u32) -> Option<&'static Tap> {
    let tap = TAPS.get(Tap::place(link))?;
    // SAFETY: a live word; user space may change it meanwhile.
    let holder = unsafe { (&raw const tap.link).read_volatile() };
    if link != 0 && holder == link { Some(tap) } else { None }
}

/// The generation of its policy, as of now.
#[inline(always)]
pub fn policy(tap: &Tap) -> u32 {
    // SAFETY: as above.
    unsafe { (&raw const tap.policy).read_volatile() }
}

/// The judge's look-ups, answered from the maps.
pub struct Maps;

impl Tables for Maps {
    #[inline(always)]
    fn is_host(&self, address: &[u8; 16]) -> bool {
        HOST.get_ptr(address).is_some()
    }

    #[inline(always)]
    fn is_guest(&self, address: &[u8; 16], v6: bool) -> bool {
        // Without a configuration no address is trusted to be outside.
        let Some(config) = CONFIG.get(0) else { return true };
        config.is_guest(address, v6)
    }

    #[inline(always)]
    fn has_rule(&self, rules: &[u32; 2], v6: bool, address: &[u8; 16]) -> bool {
        let covers = |group: u32| {
            group != NO_RULES && RULES.get(Key::new(160, RuleKey::new(group, v6, *address))).is_some()
        };
        covers(rules[0]) || covers(rules[1])
    }
}
