//! Packets that are cut, lie about their lengths, or carry options, fragments and extension headers. Nothing that is well formed.

use super::*;

pub(super) fn cases() -> Vec<Case> {
    use Reason::*;
    use Verdict::*;
    let mut cases = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>, expected: [Verdict; 3]| {
        cases.push(Case { name: name.into(), frame, expected: Some(expected) });
    };

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
        [Proxy(Listener::Tcp, NoRule), Uplink(Cidr), Proxy(Listener::Tcp, NoRule)],
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
    cases
}
