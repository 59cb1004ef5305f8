//! The embedded BPF object: loads it, with the maps that are pinned already, and gives each map its type.

use crate::{Counters, DatapathError, bpffs, error::map_error, layout, requirements, taps::Taps};
use aya::{
    Ebpf, EbpfLoader,
    maps::{
        Array, HashMap, Map, MapData, MapError, PerCpuArray, PerCpuHashMap, PerCpuValues, SockMap,
        lpm_trie::LpmTrie,
    },
    programs::SchedClassifier,
};
use std::{
    collections::HashSet,
    net::IpAddr,
    os::fd::{AsRawFd as _, BorrowedFd},
    path::Path,
};
use tapgate_ebpf_common::maps::{
    AttemptKey, Attempts, Bucket, Config, Drops, Flow, FlowCount, FlowKey, Listener, NO_SLOT, REASONS,
    RuleKey, SkbLayout, Traffic, Vm, mapped,
};

/// The object, aligned as an ELF file wants it.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/tapgate.o"));

/// The maps that are pinned.
const MAPS: [&str; 17] = [
    "CONFIG",
    "VMS",
    "TAPS",
    "RULES",
    "HOST",
    "LISTENERS",
    "FLOWS",
    "FLOW_COUNTS",
    "FLOWS_EXPIRED",
    "TRAFFIC",
    "DROPS",
    "BUCKETS",
    "ATTEMPTS",
    "ATTEMPTS_TOLD",
    "ATTEMPTS_GONE",
    "FRAGMENTS",
    "EVENTS",
];

/// The programs.
pub(crate) const FROM_GUEST: &str = "from_guest";
pub(crate) const TO_GUEST: &str = "to_guest";

/// The maps, typed.
pub(crate) struct Tables {
    pub config: Array<MapData, Config>,
    pub vms: HashMap<MapData, u32, Vm>,
    pub taps: Taps,
    pub rules: LpmTrie<MapData, RuleKey, u8>,
    pub host: HashMap<MapData, [u8; 16], u8>,
    pub listeners: SockMap<MapData>,
    pub flows: HashMap<MapData, FlowKey, Flow>,
    pub flow_counts: HashMap<MapData, u32, FlowCount>,
    pub flows_expired: HashMap<MapData, u32, u64>,
    pub traffic: PerCpuArray<MapData, Traffic>,
    pub drops: PerCpuHashMap<MapData, u32, Drops>,
    pub buckets: HashMap<MapData, u32, Bucket>,
    pub attempts: PerCpuHashMap<MapData, AttemptKey, Attempts>,
    pub attempts_told: HashMap<MapData, AttemptKey, u64>,
    pub attempts_gone: HashMap<MapData, u32, u32>,
}

/// Loads programs and maps; maps that are pinned are taken as they are.
pub(crate) fn load(pins: &Path) -> Result<(Ebpf, Tables), DatapathError> {
    let layout = layout::skb()?;
    let loaded = match load_all(pins, layout) {
        // A kernel that has the function may still refuse it; without, each look costs more.
        Err(error @ DatapathError::Program { .. }) if layout.cast != 0 => {
            tracing::warn!(%error, "the kernel does not let fields of its buffers be read; loading without");
            load_all(pins, SkbLayout { cast: 0, ..layout })
        }
        loaded => loaded,
    };
    loaded.map_err(|error| {
        // What was refused says little; what the kernel has not says more.
        match requirements::missing(&requirements::requirements()) {
            Some(names) => DatapathError::Kernel(names),
            None => error,
        }
    })
}

fn load_all(pins: &Path, layout: SkbLayout) -> Result<(Ebpf, Tables), DatapathError> {
    let folder = bpffs::maps(pins);
    let mut loader = EbpfLoader::new();
    loader.override_global("SKB_LAYOUT", &layout, true);
    for name in MAPS {
        loader.map_pin_path(name, folder.join(name));
    }
    let mut programs = loader.load(&layout::fitted(OBJECT, &layout)?)?;
    for name in [FROM_GUEST, TO_GUEST] {
        program(&mut programs, name)?.load().map_err(|source| DatapathError::Program {
            what: "load",
            program: name,
            link: "(none yet)".into(),
            source: Box::new(source),
        })?;
    }
    let mut tables = Tables {
        config: Array::try_from(take(&mut programs, "CONFIG")?).map_err(map_error("open", "CONFIG"))?,
        vms: HashMap::try_from(take(&mut programs, "VMS")?).map_err(map_error("open", "VMS"))?,
        taps: Taps::open(take(&mut programs, "TAPS")?)?,
        rules: LpmTrie::try_from(take(&mut programs, "RULES")?).map_err(map_error("open", "RULES"))?,
        host: HashMap::try_from(take(&mut programs, "HOST")?).map_err(map_error("open", "HOST"))?,
        listeners: SockMap::try_from(take(&mut programs, "LISTENERS")?)
            .map_err(map_error("open", "LISTENERS"))?,
        flows: HashMap::try_from(take(&mut programs, "FLOWS")?).map_err(map_error("open", "FLOWS"))?,
        flow_counts: HashMap::try_from(take(&mut programs, "FLOW_COUNTS")?)
            .map_err(map_error("open", "FLOW_COUNTS"))?,
        flows_expired: HashMap::try_from(take(&mut programs, "FLOWS_EXPIRED")?)
            .map_err(map_error("open", "FLOWS_EXPIRED"))?,
        traffic: PerCpuArray::try_from(take(&mut programs, "TRAFFIC")?)
            .map_err(map_error("open", "TRAFFIC"))?,
        drops: PerCpuHashMap::try_from(take(&mut programs, "DROPS")?).map_err(map_error("open", "DROPS"))?,
        buckets: HashMap::try_from(take(&mut programs, "BUCKETS")?).map_err(map_error("open", "BUCKETS"))?,
        attempts: PerCpuHashMap::try_from(take(&mut programs, "ATTEMPTS")?)
            .map_err(map_error("open", "ATTEMPTS"))?,
        attempts_told: HashMap::try_from(take(&mut programs, "ATTEMPTS_TOLD")?)
            .map_err(map_error("open", "ATTEMPTS_TOLD"))?,
        attempts_gone: HashMap::try_from(take(&mut programs, "ATTEMPTS_GONE")?)
            .map_err(map_error("open", "ATTEMPTS_GONE"))?,
    };
    if tables.drops.get(&NO_SLOT, 0).is_err() {
        tables.zero_counters(NO_SLOT)?;
    }
    Ok((programs, tables))
}

/// One of the two programs.
pub(crate) fn program<'a>(
    programs: &'a mut Ebpf,
    name: &'static str,
) -> Result<&'a mut SchedClassifier, DatapathError> {
    let missing =
        || DatapathError::Config(format!("the embedded BPF object has no program `{name}`; build it anew"));
    programs.program_mut(name).ok_or_else(missing)?.try_into().map_err(|_| missing())
}

fn take(programs: &mut Ebpf, name: &'static str) -> Result<Map, DatapathError> {
    programs.take_map(name).ok_or_else(|| {
        DatapathError::Config(format!("the embedded BPF object has no map `{name}`; build it anew"))
    })
}

/// An address as the maps hold it.
pub(crate) fn octets(address: IpAddr) -> [u8; 16] {
    match address {
        IpAddr::V4(v4) => mapped(v4.octets()),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// Whether the error says that the entry is not there.
pub(crate) fn absent(error: &MapError) -> bool {
    match error {
        MapError::KeyNotFound | MapError::ElementNotFound => true,
        MapError::SyscallError(error) => error.io_error.raw_os_error() == Some(libc::ENOENT),
        _ => false,
    }
}

impl Tables {
    pub(crate) fn set_listener(
        &mut self,
        listener: Listener,
        v6: bool,
        fd: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        self.listeners
            .set(listener.index(v6), &fd.as_raw_fd(), 0)
            .map_err(map_error("put a listener", "LISTENERS"))
    }

    pub(crate) fn set_host_addresses(&mut self, addresses: &[IpAddr]) -> Result<(), DatapathError> {
        let wanted: HashSet<[u8; 16]> = addresses.iter().copied().map(octets).collect();
        let stale: Vec<[u8; 16]> =
            self.host.keys().filter_map(Result::ok).filter(|address| !wanted.contains(address)).collect();
        // New ones first: there is no moment at which an address that stays is missing.
        for address in wanted {
            self.host.insert(address, 1, 0).map_err(map_error("put an address", "HOST"))?;
        }
        for address in stale {
            let gone = self.host.remove(&address);
            gone.or_else(|error| if absent(&error) { Ok(()) } else { Err(error) })
                .map_err(map_error("remove an address", "HOST"))?;
        }
        Ok(())
    }

    pub(crate) fn zero_counters(&mut self, slot: u32) -> Result<(), DatapathError> {
        let failed = |source| DatapathError::Pins {
            what: "read the number of processors from",
            path: "/sys/devices/system/cpu/possible".into(),
            source,
        };
        let processors = aya::util::nr_cpus().map_err(|(_, source)| failed(source))?;
        if slot != NO_SLOT {
            let zero = PerCpuValues::try_from(vec![Traffic::default(); processors]).map_err(failed)?;
            self.traffic.set(slot, zero, 0).map_err(map_error("put counters", "TRAFFIC"))?;
        }
        let zero = Drops { dropped: [0; REASONS], events_lost: 0 };
        let zero = PerCpuValues::try_from(vec![zero; processors]).map_err(failed)?;
        self.drops.insert(slot, zero, 0).map_err(map_error("put counters", "DROPS"))
    }

    pub(crate) fn counters(&self, slot: u32) -> Result<Counters, DatapathError> {
        let drops = match self.drops.get(&slot, 0) {
            Ok(drops) => drops,
            Err(error) if absent(&error) => return Err(DatapathError::NotAttached(slot)),
            Err(error) => return Err(map_error("read counters", "DROPS")(error)),
        };
        if slot == NO_SLOT {
            return Ok(Counters::sum([].iter(), drops.iter()));
        }
        let traffic = self.traffic.get(&slot, 0).map_err(map_error("read counters", "TRAFFIC"))?;
        Ok(Counters::sum(traffic.iter(), drops.iter()))
    }

    pub(crate) fn flows_held(&self, slot: u32) -> Result<u64, DatapathError> {
        let counts = self.flow_counts.get(&slot, 0).map_err(map_error("read", "FLOW_COUNTS"))?;
        let expired = self.flows_expired.get(&slot, 0).map_err(map_error("read", "FLOWS_EXPIRED"))?;
        Ok(counts.opened.wrapping_sub(counts.closed).wrapping_sub(expired))
    }

    pub(crate) fn slots(&self) -> Result<Vec<u32>, DatapathError> {
        let vms: Result<Vec<(u32, Vm)>, _> = self.vms.iter().collect();
        Ok(vms.map_err(map_error("list", "VMS"))?.into_iter().map(|(_, vm)| vm.slot).collect())
    }

    /// Index of the tap and the entry of a slot.
    pub(crate) fn find(&self, slot: u32) -> Option<(u32, Vm)> {
        self.vms.iter().filter_map(Result::ok).find(|(_, vm)| vm.slot == slot)
    }
}
