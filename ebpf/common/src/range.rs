//! Which addresses a guest may never reach, and which only through a `cidr` rule.
//!
//! The one list for the BPF programs, the proxy's dialer and the DNS answers. Sources: RFC 6890 and the IANA
//! special-purpose registries for both families; RFC 6052/8215 (NAT64), RFC 3056 (6to4), RFC 4380 (Teredo) for
//! IPv4 addresses embedded in IPv6. What belongs to a host or a VM at run time is not here.

use crate::Reason;
use core::net::IpAddr;

/// How far an address is reachable for a guest, before any rule is looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    /// An ordinary public address.
    Public,
    /// Reachable only through a `cidr` rule: RFC 1918, CGNAT (RFC 6598), ULA (RFC 4193).
    Private,
    /// Never reachable; the reason says which range.
    Denied(Reason),
}

/// Classifies an IPv4 address given in network byte order.
#[inline(always)]
pub const fn classify_v4(a: [u8; 4]) -> Class {
    match a {
        // Azure's platform and Oracle's metadata addresses lie in public or reserved ranges.
        [168, 63, 129, 16] => Class::Denied(Reason::LinkLocal),
        [0, ..] | [127, ..] => Class::Denied(Reason::Loopback),
        [169, 254, ..] => Class::Denied(Reason::LinkLocal),
        // Alibaba Cloud's metadata service lies inside the CGNAT range.
        [100, 100, 100, 200] => Class::Denied(Reason::LinkLocal),
        [10, ..] | [192, 168, ..] => Class::Private,
        [172, b, ..] if b & 0xf0 == 16 => Class::Private,
        [100, b, ..] if b & 0xc0 == 64 => Class::Private,
        // Benchmarking (RFC 2544): someone's lab, if anything.
        [198, b, ..] if b & 0xfe == 18 => Class::Private,
        [192, 0, 0, _] => Class::Denied(Reason::Reserved),
        [192, 88, 99, _] => Class::Denied(Reason::Reserved),
        [255, 255, 255, 255] => Class::Denied(Reason::Broadcast),
        [b, ..] if b & 0xf0 == 224 => Class::Denied(Reason::Multicast),
        [b, ..] if b & 0xf0 == 240 => Class::Denied(Reason::Reserved),
        _ => Class::Public,
    }
}

/// Classifies an IPv6 address given in network byte order. An embedded IPv4 address makes it denied outright:
/// no embedding is ever a guest's only way to a host, so none is let through.
#[inline(always)]
pub const fn classify_v6(a: [u8; 16]) -> Class {
    let hi = u64::from_be_bytes([a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7]]);
    let lo = u64::from_be_bytes([a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15]]);
    if hi == 0 {
        // ::, ::1, IPv4-compatible (::/96), IPv4-mapped (::ffff:0:0/96), IPv4-translated (::ffff:0:0:0/96).
        return Class::Denied(if lo <= 1 { Reason::Loopback } else { Reason::Reserved });
    }
    match a {
        // 64:ff9b::/96 and 64:ff9b:1::/48 (NAT64).
        [0, 0x64, 0xff, 0x9b, ..] => Class::Denied(Reason::Reserved),
        // AWS's metadata service by IPv6 lies inside the ULA range.
        [0xfd, 0, 0x0e, 0xc2, ..] => Class::Denied(Reason::LinkLocal),
        [b, ..] if b & 0xfe == 0xfc => Class::Private,
        [0xfe, b, ..] if b & 0xc0 == 0x80 => Class::Denied(Reason::LinkLocal),
        [0xff, ..] => Class::Denied(Reason::Multicast),
        // 2002::/16 (6to4), 2001::/32 (Teredo), 2001:10::/28 and 2001:20::/28 (ORCHID).
        [0x20, 0x02, ..] | [0x20, 0x01, 0, 0, ..] => Class::Denied(Reason::Reserved),
        [0x20, 0x01, 0, b, ..] if b & 0xf0 == 0x10 || b & 0xf0 == 0x20 => Class::Denied(Reason::Reserved),
        // Only 2000::/3 is global unicast.
        [b, ..] if b & 0xe0 == 0x20 => Class::Public,
        _ => Class::Denied(Reason::Reserved),
    }
}

/// Every address that may be reached, or only through a rule, and follows on one that may never be.
const OPEN_V4: [[u8; 4]; 7] = [
    [1, 0, 0, 0],
    [100, 100, 100, 201],
    [128, 0, 0, 0],
    [168, 63, 129, 17],
    [169, 255, 0, 0],
    [192, 0, 1, 0],
    [192, 88, 100, 0],
];
/// The same of IPv6, by its first four groups; the rest is zero.
const OPEN_V6: [[u16; 4]; 6] = [
    [0x2000, 0, 0, 0],
    [0x2001, 1, 0, 0],
    [0x2001, 0x30, 0, 0],
    [0x2003, 0, 0, 0],
    [0xfc00, 0, 0, 0],
    [0xfd00, 0x0ec3, 0, 0],
];

/// Why no address from `first` to `last`, of one family, can ever be reached, whatever rule there is; `None` where one may be.
pub fn denied_whole(first: IpAddr, last: IpAddr) -> Option<Reason> {
    let Class::Denied(reason) = classify(first) else { return None };
    let within = |open: IpAddr| first < open && open <= last;
    let opens = match first {
        IpAddr::V4(_) => OPEN_V4.iter().any(|open| within(IpAddr::from(*open))),
        IpAddr::V6(_) => {
            OPEN_V6.iter().any(|[a, b, c, d]| within(IpAddr::from([*a, *b, *c, *d, 0, 0, 0, 0])))
        }
    };
    (!opens).then_some(reason)
}

fn classify(address: IpAddr) -> Class {
    match address {
        IpAddr::V4(v4) => classify_v4(v4.octets()),
        IpAddr::V6(v6) => classify_v6(v6.octets()),
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use core::net::{Ipv4Addr, Ipv6Addr};

    #[test]
    fn a_range_is_refused_only_where_all_of_it_is() {
        let whole = |first: &str, last: &str| denied_whole(first.parse().unwrap(), last.parse().unwrap());
        assert_eq!(whole("169.254.169.254", "169.254.169.254"), Some(Reason::LinkLocal));
        assert_eq!(whole("127.0.0.0", "127.255.255.255"), Some(Reason::Loopback));
        assert_eq!(whole("224.0.0.0", "239.255.255.255"), Some(Reason::Multicast));
        assert_eq!(whole("fe80::", "febf:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Some(Reason::LinkLocal));
        // Both ends are loopback, and all the rest of the lower half is not.
        assert_eq!(whole("0.0.0.0", "127.255.255.255"), None);
        assert_eq!(whole("0.0.0.0", "255.255.255.255"), None);
        assert_eq!(whole("10.0.0.0", "10.255.255.255"), None);
        // Only the first address is denied, and only the last.
        assert_eq!(whole("168.63.129.16", "168.63.129.17"), None);
        assert_eq!(whole("100.100.100.200", "100.100.100.201"), None);
        assert_eq!(whole("128.0.0.0", "255.255.255.255"), None);
        assert_eq!(whole("192.88.98.0", "192.88.99.255"), None);
        assert_eq!(whole("2000::", "3fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), None);
        assert_eq!(whole("4000::", "7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), Some(Reason::Reserved));
        // Between two ends that are denied: 2001:1:: to 2001:f::, and 2003:: onwards.
        assert_eq!(whole("2001::", "2001:1f:ffff:ffff:ffff:ffff:ffff:ffff"), None);
        assert_eq!(whole("2002::", "2003:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), None);
        assert_eq!(whole("2001:10::", "2001:2f:ffff:ffff:ffff:ffff:ffff:ffff"), Some(Reason::Reserved));
        assert_eq!(whole("2001:db8::", "2001:db8::ffff"), None);
        assert_eq!(whole("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), None);
    }

    /// Where the class changes from denied to another, found by asking for every address at whose like a range may begin.
    #[test]
    fn every_way_out_of_a_denied_range_is_known() {
        let denied = |address: IpAddr| matches!(classify(address), Class::Denied(_));
        let opens = |address: u32, before: u32| {
            !denied(Ipv4Addr::from(address).into()) && denied(Ipv4Addr::from(before).into())
        };
        // All of /24, and every address of those that are told apart within.
        let mut found = std::vec::Vec::new();
        for block in 1..1u32 << 24 {
            if opens(block << 8, (block << 8) - 1) {
                found.push(block << 8);
            }
        }
        for [a, b, c] in [[168, 63, 129], [100, 100, 100], [255, 255, 255]] {
            let address = |d: u8| u32::from_be_bytes([a, b, c, d]);
            found.extend((1..=255).filter(|d| opens(address(*d), address(d - 1))).map(address));
        }
        found.sort_unstable();
        assert_eq!(found, OPEN_V4.map(u32::from_be_bytes));
        // Nothing of IPv6 that is not denied whole is told apart beyond its first 32 bits.
        let mut found = std::vec::Vec::new();
        let mut before = true;
        for group in 0..1u32 << 24 {
            // Where 24 bits are enough, and where they are not.
            let most = if [0x64_ff, 0x20_0100, 0xfd_000e].contains(&group) { 256 } else { 1 };
            for low in 0..most {
                let bits = group << 8 | low;
                let now = denied(Ipv6Addr::from(u128::from(bits) << 96).into());
                if before && !now {
                    found.push(bits);
                }
                before = now;
            }
        }
        assert_eq!(found, OPEN_V6.map(|[a, b, ..]| u32::from(a) << 16 | u32::from(b)));
    }

    fn v4(text: &str) -> Class {
        classify_v4(text.parse::<Ipv4Addr>().unwrap().octets())
    }
    fn v6(text: &str) -> Class {
        classify_v6(text.parse::<Ipv6Addr>().unwrap().octets())
    }

    #[test]
    fn every_range_that_peers_forgot_is_denied() {
        for text in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.1.1",
            "169.254.169.254",
            "169.254.170.2",
            "100.100.100.200",
            "192.0.0.192",
            "192.88.99.1",
            "224.0.0.1",
            "239.255.255.255",
            "240.0.0.1",
            "255.255.255.255",
            "168.63.129.16",
        ] {
            assert!(matches!(v4(text), Class::Denied(_)), "{text}");
        }
        for text in [
            "::",
            "::1",
            "::7f00:1",
            "::ffff:127.0.0.1",
            "::ffff:8.8.8.8",
            "::ffff:0:10.0.0.1",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "2001:10::1",
            "2001:20::1",
            "fe80::1",
            "febf::1",
            "fec0::1",
            "ff02::1",
            "fd00:ec2::254",
            "4000::1",
            "100::1",
            "5f00::1",
        ] {
            assert!(matches!(v6(text), Class::Denied(_)), "{text}");
        }
    }

    #[test]
    fn private_ranges_end_where_the_rfcs_say() {
        for text in
            ["10.0.0.1", "172.16.0.1", "172.31.255.255", "192.168.0.1", "100.64.0.1", "100.127.255.255"]
        {
            assert_eq!(v4(text), Class::Private, "{text}");
        }
        for text in [
            "9.255.255.255",
            "11.0.0.0",
            "172.15.0.1",
            "172.32.0.1",
            "192.167.1.1",
            "100.63.0.1",
            "100.128.0.1",
        ] {
            assert_eq!(v4(text), Class::Public, "{text}");
        }
        assert_eq!(v6("fc00::1"), Class::Private);
        assert_eq!(v6("fd12::1"), Class::Private);
        // Beside Teredo and ORCHID.
        for text in ["2001:db8::1", "2001:1::1", "2001:30::1", "2001:f::1", "2003::1"] {
            assert_eq!(v6(text), Class::Public, "{text}");
        }
        assert_eq!(v6("2606:4700::1"), Class::Public);
    }
}
