//! Crafted frames and what must become of them: judged natively here, and by the loaded programs in the datapath's tests.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod build;
mod destinations;
mod link;
mod malformed;

pub use build::*;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tapgate_ebpf_common::{
    Reason, Verdict,
    judge::{self, Tables},
    maps::{Address, Listener, NO_RULES, VM_IPV6, VM_SECRETS, VM_WARN, Vm, halves, mapped},
    net::GATEWAY_MAC,
    packet::Header,
};

pub const MAC: [u8; 6] = [6, 0x74, 0, 0, 0, 0];
pub const OWN: &str = "10.214.0.1";
pub const OWN_V6: &str = "fd74:6761:7465::1";
pub const GUESTS: (&str, u8) = ("10.214.0.0", 16);
pub const GUESTS_V6: (&str, u8) = ("fd74:6761:7465::", 64);
pub const HOST: [&str; 3] = ["192.0.2.1", "2001:db8:ff::1", "203.0.113.77"];
/// The rules of the configurations that have some.
pub const RULES: [&str; 6] =
    ["198.51.100.0/24", "10.9.0.0/16", "203.0.113.77/32", "2001:db8:1::/48", "fd00:9::/32", "100.64.9.9/32"];

/// The policies that every frame is judged under.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Setup {
    /// Enforce, no rule.
    Closed,
    /// Enforce, the rules.
    Rules,
    /// Warn, no rule.
    Warn,
    /// Enforce, the rules, a secret.
    Secrets,
    /// Enforce, everything.
    All,
    /// As `Rules`, without IPv6.
    V4Only,
}

pub const SETUPS: [Setup; 6] =
    [Setup::Closed, Setup::Rules, Setup::Warn, Setup::Secrets, Setup::All, Setup::V4Only];

impl Setup {
    pub fn rules(self) -> Vec<&'static str> {
        match self {
            Self::Closed | Self::Warn => vec![],
            Self::Rules | Self::Secrets | Self::V4Only => RULES.to_vec(),
            Self::All => vec!["0.0.0.0/0", "::/0"],
        }
    }

    pub fn vm(self, policy: u32) -> Vm {
        let flags = match self {
            Self::Warn => VM_WARN | VM_IPV6,
            Self::Secrets => VM_SECRETS | VM_IPV6,
            Self::V4Only => 0,
            _ => VM_IPV6,
        };
        // Rules of the account's or of the VM's own: it makes no difference.
        let rules = if self == Self::Rules { [NO_RULES, policy] } else { [policy, NO_RULES] };
        Vm {
            slot: 0,
            policy,
            rules,
            flags,
            mac: halves(MAC),
            pad: 0,
            v4: u32::from_ne_bytes(v4(OWN)),
            v6: Address::new(v6(OWN_V6)),
        }
    }
}

pub fn v4(text: &str) -> [u8; 4] {
    text.parse::<Ipv4Addr>().unwrap().octets()
}

pub fn v6(text: &str) -> [u8; 16] {
    text.parse::<Ipv6Addr>().unwrap().octets()
}

pub fn octets(text: &str) -> [u8; 16] {
    match text.parse().unwrap() {
        IpAddr::V4(a) => mapped(a.octets()),
        IpAddr::V6(a) => a.octets(),
    }
}

fn within(address: &[u8; 16], network: &str, length: u8) -> bool {
    let network_octets = octets(network);
    let bits = u32::from(length) + if network.contains(':') { 0 } else { 96 };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    u128::from_be_bytes(*address) & mask == u128::from_be_bytes(network_octets) & mask
}

/// The judge's look-ups, answered from the constants.
pub struct Book(pub Setup);

impl Tables for Book {
    fn is_host(&self, address: &[u8; 16]) -> bool {
        HOST.iter().any(|host| octets(host) == *address)
    }
    fn is_guest(&self, address: &[u8; 16], v6: bool) -> bool {
        let (network, length) = if v6 { GUESTS_V6 } else { GUESTS };
        within(address, network, length)
    }
    fn has_rule(&self, _rules: &[u32; 2], v6: bool, address: &[u8; 16]) -> bool {
        self.0.rules().iter().any(|rule| {
            let (network, length) = rule.split_once('/').unwrap();
            network.contains(':') == v6 && within(address, network, length.parse().unwrap())
        })
    }
}

/// The native verdict.
pub fn verdict(frame: &[u8], setup: Setup) -> (Verdict, Header) {
    let vm = setup.vm(1);
    let mut header = Header::default();
    let verdict = match judge::read(frame, &vm, &mut header) {
        Err(verdict) => verdict,
        Ok(()) => judge::service(&header).unwrap_or_else(|| judge::judge(&header, &vm, &Book(setup))),
    };
    (verdict, header)
}

/// A named frame and its verdicts under `Closed`, `Rules` and `Warn`.
#[derive(Clone)]
pub struct Case {
    pub name: String,
    pub frame: Vec<u8>,
    pub expected: Option<[Verdict; 3]>,
}

/// The same verdict, whatever the policy.
const fn always(verdict: Verdict) -> [Verdict; 3] {
    [verdict; 3]
}

/// Every crafted frame.
pub fn cases() -> Vec<Case> {
    [link::cases(), malformed::cases(), destinations::cases()].concat()
}
