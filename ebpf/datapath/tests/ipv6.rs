//! The same by IPv6: forwarded, handed to the proxy, refused at once, cut; and nothing else.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use common::*;
use socket2::Domain;
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
};
use tapgate_datapath::Datapath;
use tapgate_ebpf_common::{Reason, net::GATEWAY_MAC};
use tapgate_model::{GuestNet, Mode, VmId};
use tapgate_netns::{Route, RouteKind, Rtnl};

#[test]
fn both_families_are_forwarded_refused_and_handed_over() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let listeners = listeners_of(&datapath, Domain::IPV6);
        datapath.set_host_addresses(&[ip(HOST_OUT), ip(HOST_OUT_V6)]).unwrap();
        let a = guest_v6(&datapath, 0, Mode::Enforce, &["2001:db8:1::/48", "198.51.100.0/24"]).await;
        for (to, own) in [("[2001:db8:1::1]:5000", HOST_OUT_V6), ("198.51.100.1:5000", HOST_OUT)] {
            let server = echo(listen(&world.internet.0, to));
            let mut stream = a.connect(to).unwrap();
            stream.set_read_timeout(Some(PATIENCE)).unwrap();
            // More than one segment, so that segmentation offload is used on the way.
            let sent = vec![7; 300_000];
            let mut writer = stream.try_clone().unwrap();
            let data = sent.clone();
            let writing = std::thread::spawn(move || writer.write_all(&data));
            let mut got = vec![0; sent.len()];
            stream.read_exact(&mut got).unwrap();
            writing.join().unwrap().unwrap();
            assert!(got == sent);
            drop(stream);
            assert_eq!(server.join().unwrap().ip(), ip(own), "the guest's address is translated");
        }
        // The proxy's listeners serve both.
        for to in ["[2001:db8:2::1]:443", "203.0.113.1:443"] {
            let mut stream = a.connect(to).unwrap();
            let (mut accepted, _) = listeners.tcp.accept().unwrap();
            let local = accepted.local_addr().unwrap();
            let wanted: SocketAddr = to.parse().unwrap();
            assert_eq!((local.ip().to_canonical(), local.port()), (wanted.ip(), wanted.port()));
            stream.write_all(b"hello").unwrap();
            accepted.read_exact(&mut [0; 5]).unwrap();
        }
        a.udp_at("[::]:0").send_to(b"q", "[2001:db8:2::53]:53").unwrap();
        let (_, from) = listeners.dns_udp.recv_from(&mut [0; 8]).unwrap();
        assert_eq!(from.ip(), ip("fd74:6761:7465::1"));

        let arrived = world.quiet();
        for to in [
            "[2001:db8:2::1]:5000",
            "[2001:db8:2::1]:443",
            "[2001:db8:ff::1]:9",
            "[fd74:6761:7465::2]:9",
            "[fd00:8::1]:9",
        ] {
            let socket = a.udp_at("[::]:0");
            socket.connect(to).unwrap();
            socket.send(b"x").unwrap();
            assert_eq!(socket.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        for to in [
            "[2001:db8:ff::1]:22",
            "[fd74:6761:7465::2]:22",
            "[fd00:8::1]:80",
            "[64:ff9b::c633:6401]:80",
            "[2002:c633:6401::1]:80",
        ] {
            let refused = a.connect(to).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        assert_eq!(world.arrived(), arrived, "nothing of it arrived");
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_routed_range_keeps_its_addresses_and_stays_closed_from_outside() {
    in_world_v6(|world| async move {
        let mut config = world.config.clone();
        config.guest_v6_routed = true;
        let datapath = Datapath::open(config).await.unwrap();
        // The router sends the range to this host.
        let internet = Rtnl::connect(&world.internet.0).unwrap();
        let link = internet.link("in0").await.unwrap();
        let to = (ip("fd74:6761:7465::"), 64);
        let via = Some(ip(HOST_OUT_V6));
        let route = Route { to, kind: RouteKind::Unicast, link: Some(link), via, source: None, table: 254 };
        internet.add_route(&route).await.unwrap();
        let a = guest_v6(&datapath, 0, Mode::Enforce, &["2001:db8:1::/48", "198.51.100.0/24"]).await;
        let own = ip("fd74:6761:7465::1");
        for (to, seen) in [("[2001:db8:1::1]:5000", own), ("198.51.100.1:5000", ip(HOST_OUT))] {
            let server = echo(listen(&world.internet.0, to));
            let mut stream = a.connect(to).unwrap();
            stream.write_all(b"x").unwrap();
            stream.read_exact(&mut [0]).unwrap();
            drop(stream);
            assert_eq!(server.join().unwrap().ip(), seen);
        }
        // Nobody outside reaches what the guest serves.
        let inside = a.udp_at("[::]:9");
        inside.set_nonblocking(true).unwrap();
        let outside = world.internet.0.run(|| UdpSocket::bind("[2001:db8:1::1]:9").unwrap()).unwrap();
        outside.send_to(b"x", SocketAddr::from((own, 9))).unwrap();
        std::thread::sleep(SILENCE);
        assert_eq!(inside.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::WouldBlock);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn an_ipv4_listener_is_never_given_an_ipv6_frame() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners_of(&datapath, Domain::IPV4);
        let a = guest_v6(&datapath, 0, Mode::Enforce, &[]).await;
        let to: SocketAddr = "[2001:db8:2::1]:443".parse().unwrap();
        assert!(a.ns.0.run(|| TcpStream::connect_timeout(&to, SILENCE)).unwrap().is_err());
        a.udp_at("[::]:0").send_to(b"q", "[2001:db8:2::53]:53").unwrap();
        eventually("both are dropped", || datapath.counters(0).unwrap().dropped(Reason::Fault) >= 2);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn an_ipv6_connection_that_loses_its_rule_is_cut_at_both_ends() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let a = guest_v6(&datapath, 0, Mode::Enforce, &["::/0"]).await;
        let listener = listen(&world.internet.0, "[2001:db8:1::1]:5000");
        let mut stream = a.connect("[2001:db8:1::1]:5000").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        stream.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        // A rule for everything of IPv4 is none for IPv6.
        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &["0.0.0.0/0"])).unwrap();
        for end in [&mut stream, &mut server] {
            end.set_read_timeout(Some(PATIENCE)).unwrap();
            assert_eq!(end.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        }
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn ipv6_guests_never_reach_each_other_nor_the_host_with_or_without_programs() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        datapath.set_host_addresses(&[ip(HOST_OUT), ip(HOST_OUT_V6)]).unwrap();
        let a = guest_v6(&datapath, 0, Mode::Warn, &["::/0"]).await;
        let b = guest_v6(&datapath, 1, Mode::Warn, &["::/0"]).await;
        let hear = |ns: &tapgate_netns::Netns| {
            let socket = ns.run(|| UdpSocket::bind("[::]:9").unwrap()).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            socket
        };
        let (at_b, at_host, at_internet) = (hear(&b.ns.0), hear(&world.host.0), hear(&world.internet.0));
        let sender = a.udp_at("[::]:0");
        let try_all = || {
            for to in [
                "[fd74:6761:7465::2]:9",
                "[2001:db8:ff::1]:9",
                "[fe80::2%2]:9",
                "[ff02::1%2]:9",
                "[2001:db8:2::1]:9",
            ] {
                let _ = sender.send_to(b"x", to);
            }
        };
        try_all();
        assert!(at_internet.recv_from(&mut [0; 8]).is_ok(), "a rule allows the internet");
        assert!(at_b.recv_from(&mut [0; 8]).is_err() && at_host.recv_from(&mut [0; 8]).is_err());
        world.remove_programs(&datapath, &["tg0", "tg1"]);
        let arrived = world.quiet();
        try_all();
        assert!(at_internet.recv_from(&mut [0; 8]).is_err());
        assert!(at_b.recv_from(&mut [0; 8]).is_err() && at_host.recv_from(&mut [0; 8]).is_err());
        assert_eq!(world.arrived(), arrived);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn no_crafted_ipv6_frame_of_a_closed_guest_arrives_anywhere() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners_of(&datapath, Domain::IPV6);
        let own = |slot| {
            GuestNet::new(slot, "10.214.0.0".parse().unwrap(), Some("fd74:6761:7465::".parse().unwrap()))
        };
        let vm = VmId::generate();
        let closed = policy(&vm, Mode::Enforce, &[]);
        let mut gate = datapath.attach_tap(&vm, own(0), &closed).await.unwrap();
        let mut other = datapath.attach_tap(&vm, own(1), &closed).await.unwrap();
        let mut wire = Wire::new(gate.take_tap().unwrap());
        let mut victim = Wire::new(other.take_tap().unwrap());
        let arrived = world.arrived();
        let cases = frames::cases();
        for case in &cases {
            wire.send(&case.frame);
        }
        // The gateway's own group reports are not the attacker's.
        let foreign = |frame: &[u8]| frame[6..12] != GATEWAY_MAC;
        assert!(victim.wait(SILENCE, foreign).is_none(), "another guest heard of it");
        assert_eq!(world.arrived(), arrived);
        let sent = cases.len() as u64;
        eventually("every frame is counted", || datapath.counters(0).unwrap().packets_out == sent);
        let counters = datapath.counters(0).unwrap();
        assert!(counters.dropped(Reason::Ipv6Extension) > 0 && counters.passed(Reason::Service) > 0);
        // It asked for the gateway, and was answered.
        wire.send(&frames::ethernet([0x33, 0x33, 0xff, 0, 0, 1], frames::MAC, 0x86dd, &{
            let mut packet = frames::ip_from(
                frames::OWN_V6,
                "ff02::1:ff00:1",
                58,
                &frames::solicit("fe80::1", Some(frames::MAC)),
            );
            packet[7] = 255;
            packet
        }));
        wire.wait(PATIENCE, |frame| frame[12..14] == [0x86, 0xdd] && frame[54] == 136)
            .expect("an advertisement");
        datapath.teardown().await.unwrap();
    });
}
