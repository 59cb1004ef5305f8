//! What the programs need of the kernel, feature by feature: so that a kernel that cannot hold them gets a message that
//! names what is missing, and not only that something was refused.

use crate::layout;
use aya::{
    maps::MapType,
    programs::ProgramType,
    sys::{BpfHelper, is_helper_supported, is_map_supported, is_program_supported},
};
use std::path::Path;

/// One feature of the kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Requirement {
    /// What it is called in the kernel's own documents.
    pub name: &'static str,
    /// The first kernel that has it.
    pub since: &'static str,
    /// Whether this kernel has it. One that cannot be asked counts as having it: loading says what it thinks.
    pub present: bool,
}

const PROGRAM: ProgramType = ProgramType::SchedClassifier;

/// Every feature that is needed, asked of the running kernel. Needs root.
pub fn requirements() -> Vec<Requirement> {
    let one = |name, since, present| Requirement { name, since, present };
    let map = |name, since, kind| one(name, since, is_map_supported(kind).unwrap_or(true));
    let helper = |name, since, which| one(name, since, is_helper_supported(PROGRAM, which).unwrap_or(true));
    vec![
        one("BPF_PROG_TYPE_SCHED_CLS", "4.1", is_program_supported(PROGRAM).unwrap_or(true)),
        map("BPF_MAP_TYPE_PERCPU_HASH", "4.6", MapType::PerCpuHash),
        map("BPF_MAP_TYPE_LRU_HASH", "4.10", MapType::LruHash),
        map("BPF_MAP_TYPE_LPM_TRIE", "4.11", MapType::LpmTrie),
        map("BPF_MAP_TYPE_SOCKMAP", "4.14", MapType::SockMap),
        map("BPF_MAP_TYPE_RINGBUF", "5.8", MapType::RingBuf),
        helper("bpf_skc_lookup_tcp", "5.2", BpfHelper::BPF_FUNC_skc_lookup_tcp),
        helper("bpf_sk_assign", "5.7", BpfHelper::BPF_FUNC_sk_assign),
        helper("bpf_ringbuf_reserve", "5.8", BpfHelper::BPF_FUNC_ringbuf_reserve),
        helper("bpf_ktime_get_coarse_ns", "5.11", BpfHelper::BPF_FUNC_ktime_get_coarse_ns),
        helper("bpf_jiffies64", "5.6", BpfHelper::BPF_FUNC_jiffies64),
        helper("bpf_probe_read_kernel", "5.5", BpfHelper::BPF_FUNC_probe_read_kernel),
        one("CONFIG_DEBUG_INFO_BTF", "5.2", Path::new(layout::BTF).exists()),
    ]
}

/// What is missing, in words; `None` if nothing is.
pub(crate) fn missing(all: &[Requirement]) -> Option<String> {
    let names: Vec<String> = all
        .iter()
        .filter(|requirement| !requirement.present)
        .map(|requirement| format!("{} (Linux {})", requirement.name, requirement.since))
        .collect();
    (!names.is_empty()).then(|| names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_and_this_kernel_lacks_nothing() {
        let mut all = requirements();
        assert_eq!(missing(&all), None);
        all[5].present = false;
        all[7].present = false;
        assert_eq!(missing(&all).unwrap(), "BPF_MAP_TYPE_RINGBUF (Linux 5.8), bpf_sk_assign (Linux 5.7)");
    }
}
