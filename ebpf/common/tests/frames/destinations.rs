//! Well-formed packets by where they go: services of the gateway, addresses that are never reached, and what rules and modes decide.

use super::*;

pub(super) fn cases() -> Vec<Case> {
    use Reason::*;
    use Verdict::*;
    let mut cases = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>, expected: [Verdict; 3]| {
        cases.push(Case { name: name.into(), frame, expected: Some(expected) });
    };

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
        let tcp_without = if private { Refuse(Private) } else { Proxy(Listener::Tcp, NoRule) };
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
    cases
}
