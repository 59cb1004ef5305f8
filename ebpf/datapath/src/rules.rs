//! One generation of a VM's `cidr` rules: its keys in the kernel's trie, and the same rules for judging here.

use aya::maps::lpm_trie::Key;
use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use tapgate_ebpf_common::{
    judge::Tables as Judge,
    maps::{Config, RuleKey},
};
use tapgate_model::{Cidr, RuleId, VmPolicy};

use crate::objects::octets;

/// The rules of one generation.
#[derive(Debug)]
pub(crate) struct Rules {
    /// The generation's number in the kernel; not [`VmPolicy::generation`].
    pub number: u32,
    /// Longest prefix first.
    cidrs: Vec<(Cidr, RuleId)>,
}

impl Rules {
    pub(crate) fn new(number: u32, policy: &VmPolicy) -> Self {
        Self { number, cidrs: policy.rules.cidrs().to_vec() }
    }

    /// The keys in the trie.
    pub(crate) fn keys(&self) -> impl Iterator<Item = Key<RuleKey>> + '_ {
        self.cidrs.iter().map(|(cidr, _)| {
            let v6 = cidr.network().is_ipv6();
            let prefix = RuleKey::prefix(v6, cidr.prefix_len());
            Key::new(prefix, RuleKey::new(self.number, v6, octets(cidr.network())))
        })
    }

    /// The rule that covers the address.
    pub(crate) fn of(&self, address: IpAddr) -> Option<&RuleId> {
        self.cidrs.iter().find(|(cidr, _)| cidr.contains(address)).map(|(_, id)| id)
    }
}

/// The judge's look-ups, answered from what user space knows: for flows that have to be judged without a frame.
pub(crate) struct Known<'a> {
    pub rules: &'a Rules,
    pub config: &'a Config,
    pub host: &'a HashSet<[u8; 16]>,
}

impl Judge for Known<'_> {
    fn is_host(&self, address: &[u8; 16]) -> bool {
        self.host.contains(address)
    }
    fn is_guest(&self, address: &[u8; 16], v6: bool) -> bool {
        self.config.is_guest(address, v6)
    }
    fn has_rule(&self, policy: u32, v6: bool, address: &[u8; 16]) -> bool {
        policy == self.rules.number && self.rules.of(address_of(address, v6)).is_some()
    }
}

/// An address of the maps.
pub(crate) fn address_of(a: &[u8; 16], v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::from(*a).into() } else { Ipv4Addr::new(a[12], a[13], a[14], a[15]).into() }
}
