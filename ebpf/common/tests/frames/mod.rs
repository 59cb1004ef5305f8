//! Crafted frames and what must become of them: judged natively here, and by the loaded programs in the datapath's tests.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

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

// ---- building ----

pub fn ethernet(destination: [u8; 6], source: [u8; 6], kind: u16, rest: &[u8]) -> Vec<u8> {
    let mut frame = Vec::from(destination);
    frame.extend(source);
    frame.extend(kind.to_be_bytes());
    frame.extend(rest);
    frame
}

pub fn checksum(parts: &[&[u8]]) -> [u8; 2] {
    let bytes: Vec<u8> = parts.concat();
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

/// An IP packet of the family of `to`, from `from`.
pub fn ip_from(from: &str, to: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let mut body = body.to_vec();
    let (source, destination) = (octets(from), octets(to));
    let v6 = to.contains(':');
    let from_at = if v6 { 0 } else { 12 };
    let (source, destination) = (&source[from_at..], &destination[from_at..]);
    let at = match protocol {
        6 if body.len() >= 20 => Some(16),
        17 if body.len() >= 8 => Some(6),
        58 if body.len() >= 8 => Some(2),
        _ => None,
    };
    if let Some(at) = at {
        let length = (body.len() as u32).to_be_bytes();
        let sum = checksum(&[source, destination, &length, &[0, 0, 0, protocol], &body]);
        body[at..at + 2].copy_from_slice(&sum);
    } else if protocol == 1 && body.len() >= 8 {
        let sum = checksum(&[&body]);
        body[2..4].copy_from_slice(&sum);
    }
    let mut packet = Vec::new();
    if v6 {
        packet.extend([0x60, 0, 0, 0]);
        packet.extend((body.len() as u16).to_be_bytes());
        packet.extend([protocol, 64]);
        packet.extend(source);
        packet.extend(destination);
    } else {
        packet.extend([0x45, 0]);
        packet.extend((20 + body.len() as u16).to_be_bytes());
        packet.extend([0, 1, 0x40, 0, 64, protocol, 0, 0]);
        packet.extend(source);
        packet.extend(destination);
        let sum = checksum(&[&packet]);
        packet[10..12].copy_from_slice(&sum);
    }
    packet.extend(body);
    packet
}

/// A frame from the VM's own addresses to the gateway's MAC.
pub fn ip(to: &str, protocol: u8, body: &[u8]) -> Vec<u8> {
    let own = if to.contains(':') { OWN_V6 } else { OWN };
    framed(&ip_from(own, to, protocol, body), to.contains(':'))
}

pub fn framed(packet: &[u8], v6: bool) -> Vec<u8> {
    ethernet(GATEWAY_MAC, MAC, if v6 { 0x86dd } else { 0x0800 }, packet)
}

pub fn tcp(port: u16, flags: u8) -> Vec<u8> {
    let mut h = Vec::from(40000u16.to_be_bytes());
    h.extend(port.to_be_bytes());
    h.extend([0, 0, 0, 9, 0, 0, 0, 0, 5 << 4, flags, 0xff, 0xff, 0, 0, 0, 0]);
    h
}

pub fn udp(port: u16, body: &[u8]) -> Vec<u8> {
    let mut h = Vec::from(40000u16.to_be_bytes());
    h.extend(port.to_be_bytes());
    h.extend((8 + body.len() as u16).to_be_bytes());
    h.extend([0, 0]);
    h.extend(body);
    h
}

pub fn icmp(kind: u8) -> Vec<u8> {
    vec![kind, 0, 0, 0, 0x12, 0x34, 0, 1, b'x', b'y']
}

pub fn arp(operation: u16, mac: [u8; 6], sender: &str, target: &str) -> Vec<u8> {
    let mut h = vec![0, 1, 8, 0, 6, 4];
    h.extend(operation.to_be_bytes());
    h.extend(mac);
    h.extend(v4(sender));
    h.extend([0; 6]);
    h.extend(v4(target));
    h
}

pub fn solicit(target: &str, option: Option<[u8; 6]>) -> Vec<u8> {
    let mut h = vec![135, 0, 0, 0, 0, 0, 0, 0];
    h.extend(v6(target));
    if let Some(mac) = option {
        h.extend([1, 1]);
        h.extend(mac);
    }
    h
}

fn discovery(from: &str, body: &[u8], hops: u8) -> Vec<u8> {
    let mut packet = ip_from(from, "ff02::1:ff00:1", 58, body);
    packet[7] = hops;
    ethernet([0x33, 0x33, 0xff, 0, 0, 1], MAC, 0x86dd, &packet)
}

fn with(mut frame: Vec<u8>, change: impl FnOnce(&mut Vec<u8>)) -> Vec<u8> {
    change(&mut frame);
    frame
}

pub const SYN: u8 = 2;
pub const ACK: u8 = 16;

/// A named frame and its verdicts under `Closed`, `Rules` and `Warn`.
pub struct Case {
    pub name: String,
    pub frame: Vec<u8>,
    pub expected: Option<[Verdict; 3]>,
}

/// Every crafted frame.
#[allow(clippy::too_many_lines, reason = "a table")]
pub fn cases() -> Vec<Case> {
    use Reason::*;
    use Verdict::*;
    let mut cases = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>, expected: [Verdict; 3]| {
        cases.push(Case { name: name.into(), frame, expected: Some(expected) });
    };
    let always = |verdict: Verdict| [verdict; 3];
    let tcp_list = Listener::Tcp;
    let syn = |to: &str, port| ip(to, 6, &tcp(port, SYN));

    // Who sent it.
    add("foreign source MAC", with(syn("198.51.100.1", 80), |f| f[11] ^= 1), always(Drop(Spoofed)));
    add(
        "gateway's MAC as source",
        with(syn("198.51.100.1", 80), |f| f[6..12].copy_from_slice(&GATEWAY_MAC)),
        always(Drop(Spoofed)),
    );
    for from in ["10.214.0.2", "0.0.0.0", "127.0.0.1", "169.254.77.1", "198.51.100.9", "255.255.255.255"] {
        let packet = ip_from(from, "198.51.100.1", 6, &tcp(80, SYN));
        add(&format!("source {from}"), framed(&packet, false), always(Drop(Spoofed)));
    }
    for from in ["fd74:6761:7465::2", "::", "::1", "fe80::1", "fe80::9", "2001:db8::9"] {
        let packet = ip_from(from, "2001:db8:1::1", 6, &tcp(80, SYN));
        add(&format!("source {from}"), framed(&packet, true), always(Drop(Spoofed)));
    }
    // To whom, on the link.
    for (mac, why) in [
        ([0xff; 6], Broadcast),
        ([1, 0, 0x5e, 0, 0, 1], Multicast),
        ([0x33, 0x33, 0, 0, 0, 1], Multicast),
        ([2, 9, 9, 9, 9, 9], OtherVm),
    ] {
        add(
            &format!("to MAC {mac:x?}"),
            with(syn("198.51.100.1", 80), |f| f[..6].copy_from_slice(&mac)),
            always(Drop(why)),
        );
    }
    // What it is.
    let inner = ip_from(OWN, "198.51.100.1", 6, &tcp(80, SYN));
    for kind in [0x8100u16, 0x88a8, 0x9100, 0x9200, 0x9300] {
        let mut tagged = vec![0, 1, 8, 0];
        tagged.extend(&inner);
        add(&format!("VLAN tag {kind:#x}"), ethernet(GATEWAY_MAC, MAC, kind, &tagged), always(Drop(Vlan)));
    }
    for kind in [0u16, 0x05dc, 0x0801, 0x8035, 0x8847, 0x8863, 0x8864, 0x888e, 0x88cc, 0x88f7, 0xffff] {
        add(
            &format!("ethertype {kind:#x}"),
            ethernet(GATEWAY_MAC, MAC, kind, &inner),
            always(Drop(Ethertype)),
        );
    }
    add("only an Ethernet header", ethernet(GATEWAY_MAC, MAC, 0x0800, &[]), always(Drop(Malformed)));

    // ARP.
    let all = [0xff; 6];
    let arp_frame = |body: Vec<u8>| ethernet(all, MAC, 0x0806, &body);
    add("ARP for the gateway", arp_frame(arp(1, MAC, OWN, "169.254.77.1")), always(Gateway(Service)));
    add(
        "ARP for the gateway, padded",
        arp_frame([arp(1, MAC, OWN, "169.254.77.1"), vec![0; 18]].concat()),
        always(Gateway(Service)),
    );
    add(
        "ARP for the gateway by unicast",
        ethernet(GATEWAY_MAC, MAC, 0x0806, &arp(1, MAC, OWN, "169.254.77.1")),
        always(Gateway(Service)),
    );
    add("ARP for another guest", arp_frame(arp(1, MAC, OWN, "10.214.0.2")), always(Drop(Neighbour)));
    add(
        "ARP for the metadata address",
        arp_frame(arp(1, MAC, OWN, "169.254.169.254")),
        always(Drop(Neighbour)),
    );
    add("gratuitous ARP", arp_frame(arp(1, MAC, OWN, OWN)), always(Drop(Neighbour)));
    add("ARP answer", arp_frame(arp(2, MAC, OWN, "169.254.77.1")), always(Drop(Neighbour)));
    add("ARP answer as the gateway", arp_frame(arp(2, MAC, "169.254.77.1", OWN)), always(Drop(Neighbour)));
    add("ARP as the gateway", arp_frame(arp(1, MAC, "169.254.77.1", "169.254.77.1")), always(Drop(Spoofed)));
    add("ARP as another guest", arp_frame(arp(1, MAC, "10.214.0.2", "169.254.77.1")), always(Drop(Spoofed)));
    add("ARP probe", arp_frame(arp(1, MAC, "0.0.0.0", "169.254.77.1")), always(Drop(Spoofed)));
    add(
        "ARP with another MAC inside",
        arp_frame(arp(1, [6, 0x74, 0, 0, 0, 1], OWN, "169.254.77.1")),
        always(Drop(Spoofed)),
    );
    add("RARP operation", arp_frame(arp(3, MAC, OWN, "169.254.77.1")), always(Drop(Neighbour)));
    add(
        "ARP of another hardware",
        arp_frame(with(arp(1, MAC, OWN, "169.254.77.1"), |f| f[1] = 6)),
        always(Drop(Neighbour)),
    );
    add("short ARP", arp_frame(arp(1, MAC, OWN, "169.254.77.1")[..20].to_vec()), always(Drop(Malformed)));

    // IPv4 that is not plain.
    for length in [6usize, 8, 15] {
        let mut packet = ip_from(OWN, "198.51.100.1", 6, &[vec![1; (length - 5) * 4], tcp(80, SYN)].concat());
        packet[0] = 0x40 | length as u8;
        add(&format!("{length} words of IPv4 header"), framed(&packet, false), always(Drop(IpOptions)));
    }
    for (name, byte) in [
        ("4 words of IPv4 header", 0x44),
        ("IPv4 header of nothing", 0x40),
        ("version 5", 0x55),
        ("version 6 in IPv4", 0x65),
    ] {
        add(name, with(syn("198.51.100.1", 80), |f| f[14] = byte), always(Drop(Malformed)));
    }
    for (name, high, low) in [
        ("first fragment", 0x20, 0),
        ("tiny later fragment", 0, 1),
        ("last fragment", 0x00, 0xb9),
        ("fragment with DF", 0x60, 0),
    ] {
        add(
            name,
            with(syn("198.51.100.1", 80), |f| {
                f[20] = high;
                f[21] = low;
            }),
            always(Drop(Fragment)),
        );
    }
    add("the evil bit", with(syn("198.51.100.1", 80), |f| f[20] = 0x80), always(Drop(Malformed)));
    for (name, length) in [
        ("IPv4 longer than its frame", 200u16),
        ("IPv4 shorter than its header", 19),
        ("IPv4 of no length", 0),
    ] {
        add(
            name,
            with(syn("198.51.100.1", 80), |f| f[16..18].copy_from_slice(&length.to_be_bytes())),
            always(Drop(Malformed)),
        );
    }
    add("IPv4 cut in its header", syn("198.51.100.1", 80)[..30].to_vec(), always(Drop(Malformed)));
    add(
        "IPv4 with padding",
        with(syn("198.51.100.1", 80), |f| f.extend([0; 6])),
        [Proxy(tcp_list, NoRule), Uplink(Cidr), Proxy(tcp_list, NoRule)],
    );

    // Transport that is not plain.
    for (name, flags) in [
        ("TCP without flags", 0),
        ("SYN and FIN", 3),
        ("SYN and RST", 6),
        ("only PSH and URG", 0x28),
        ("all flags", 0x3f),
    ] {
        add(name, ip("198.51.100.1", 6, &tcp(80, flags)), always(Drop(Malformed)));
    }
    add(
        "TCP header of 4 words",
        ip("198.51.100.1", 6, &with(tcp(80, SYN), |f| f[12] = 4 << 4)),
        always(Drop(Malformed)),
    );
    add(
        "TCP header longer than the packet",
        ip("198.51.100.1", 6, &with(tcp(80, SYN), |f| f[12] = 15 << 4)),
        always(Drop(Malformed)),
    );
    add("TCP cut", ip("198.51.100.1", 6, &tcp(80, SYN)[..12]), always(Drop(Malformed)));
    add("TCP to port 0", syn("198.51.100.1", 0), always(Drop(Malformed)));
    add(
        "TCP from port 0",
        ip("198.51.100.1", 6, &with(tcp(80, SYN), |f| f[..2].fill(0))),
        always(Drop(Malformed)),
    );
    add("UDP cut", ip("198.51.100.1", 17, &[0; 5]), always(Drop(Malformed)));
    add(
        "UDP longer than its packet",
        ip("198.51.100.1", 17, &with(udp(99, b"x"), |f| f[5] = 200)),
        always(Drop(Malformed)),
    );
    add(
        "UDP shorter than its header",
        ip("198.51.100.1", 17, &with(udp(99, b"x"), |f| f[5] = 7)),
        always(Drop(Malformed)),
    );
    add("UDP to port 0", ip("198.51.100.1", 17, &udp(0, b"x")), always(Drop(Malformed)));
    add("ICMP cut", ip("198.51.100.1", 1, &[8, 0]), always(Drop(Malformed)));

    // Gateway services.
    for to in [
        "169.254.77.1",
        "198.51.100.53",
        "10.0.0.53",
        "8.8.8.8",
        "169.254.169.253",
        "10.214.0.2",
        "2001:db8::53",
        "fe80::1",
    ] {
        add(
            &format!("DNS over UDP to {to}"),
            ip(to, 17, &udp(53, b"q")),
            always(Proxy(Listener::DnsUdp, Service)),
        );
        add(&format!("DNS over TCP to {to}"), syn(to, 53), always(Proxy(Listener::DnsTcp, Service)));
    }
    for (to, why) in [
        ("127.0.0.53", Loopback),
        ("224.0.0.251", Multicast),
        ("255.255.255.255", Broadcast),
        ("::1", Loopback),
        ("ff02::fb", Multicast),
    ] {
        add(&format!("DNS over UDP to {to}"), ip(to, 17, &udp(53, b"q")), always(Drop(why)));
    }
    add("the guest service", syn("169.254.169.254", 80), always(Proxy(Listener::Service, Service)));
    add(
        "the guest service, later",
        ip("169.254.169.254", 6, &tcp(80, ACK)),
        always(Proxy(Listener::Service, Service)),
    );
    add("ping of the gateway", ip("169.254.77.1", 1, &icmp(8)), always(Gateway(Service)));
    add("ping of the gateway by IPv6", ip("fe80::1", 58, &icmp(128)), always(Gateway(Service)));
    add("SYN to the gateway", syn("169.254.77.1", 22), always(Refuse(HostAddress)));
    add("SYN to a listener's own port", syn("169.254.77.1", 7710), always(Refuse(HostAddress)));
    add("answer to the gateway", ip("169.254.77.1", 6, &tcp(22, ACK)), always(Verdict::Answer));
    add("SYN and ACK to the gateway", ip("169.254.77.1", 6, &tcp(22, SYN | ACK)), always(Verdict::Answer));
    add("UDP to the gateway", ip("169.254.77.1", 17, &udp(99, b"x")), always(Refuse(HostAddress)));
    add("other ICMP to the gateway", ip("169.254.77.1", 1, &icmp(5)), always(Drop(HostAddress)));
    add("SCTP to the gateway", ip("169.254.77.1", 132, &[0; 12]), always(Drop(HostAddress)));

    // Addresses that are never reached.
    for (to, why) in [
        ("169.254.169.254", LinkLocal),
        ("169.254.1.1", LinkLocal),
        ("169.254.170.2", LinkLocal),
        ("100.100.100.200", LinkLocal),
        ("168.63.129.16", LinkLocal),
        ("192.0.0.192", Reserved),
        ("192.88.99.1", Reserved),
        ("240.0.0.1", Reserved),
        ("10.214.0.2", OtherVm),
        ("10.214.0.1", OtherVm),
        ("10.214.255.255", OtherVm),
        ("192.0.2.1", HostAddress),
        ("203.0.113.77", HostAddress),
        ("fe80::2", LinkLocal),
        ("fd00:ec2::254", LinkLocal),
        ("fec0::1", Reserved),
        ("::ffff:198.51.100.1", Reserved),
        ("::198.51.100.1", Reserved),
        ("64:ff9b::c633:6401", Reserved),
        ("64:ff9b:1::1", Reserved),
        ("2002:c633:6401::1", Reserved),
        ("2001::1", Reserved),
        ("4000::1", Reserved),
        ("fd74:6761:7465::2", OtherVm),
        ("2001:db8:ff::1", HostAddress),
    ] {
        add(&format!("TCP to {to}"), syn(to, 443), always(Refuse(why)));
        add(&format!("UDP to {to}"), ip(to, 17, &udp(443, b"x")), always(Refuse(why)));
        let ping = if to.contains(':') { ip(to, 58, &icmp(128)) } else { ip(to, 1, &icmp(8)) };
        add(&format!("ping of {to}"), ping, always(Drop(why)));
    }
    for (to, why) in [
        ("0.0.0.0", Loopback),
        ("0.1.2.3", Loopback),
        ("127.0.0.1", Loopback),
        ("224.0.0.1", Multicast),
        ("239.255.255.250", Multicast),
        ("255.255.255.255", Broadcast),
        ("::", Loopback),
        ("::1", Loopback),
        ("ff02::1", Multicast),
        ("ff0e::1", Multicast),
    ] {
        add(&format!("TCP to {to}"), syn(to, 80), always(Drop(why)));
        add(&format!("UDP to {to}"), ip(to, 17, &udp(67, b"x")), always(Drop(why)));
    }

    // Rules, modes, private ranges.
    for (to, rule, private) in [
        ("198.51.100.1", true, false),
        ("203.0.113.1", false, false),
        ("10.9.1.1", true, true),
        ("10.8.1.1", false, true),
        ("192.168.1.1", false, true),
        ("172.16.0.1", false, true),
        ("100.64.9.9", true, true),
        ("100.64.9.8", false, true),
        ("198.18.0.1", false, true),
        ("2001:db8:1::1", true, false),
        ("2001:db8:2::1", false, false),
        ("fd00:9::1", true, true),
        ("fd00:8::1", false, true),
    ] {
        let ping = if to.contains(':') { (58, 128) } else { (1, 8) };
        let tcp_without = if private { Refuse(Private) } else { Proxy(tcp_list, NoRule) };
        let tcp_expected = [tcp_without, if rule { Uplink(Cidr) } else { tcp_without }, tcp_without];
        for port in [22, 80, 443, 5000] {
            add(&format!("TCP to {to}:{port}"), syn(to, port), tcp_expected);
        }
        add(&format!("later TCP to {to}"), ip(to, 6, &tcp(5001, ACK)), tcp_expected);
        let udp_without = if private { Private } else { NoRule };
        let warned = |otherwise: Verdict| if private { otherwise } else { Tolerate(NoRule) };
        let out = |closed: Verdict| [closed, if rule { Uplink(Cidr) } else { closed }, warned(closed)];
        add(&format!("UDP to {to}"), ip(to, 17, &udp(123, b"x")), out(Refuse(udp_without)));
        let quic = Refuse(if private { Private } else { Quic });
        add(
            &format!("QUIC to {to}"),
            ip(to, 17, &udp(443, b"x")),
            [quic, if rule { Uplink(Cidr) } else { quic }, quic],
        );
        add(&format!("ping of {to}"), ip(to, ping.0, &icmp(ping.1)), out(Drop(udp_without)));
        let error = if to.contains(':') { ip(to, 58, &icmp(1)) } else { ip(to, 1, &icmp(3)) };
        add(
            &format!("ICMP error to {to}"),
            error,
            [Drop(udp_without), if rule { Uplink(Cidr) } else { Drop(udp_without) }, Drop(udp_without)],
        );
        for protocol in [2u8, 4, 41, 47, 89, 132, 255] {
            add(&format!("protocol {protocol} to {to}"), ip(to, protocol, &[0; 24]), always(Drop(Protocol)));
        }
        let redirect = if to.contains(':') { None } else { Some(ip(to, 1, &icmp(5))) };
        if let Some(frame) = redirect {
            add(&format!("ICMP redirect to {to}"), frame, always(Drop(Protocol)));
        }
    }
    add("ICMPv6 in IPv4", ip("198.51.100.1", 58, &icmp(128)), always(Drop(Protocol)));
    add("ICMP in IPv6", ip("2001:db8:1::1", 1, &icmp(8)), always(Drop(Protocol)));

    // IPv6 that is not plain.
    for (header, why) in [
        (0u8, Ipv6Extension),
        (43, Ipv6Extension),
        (44, Fragment),
        (50, Ipv6Extension),
        (51, Ipv6Extension),
        (59, Ipv6Extension),
        (60, Ipv6Extension),
        (135, Ipv6Extension),
        (139, Ipv6Extension),
        (140, Ipv6Extension),
    ] {
        let body = [vec![6, 0, 0, 0, 0, 0, 0, 0], tcp(80, SYN)].concat();
        add(&format!("IPv6 extension {header}"), ip("2001:db8:1::1", header, &body), always(Drop(why)));
    }
    add("version 4 in IPv6", with(syn("2001:db8:1::1", 80), |f| f[14] = 0x45), always(Drop(Malformed)));
    add("IPv6 longer than its frame", with(syn("2001:db8:1::1", 80), |f| f[18] = 9), always(Drop(Malformed)));
    add("IPv6 cut in its header", syn("2001:db8:1::1", 80)[..40].to_vec(), always(Drop(Malformed)));

    // Neighbour discovery.
    let own_local = "fe80::474:ff:fe00:0";
    add(
        "ND for the gateway",
        discovery(OWN_V6, &solicit("fe80::1", Some(MAC)), 255),
        always(Gateway(Service)),
    );
    add(
        "ND from the link-local address",
        discovery(own_local, &solicit("fe80::1", Some(MAC)), 255),
        always(Gateway(Service)),
    );
    for left in [1, 7] {
        add(
            &format!("ND with {left} octets of its option"),
            discovery(OWN_V6, &solicit("fe80::1", Some(MAC))[..24 + left], 255),
            always(Drop(Neighbour)),
        );
    }
    add("ND without its option", discovery(OWN_V6, &solicit("fe80::1", None), 255), always(Gateway(Service)));
    add(
        "ND with another's MAC",
        discovery(OWN_V6, &solicit("fe80::1", Some([6, 0x74, 0, 0, 0, 1])), 255),
        always(Drop(Neighbour)),
    );
    add("ND from afar", discovery(OWN_V6, &solicit("fe80::1", Some(MAC)), 64), always(Drop(Neighbour)));
    add(
        "ND for another guest",
        discovery(OWN_V6, &solicit("fd74:6761:7465::2", Some(MAC)), 255),
        always(Drop(Neighbour)),
    );
    add(
        "ND as the gateway",
        discovery("fe80::1", &solicit("fe80::1", Some(MAC)), 255),
        always(Drop(Spoofed)),
    );
    add("duplicate address detection", discovery("::", &solicit(OWN_V6, None), 255), always(Drop(Spoofed)));
    for (name, kind) in [
        ("router solicitation", 133u8),
        ("router advertisement", 134),
        ("neighbour advertisement", 136),
        ("redirect", 137),
        ("group report", 143),
        ("group query", 130),
    ] {
        add(
            name,
            discovery(own_local, &with(solicit("fe80::1", Some(MAC)), |f| f[0] = kind), 255),
            always(Drop(Neighbour)),
        );
    }
    cases
}
