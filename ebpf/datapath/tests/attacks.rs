//! What a hostile guest puts on its tap, byte by byte, and what then arrives anywhere: nothing.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use common::*;
use std::{io::Write as _, net::TcpStream, time::Duration};
use tapgate_datapath::{Datapath, Gate};
use tapgate_ebpf_common::{Reason, net::GATEWAY_MAC};
use tapgate_model::{Mode, VmId};

async fn tap(datapath: &Datapath, slot: u32, mode: Mode, cidrs: &[&str]) -> (VmId, Gate, Wire) {
    let vm = VmId::generate();
    let mut gate = datapath.attach_tap(&vm, net(slot), &policy(&vm, mode, cidrs)).await.unwrap();
    let wire = Wire::new(gate.take_tap().unwrap());
    assert!(gate.take_tap().is_none());
    (vm, gate, wire)
}

fn is_ip(frame: &[u8], protocol: u8) -> bool {
    frame.len() > 34 && frame[12..14] == [8, 0] && frame[23] == protocol
}

#[test]
fn a_guest_finds_its_gateway_and_is_refused_at_once() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners(&datapath);
        let (_, _gate, mut wire) = tap(&datapath, 0, Mode::Enforce, &[]).await;
        wire.send(&frames::ethernet(
            [0xff; 6],
            frames::MAC,
            0x0806,
            &frames::arp(1, frames::MAC, frames::OWN, "169.254.77.1"),
        ));
        let answer = wire.wait(PATIENCE, |frame| frame[12..14] == [8, 6]).expect("an ARP answer");
        assert_eq!(answer[22..28], GATEWAY_MAC);
        wire.send(&frames::ip("169.254.77.1", 1, &frames::icmp(8)));
        wire.wait(PATIENCE, |frame| is_ip(frame, 1) && frame[34] == 0).expect("the answer of a ping");
        wire.send(&frames::ip("10.0.0.1", 6, &frames::tcp(80, frames::SYN)));
        let reset = wire.wait(PATIENCE, |frame| is_ip(frame, 6)).expect("a reset");
        assert_eq!(reset[47] & 4, 4);
        for port in [443, 4433] {
            wire.send(&frames::ip("203.0.113.1", 17, &frames::udp(port, b"x")));
            let unreachable = wire.wait(PATIENCE, |frame| is_ip(frame, 1)).expect("port unreachable");
            assert_eq!(unreachable[34..36], [3, 3]);
        }
        wire.send(&frames::ip("203.0.113.1", 6, &frames::tcp(443, frames::SYN)));
        let accepted = wire.wait(PATIENCE, |frame| is_ip(frame, 6)).expect("the proxy's SYN and ACK");
        assert_eq!(accepted[47], 0x12);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn no_crafted_frame_of_a_closed_guest_arrives_anywhere() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners(&datapath);
        let (_, _gate, mut wire) = tap(&datapath, 0, Mode::Enforce, &[]).await;
        let (_, _other, mut victim) = tap(&datapath, 1, Mode::Enforce, &[]).await;
        let arrived = world.arrived();
        let mut sent = 0;
        for case in frames::cases() {
            // The kernel takes no frame from a tap that is shorter than an Ethernet header.
            wire.send(&case.frame);
            sent += 1;
        }
        // VLAN tags that the kernel moves out of the frame, one and two deep.
        for depth in [1, 2] {
            let mut inner = frames::ip_from(frames::OWN, "198.51.100.1", 17, &frames::udp(99, b"x"));
            for _ in 0..depth {
                inner = [vec![0, 1, 0x08, 0x00], inner].concat();
            }
            wire.send(&frames::ethernet(GATEWAY_MAC, frames::MAC, 0x8100, &inner));
            sent += 1;
        }
        assert!(victim.wait(SILENCE, |_| true).is_none(), "another guest heard of it");
        assert_eq!(world.arrived(), arrived);
        eventually("every frame is counted", || datapath.counters(0).unwrap().packets_out == sent);
        let counters = datapath.counters(0).unwrap();
        for reason in [
            Reason::Spoofed,
            Reason::Vlan,
            Reason::Fragment,
            Reason::IpOptions,
            Reason::Neighbour,
            Reason::Malformed,
            Reason::Ipv6,
            Reason::Broadcast,
        ] {
            assert!(counters.dropped(reason) > 0, "{reason:?}");
        }
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_forged_source_never_reaches_another_guests_connection() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let listeners = listeners(&datapath);
        // The victim has a connection that the proxy answers for; the attacker knows its addresses, ports and numbers.
        let victim = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let mut stream = victim.connect("203.0.113.1:443").unwrap();
        let (accepted, peer) = listeners.tcp.accept().unwrap();
        stream.write_all(b"mine").unwrap();
        let (_, _gate, mut wire) = tap(&datapath, 1, Mode::Warn, &["0.0.0.0/0"]).await;
        let attacker = net(1).mac;
        let mut segment = frames::tcp(443, frames::ACK);
        segment[..2].copy_from_slice(&peer.port().to_be_bytes());
        for flags in [frames::ACK, frames::ACK | 4, 4, frames::SYN, frames::ACK | 1] {
            segment[13] = flags;
            for sequence in (0..64u32).map(|n| n << 26) {
                segment[4..8].copy_from_slice(&sequence.to_be_bytes());
                let packet = frames::ip_from("10.214.0.1", "203.0.113.1", 6, &segment);
                wire.send(&frames::ethernet(GATEWAY_MAC, attacker, 0x0800, &packet));
            }
        }
        let spoofed = || datapath.counters(1).unwrap().dropped(Reason::Spoofed);
        eventually("every one is dropped", || spoofed() == 5 * 64);
        assert_eq!(datapath.counters(1).unwrap().reasons().count(), 1, "nothing of it did anything else");
        // From its own address, a segment of the same ports is nobody's.
        let packet = frames::ip_from("10.214.0.2", "203.0.113.1", 6, &segment);
        wire.send(&frames::ethernet(GATEWAY_MAC, attacker, 0x0800, &packet));
        stream.write_all(b" still").unwrap();
        accepted.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut got = [0; 10];
        std::io::Read::read_exact(&mut &accepted, &mut got).unwrap();
        assert_eq!(&got, b"mine still");
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_forged_answer_to_the_gateway_meets_no_connection() {
    in_world(|world| async move {
        let datapath = world.open().await;
        // The daemon talks to guest 0's port 22; guest 1 forges guest 0's answers, and answers of its own.
        let victim = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let server = echo(listen(&victim.ns.0, "0.0.0.0:22"));
        let stream = datapath.egress().run(|| TcpStream::connect("10.214.0.1:22").unwrap()).unwrap();
        let (_, _gate, mut wire) = tap(&datapath, 1, Mode::Enforce, &[]).await;
        let mut segment = frames::tcp(stream.local_addr().unwrap().port(), frames::ACK);
        segment[..2].copy_from_slice(&22u16.to_be_bytes());
        let send = |wire: &mut Wire, from: &str| {
            let packet = frames::ip_from(from, "169.254.77.1", 6, &segment);
            wire.send(&frames::ethernet(GATEWAY_MAC, net(1).mac, 0x0800, &packet));
        };
        send(&mut wire, "10.214.0.1");
        send(&mut wire, "10.214.0.2");
        eventually("both are dropped", || {
            let counters = datapath.counters(1).unwrap();
            (counters.dropped(Reason::Spoofed), counters.dropped(Reason::HostAddress)) == (1, 1)
        });
        let reset = wire.wait(PATIENCE, |frame| is_ip(frame, 6)).expect("a reset");
        assert_eq!(reset[47] & 4, 4);
        drop(stream);
        server.join().unwrap();
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_tap_lives_with_its_holder_and_its_slot_can_be_used_again() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let (vm, gate, wire) = tap(&datapath, 5, Mode::Enforce, &[]).await;
        assert!(datapath.attach_tap(&vm, net(5), &policy(&vm, Mode::Enforce, &[])).await.is_err());
        let inside = tapgate_netns::Rtnl::connect(datapath.egress()).unwrap();
        drop((wire, gate));
        while inside.find_link("tg5").await.unwrap().is_some() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let missing = datapath.adopt(&vm, net(5), &policy(&vm, Mode::Enforce, &[])).await;
        assert!(missing.is_err(), "the VMM died, and its tap with it");
        datapath.detach(net(5)).await.unwrap();
        datapath.detach(net(5)).await.unwrap();
        assert!(datapath.counters(5).is_err());
        assert_eq!(datapath.slots().unwrap(), Vec::<u32>::new());
        let own = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().starts_with("5-");
        assert!(!std::fs::read_dir(world.pins().join("links")).unwrap().any(|entry| own(entry.unwrap())));
        let (_, _gate, mut wire) = tap(&datapath, 5, Mode::Enforce, &[]).await;
        wire.send(&frames::ethernet(
            [0xff; 6],
            net(5).mac,
            0x0806,
            &frames::arp(1, net(5).mac, "10.214.0.6", "169.254.77.1"),
        ));
        wire.wait(PATIENCE, |frame| frame[12..14] == [8, 6]).expect("an ARP answer");
        datapath.teardown().await.unwrap();
    });
}

/// Where something would be heard if it came through: the host, another namespace of the host's, the internet.
fn ears(spaces: &[&tapgate_netns::Netns]) -> Vec<std::net::UdpSocket> {
    let hear = |ns: &&tapgate_netns::Netns| {
        let socket = ns.run(|| std::net::UdpSocket::bind("0.0.0.0:9").unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        socket
    };
    spaces.iter().map(hear).collect()
}

/// Nothing of guest 0 was let through. What the gateway's own stack says to a new tap comes the other way.
fn nothing_passed(datapath: &Datapath) {
    let counters = datapath.counters(0).unwrap();
    let passed: u64 = counters.reasons().map(|(_, passed, _)| passed).sum();
    assert_eq!(passed, counters.passed(Reason::Answer), "{counters:?}");
    assert_eq!(passed, counters.packets_in, "{counters:?}");
}

#[test]
fn what_a_driver_claims_about_a_frame_opens_nothing() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners(&datapath);
        datapath.set_host_addresses(&[ip(HOST_OUT)]).unwrap();
        let (_, _gate, mut wire) = tap(&datapath, 0, Mode::Warn, &[]).await;
        let (_, _other, mut victim) = tap(&datapath, 1, Mode::Warn, &[]).await;
        let ears = ears(&[&world.host.0, &world.internet.0]);
        let arrived = world.quiet();
        let mut sent = 0u64;
        for to in [
            "192.0.2.1",
            "10.214.0.2",
            "10.9.9.9",
            "169.254.77.2",
            "169.254.77.3",
            "127.0.0.1",
            "169.254.1.1",
        ] {
            // As long as several pages, so that the kernel keeps it in pieces; the header where the driver says: too short
            // for what the frame holds, in the middle of a header, beyond its end.
            for (length, claimed) in
                [(20usize, 0u16), (9000, 14), (9000, 15), (9000, 20), (9000, 34), (9000, 42), (40_000, 14)]
            {
                let body = frames::udp(9, &vec![b'x'; length]);
                let frame = frames::ip(to, 17, &body);
                for (flags, kind, segment) in [
                    (0u8, 0u8, 0u16),
                    (1, 1, 1400),
                    (1, 3, 1400),
                    (1, 4, 1400),
                    (1, 5, 1400),
                    (0, 0x81, 1),
                    (1, 3, 1),
                ] {
                    let mut header = [0; tapgate_netns::tap::VNET_HEADER];
                    (header[0], header[1]) = (flags, kind);
                    header[2..4].copy_from_slice(&claimed.to_le_bytes());
                    header[4..6].copy_from_slice(&segment.to_le_bytes());
                    header[6..8].copy_from_slice(&34u16.to_le_bytes());
                    header[8..10].copy_from_slice(&6u16.to_le_bytes());
                    // The kernel refuses some of these claims itself.
                    sent += u64::from(wire.try_send_with(&header, &frame).is_ok());
                }
            }
        }
        assert!(sent > 100, "{sent}");
        eventually("every one is counted", || datapath.counters(0).unwrap().packets_out >= sent);
        let ours = |frame: &[u8]| frame[6..12] != GATEWAY_MAC;
        assert!(victim.wait(SILENCE, ours).is_none(), "another guest heard of it");
        for (at, ear) in ears.iter().enumerate() {
            assert!(ear.recv_from(&mut [0; 8]).is_err(), "number {at} heard of it");
        }
        assert_eq!(world.quiet(), arrived);
        nothing_passed(&datapath);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_frame_in_pieces_is_the_same_frame() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let (_, _gate, mut wire) = tap(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let server = world.internet.0.run(|| std::net::UdpSocket::bind("198.51.100.1:9").unwrap()).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        wire.send(&frames::ip("198.51.100.1", 17, &frames::udp(9, b"first")));
        assert_eq!(server.recv_from(&mut [0; 64]).unwrap().0, 5);
        // Of the same flow, with no more than its Ethernet header in one piece: the quick look sees nothing of it.
        let mut header = [0; tapgate_netns::tap::VNET_HEADER];
        header[2..4].copy_from_slice(&14u16.to_le_bytes());
        let before = datapath.counters(0).unwrap();
        wire.send_with(&header, &frames::ip("198.51.100.1", 17, &frames::udp(9, &[7; 6000])));
        eventually("it is let through", || {
            datapath.counters(0).unwrap().passed(Reason::Cidr) > before.passed(Reason::Cidr)
        });
        let mut foreign = frames::ip("198.51.100.1", 17, &frames::udp(9, &[7; 6000]));
        foreign[29] ^= 1;
        wire.send_with(&header, &foreign);
        eventually("and another's is not", || datapath.counters(0).unwrap().dropped(Reason::Spoofed) == 1);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_guest_that_plays_router_or_server_is_heard_by_nobody() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let own = |slot| {
            tapgate_model::GuestNet::new(
                slot,
                [10, 214, 0, 0].into(),
                Some("fd74:6761:7465::".parse().unwrap()),
            )
        };
        let vm = VmId::generate();
        let open = policy(&vm, Mode::Warn, &["0.0.0.0/0", "::/0"]);
        let mut gate = datapath.attach_tap(&vm, own(0), &open).await.unwrap();
        let mut wire = Wire::new(gate.take_tap().unwrap());
        // The victim is a whole guest: what it accepted of this would show in its addresses, routes and neighbours.
        let victim = guest_v6(&datapath, 1, Mode::Warn, &["0.0.0.0/0", "::/0"]).await;
        victim.ns.0.sysctl("ipv6/conf/eth0/accept_ra", "2").unwrap();
        let seen = |ns: &tapgate_netns::Netns| {
            let show = |what: &[&str]| {
                let run = || std::process::Command::new("ip").args(what).output().unwrap().stdout;
                String::from_utf8(ns.run(run).unwrap()).unwrap()
            };
            [show(&["-br", "address"]), show(&["-4", "route"]), show(&["-6", "route"])]
        };
        eventually("the victim's addresses are ready", || !seen(&victim.ns.0)[0].contains("tentative"));
        let (of_victim, of_egress, of_host) =
            (seen(&victim.ns.0), seen(datapath.egress()), seen(&world.host.0));
        let arrived = world.quiet();
        let all = [0xff; 6];
        let local = "fe80::474:ff:fe00:0";
        let nd = |to: &str, kind: u8, body: &[u8]| {
            let mut packet = frames::ip_from(local, to, 58, &[&[kind, 0, 0, 0], body].concat());
            packet[7] = 255;
            packet
        };
        let mut prefix = vec![64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0, 3, 4, 64, 0xc0];
        prefix.extend([0xff; 8]);
        prefix.extend([0; 4]);
        prefix.extend(frames::v6("2001:db8:bad::"));
        let dhcp =
            |kind: u8| [vec![kind, 1, 6, 0], vec![0; 236], vec![99, 130, 83, 99, 53, 1, 2, 255]].concat();
        let ports = |from: u16, to: u16, body: &[u8]| {
            let mut packet = frames::udp(to, body);
            packet[..2].copy_from_slice(&from.to_be_bytes());
            packet
        };
        let mut frames_sent = 0u64;
        for mac in [all, [0x33, 0x33, 0, 0, 0, 1], own(1).mac, GATEWAY_MAC] {
            let list: Vec<(u16, Vec<u8>)> = vec![
                // Router advertisements, to everyone and to the victim; a redirect; an answer for the gateway's address.
                (0x86dd, nd("ff02::1", 134, &prefix)),
                (0x86dd, nd("fd74:6761:7465::2", 134, &prefix)),
                (
                    0x86dd,
                    nd(
                        "fd74:6761:7465::2",
                        137,
                        &[&[0; 4][..], &frames::v6(local), &frames::v6("2001:db8:1::1")].concat(),
                    ),
                ),
                (
                    0x86dd,
                    nd(
                        "ff02::1",
                        136,
                        &[&[0xa0, 0, 0, 0][..], &frames::v6("fe80::1"), &[2, 1], &frames::MAC].concat(),
                    ),
                ),
                (0x86dd, nd("ff02::16", 143, &[0; 20])),
                // A DHCP server's offer, a client's question, both of DHCPv6; mDNS, LLMNR, SSDP, NetBIOS.
                (0x0800, frames::ip_from(frames::OWN, "255.255.255.255", 17, &ports(67, 68, &dhcp(2)))),
                (0x0800, frames::ip_from(frames::OWN, "10.214.0.2", 17, &ports(67, 68, &dhcp(2)))),
                (0x0800, frames::ip_from("0.0.0.0", "255.255.255.255", 17, &ports(68, 67, &dhcp(1)))),
                (0x86dd, frames::ip_from(local, "ff02::1:2", 17, &ports(547, 546, &[7, 0, 0, 1]))),
                (
                    0x86dd,
                    frames::ip_from(frames::OWN_V6, "fd74:6761:7465::2", 17, &ports(547, 546, &[7, 0, 0, 1])),
                ),
                (0x0800, frames::ip_from(frames::OWN, "224.0.0.251", 17, &ports(5353, 5353, b"x"))),
                (0x0800, frames::ip_from(frames::OWN, "224.0.0.252", 17, &ports(5355, 5355, b"x"))),
                (0x0800, frames::ip_from(frames::OWN, "239.255.255.250", 17, &ports(1900, 1900, b"x"))),
                (0x0800, frames::ip_from(frames::OWN, "10.214.255.255", 17, &ports(137, 137, b"x"))),
                // ARP for the gateway and for the victim, as an answer and unasked.
                (0x0806, frames::arp(2, frames::MAC, "169.254.77.1", "10.214.0.2")),
                (0x0806, frames::arp(1, frames::MAC, "169.254.77.1", "169.254.77.1")),
                (0x0806, frames::arp(2, frames::MAC, "10.214.0.2", "10.214.0.2")),
                // Routing protocols and tunnels: IGMP, OSPF, VRRP, GRE, 6in4, IP in IP, ESP.
                (0x0800, frames::ip_from(frames::OWN, "224.0.0.22", 2, &[0x22; 16])),
                (0x0800, frames::ip_from(frames::OWN, "224.0.0.5", 89, &[2; 24])),
                (0x0800, frames::ip_from(frames::OWN, "224.0.0.18", 112, &[0x21; 20])),
                (0x0800, frames::ip_from(frames::OWN, "198.51.100.1", 47, &[0; 24])),
                (
                    0x0800,
                    frames::ip_from(
                        frames::OWN,
                        "198.51.100.1",
                        41,
                        &frames::ip_from(frames::OWN_V6, "2001:db8:1::1", 17, &frames::udp(9, b"x")),
                    ),
                ),
                (
                    0x0800,
                    frames::ip_from(
                        frames::OWN,
                        "198.51.100.1",
                        4,
                        &frames::ip_from(frames::OWN, "198.51.100.1", 17, &frames::udp(9, b"x")),
                    ),
                ),
                (0x0800, frames::ip_from(frames::OWN, "198.51.100.1", 50, &[0; 40])),
                // ICMP that is neither a question nor a report: an answer nobody asked for, a redirect, a router's, a timestamp.
                (0x0800, frames::ip_from(frames::OWN, "198.51.100.1", 1, &frames::icmp(0))),
                (0x0800, frames::ip_from(frames::OWN, "198.51.100.1", 1, &frames::icmp(5))),
                (0x0800, frames::ip_from(frames::OWN, "198.51.100.1", 1, &frames::icmp(9))),
                (0x0800, frames::ip_from(frames::OWN, "198.51.100.1", 1, &frames::icmp(13))),
                (0x86dd, frames::ip_from(frames::OWN_V6, "2001:db8:1::1", 58, &frames::icmp(129))),
                // Spanning tree, LLDP, 802.1X, PPPoE, MPLS.
                (0x0026, vec![0x42, 0x42, 3, 0, 0, 0]),
                (0x88cc, vec![2, 7, 4, 0, 0, 0]),
                (0x888e, vec![1, 1, 0, 0]),
                (0x8863, vec![0x11, 9, 0, 0, 0, 0]),
                (0x8847, vec![0, 1, 1, 64, 0x45]),
            ];
            for (kind, packet) in list {
                wire.send(&frames::ethernet(mac, frames::MAC, kind, &packet));
                frames_sent += 1;
            }
        }
        eventually("every one is counted", || datapath.counters(0).unwrap().packets_out == frames_sent);
        nothing_passed(&datapath);
        assert_eq!(world.quiet(), arrived);
        assert_eq!(seen(&victim.ns.0), of_victim);
        assert_eq!(seen(datapath.egress()), of_egress);
        assert_eq!(seen(&world.host.0), of_host);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn other_namespaces_of_the_host_are_out_of_reach() {
    in_world(|world| async move {
        let datapath = world.open().await;
        datapath.set_host_addresses(&[ip(HOST_OUT), ip("172.17.0.1")]).unwrap();
        // A container's network as a host has it: a device, a range, a route.
        let container = Temporary::new("container");
        let host = tapgate_netns::Rtnl::connect(&world.host.0).unwrap();
        let pair = tapgate_netns::Veth {
            name: "c0",
            mac: None,
            peer: "eth0",
            peer_mac: None,
            peer_netns: &container.0,
        };
        let near = host.add_veth(&pair).await.unwrap();
        let inside = tapgate_netns::Rtnl::connect(&container.0).unwrap();
        let far = inside.link("eth0").await.unwrap();
        for (rtnl, link, own, to) in
            [(&host, near, "172.17.0.1", ("172.17.0.0", 16)), (&inside, far, "172.17.0.2", ("0.0.0.0", 0))]
        {
            rtnl.add_address(link, ip(own), 16).await.unwrap();
            rtnl.set_up(link).await.unwrap();
            let route = tapgate_netns::Route {
                to: (ip(to.0), to.1),
                kind: tapgate_netns::RouteKind::Unicast,
                link: Some(link),
                via: None,
                source: None,
                table: 254,
            };
            rtnl.add_route(&route).await.unwrap();
        }
        let heard = &ears(&[&container.0])[0];
        let a = guest(&datapath, 0, Mode::Warn, &[]).await;
        for to in ["172.17.0.2:9", "172.17.0.1:9", "192.0.2.1:9"] {
            let _ = a.udp().send_to(b"x", to);
            assert_eq!(a.connect(to).unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused, "{to}");
        }
        let counters = datapath.counters(0).unwrap();
        assert_eq!((counters.dropped(Reason::Private), counters.dropped(Reason::HostAddress)), (2, 4));
        std::thread::sleep(SILENCE);
        assert!(heard.recv_from(&mut [0; 8]).is_err());
        // A rule for the range is the operator's word, and then it is heard.
        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &["172.17.0.0/16"])).unwrap();
        let _ = a.udp().send_to(b"x", "172.17.0.2:9");
        eventually("a rule opens it", || heard.recv_from(&mut [0; 8]).is_ok());
        datapath.teardown().await.unwrap();
    });
}
