//! The judge's look-ups answered from what user space knows, and addresses as the maps hold them.

use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};
use tapgate_ebpf_common::{judge::Tables as Judge, maps::Config};
use tapgate_model::RuleSet;

/// For flows that have to be judged without a frame.
pub(crate) struct Known<'a> {
    pub rules: &'a RuleSet,
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
    fn has_rule(&self, _rules: &[u32; 2], v6: bool, address: &[u8; 16]) -> bool {
        self.rules.cidr(address_of(address, v6)).is_some()
    }
}

/// An address of the maps.
pub(crate) fn address_of(a: &[u8; 16], v6: bool) -> IpAddr {
    if v6 { Ipv6Addr::from(*a).into() } else { Ipv4Addr::new(a[12], a[13], a[14], a[15]).into() }
}
