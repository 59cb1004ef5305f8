//! A guest's place in the network: what identifies its frames and is routed to it.

use serde::{Deserialize, Serialize};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The addresses of one VM. Assigned by the daemon, unique on the host, checked on every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GuestNet {
    /// Position in the guest ranges; also in the tap's name and the flow maps. Reused only after teardown.
    pub slot: u32,
    /// Locally administered unicast.
    pub mac: [u8; 6],
    /// A /32 of the guest range.
    pub v4: Ipv4Addr,
    /// A /128 of the guest range; `None` where IPv6 is off.
    pub v6: Option<Ipv6Addr>,
}

impl GuestNet {
    /// The guest of this slot in the given ranges. Slot 0 is the range's second address.
    pub fn new(slot: u32, v4_base: Ipv4Addr, v6_base: Option<Ipv6Addr>) -> Self {
        let number = slot.wrapping_add(1);
        let [a, b, c, d] = slot.to_be_bytes();
        Self {
            slot,
            mac: [0x06, 0x74, a, b, c, d],
            v4: Ipv4Addr::from(u32::from(v4_base).wrapping_add(number)),
            v6: v6_base.map(|base| Ipv6Addr::from(u128::from(base).wrapping_add(u128::from(number)))),
        }
    }

    /// The name of the guest's tap (or veth) in the egress namespace; at most 15 characters.
    pub fn link(&self) -> String {
        format!("tg{}", self.slot)
    }

    /// Whether the address is this guest's.
    pub fn has(&self, address: IpAddr) -> bool {
        match address {
            IpAddr::V4(v4) => v4 == self.v4,
            IpAddr::V6(v6) => Some(v6) == self.v6,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_never_share_an_address() {
        let base = Ipv4Addr::new(10, 214, 0, 0);
        let a = GuestNet::new(0, base, None);
        let b = GuestNet::new(255, base, Some("fd74:6761:7465::".parse().unwrap()));
        assert_eq!(a.v4, Ipv4Addr::new(10, 214, 0, 1));
        assert_eq!(b.v4, Ipv4Addr::new(10, 214, 1, 0));
        assert_eq!(b.v6, Some("fd74:6761:7465::100".parse().unwrap()));
        assert_ne!(a.mac, b.mac);
        assert_eq!(a.mac[0] & 3, 2, "locally administered, unicast");
        assert!(GuestNet::new(u32::MAX, base, None).link().len() <= 15);
    }
}
