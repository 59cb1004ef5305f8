//! What each VM is judged by: its addresses and mode, the rules that its keys lead to, and what all VMs share. Holds nothing of what it did.

use super::{Address, mapped};

/// Entries of the table of taps, a power of two: an index of a tap is found at its lowest bits.
pub const TAPS: u32 = 32_768;

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
