//! Frames on the link: who sent them and to whom, what they carry, ARP and neighbour discovery with the gateway. Nothing of where a
//! packet goes beyond it.

use super::*;

pub(super) fn cases() -> Vec<Case> {
    use Reason::*;
    use Verdict::*;
    let mut cases = Vec::new();
    let mut add = |name: &str, frame: Vec<u8>, expected: [Verdict; 3]| {
        cases.push(Case { name: name.into(), frame, expected: Some(expected) });
    };

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
