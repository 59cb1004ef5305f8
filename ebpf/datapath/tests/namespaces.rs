//! The datapath in real namespaces, over veths: what passes, what doesn't, and what a lost program means.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream, UdpSocket},
};
use tapgate_ebpf_common::Reason;
use tapgate_model::{Mode, Verdict};
use tapgate_netns::{Netns, nft};

fn refused(result: std::io::Result<TcpStream>) {
    assert_eq!(result.unwrap_err().kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn a_cidr_rule_is_forwarded_and_masqueraded_and_nothing_else_is() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners(&datapath);
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        let mut stream = a.connect("198.51.100.1:5000").unwrap();
        round_trip(&mut stream).unwrap();
        drop(stream);
        assert_eq!(server.join().unwrap().ip(), ip(HOST_OUT), "the guest's address is translated");
        assert!(datapath.counters(0).unwrap().passed(Reason::Cidr) > 4);

        let arrived = world.quiet();
        // Refused at once: UDP without a rule, and every address that is never reachable.
        for to in ["203.0.113.1:5000", "203.0.113.1:443"] {
            let socket = a.udp();
            socket.connect(to).unwrap();
            socket.send(b"x").unwrap();
            assert_eq!(socket.recv(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionRefused, "{to}");
        }
        for to in [
            "10.9.9.9:80",
            "10.214.0.2:80",
            "169.254.1.1:80",
            "169.254.77.1:22",
            "100.100.100.200:80",
            "240.0.0.1:80",
        ] {
            refused(a.connect(to));
        }
        assert_eq!(world.arrived(), arrived, "nothing of it arrived");
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn tcp_without_a_rule_meets_the_proxy_which_sees_both_addresses() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let listeners = listeners(&datapath);
        let a = guest(&datapath, 7, Mode::Enforce, &[]).await;
        let arrived = world.arrived();
        let mut stream = a.connect("203.0.113.1:443").unwrap();
        let (mut accepted, peer) = listeners.tcp.accept().unwrap();
        assert_eq!(accepted.local_addr().unwrap(), "203.0.113.1:443".parse::<SocketAddr>().unwrap());
        assert_eq!(peer.ip(), ip("10.214.0.8"));
        stream.write_all(b"hello").unwrap();
        let mut got = [0; 5];
        accepted.read_exact(&mut got).unwrap();
        assert_eq!(&got, b"hello");

        // DNS to any address, over both transports, and the guest service.
        a.connect("198.51.100.53:53").unwrap();
        let (dns, _) = listeners.dns_tcp.accept().unwrap();
        assert_eq!(dns.local_addr().unwrap().ip(), ip("198.51.100.53"));
        a.udp().send_to(b"question", "198.51.100.53:53").unwrap();
        let mut question = [0; 16];
        let (n, from) = listeners.dns_udp.recv_from(&mut question).unwrap();
        assert_eq!((&question[..n], from.ip()), (&b"question"[..], ip("10.214.0.8")));
        a.connect("169.254.169.254:80").unwrap();
        let (service, _) = listeners.service.accept().unwrap();
        assert_eq!(service.local_addr().unwrap().ip(), ip("169.254.169.254"));
        assert_eq!(world.arrived(), arrived);

        // Without its listener nothing opens.
        drop((accepted, listeners));
        refused_or_silent(&a, "203.0.113.1:443");
        eventually("it is dropped", || datapath.counters(7).unwrap().dropped(Reason::Fault) > 0);
        assert_eq!(world.arrived(), arrived);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn warn_lets_udp_pass_and_reports_it() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let mut events = datapath.events().unwrap();
        let a = guest(&datapath, 0, Mode::Warn, &["198.51.100.0/24"]).await;
        let server = world.internet.0.run(|| UdpSocket::bind("203.0.113.1:7").unwrap()).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = a.udp();
        client.connect("203.0.113.1:7").unwrap();
        client.send(b"out").unwrap();
        let mut got = [0; 8];
        let (n, from) = server.recv_from(&mut got).unwrap();
        assert_eq!((&got[..n], from.ip()), (&b"out"[..], ip(HOST_OUT)));
        server.send_to(b"back", from).unwrap();
        assert_eq!(client.recv(&mut got).unwrap(), 4);
        let event = events.next().await.unwrap();
        assert_eq!(event.verdict, Verdict::Tolerate { reason: Reason::NoRule });
        assert_eq!((event.destination, event.port, event.slot), (ip(OTHER), Some(7), 0));
        refused(a.connect("10.9.9.9:80"));
        let event = events.next().await.unwrap();
        assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Private });
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn guests_never_reach_each_other_nor_the_host_with_or_without_programs() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners(&datapath);
        datapath.set_host_addresses(&[ip(HOST_OUT)]).unwrap();
        let a = guest(&datapath, 0, Mode::Warn, &["0.0.0.0/0"]).await;
        let b = guest(&datapath, 1, Mode::Warn, &["0.0.0.0/0"]).await;
        let b_udp = b.ns.0.run(|| UdpSocket::bind("0.0.0.0:9").unwrap()).unwrap();
        b_udp.set_read_timeout(Some(SILENCE)).unwrap();
        let host_udp = world.host.0.run(|| UdpSocket::bind("0.0.0.0:9").unwrap()).unwrap();
        host_udp.set_read_timeout(Some(SILENCE)).unwrap();
        let internet_udp = world.internet.0.run(|| UdpSocket::bind("0.0.0.0:9").unwrap()).unwrap();
        internet_udp.set_read_timeout(Some(PATIENCE)).unwrap();
        let try_all = || {
            for to in ["10.214.0.2:9", "192.0.2.1:9", "169.254.77.2:9", "169.254.77.3:9", "203.0.113.1:9"] {
                let _ = a.udp().send_to(b"x", to);
            }
        };
        try_all();
        internet_udp.recv_from(&mut [0; 8]).expect("a rule allows the internet");
        internet_udp.set_read_timeout(Some(SILENCE)).unwrap();
        assert!(b_udp.recv_from(&mut [0; 8]).is_err(), "guest to guest");
        assert!(host_udp.recv_from(&mut [0; 8]).is_err(), "guest to host");
        eventually("both are refused", || {
            let counters = datapath.counters(0).unwrap();
            (counters.dropped(Reason::OtherVm), counters.dropped(Reason::HostAddress)) == (1, 1)
        });

        // The programs go: nothing leaves any more.
        world.remove_programs(&datapath, &["tg0", "tg1"]);
        let arrived = world.quiet();
        try_all();
        for to in
            ["10.214.0.2:80", "192.0.2.1:80", "203.0.113.1:80", "169.254.77.1:7710", "169.254.169.254:80"]
        {
            refused_or_silent(&a, to);
        }
        assert!(b_udp.recv_from(&mut [0; 8]).is_err(), "guest to guest without a program");
        assert!(host_udp.recv_from(&mut [0; 8]).is_err(), "guest to host without a program");
        assert!(internet_udp.recv_from(&mut [0; 8]).is_err(), "guest to uplink without a program");
        assert_eq!(world.arrived(), arrived);
        datapath.teardown().await.unwrap();
    });
}

/// The host's own addresses by its routes alone: the programs were told of none.
#[test]
fn an_address_of_the_host_that_no_list_has_is_not_reached() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["0.0.0.0/0"]).await;
        let heard = |netns: &Netns, at: &str| {
            let socket = netns.run(|| UdpSocket::bind(at).unwrap()).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            move || {
                let from = socket.recv_from(&mut [0; 8]).map(|(_, from)| from);
                // An answer: the host's connection tracking takes no connection for opened before there is one.
                from.and_then(|from| socket.send_to(b"y", from)).is_ok()
            }
        };
        let host = heard(&world.host.0, "0.0.0.0:9");
        let [other, server] = [OTHER, SERVER].map(|at| heard(&world.internet.0, &format!("{at}:9")));
        let socket = a.udp();
        let send = |to: &str| assert_eq!(socket.send_to(b"x", to).unwrap(), 1);
        send(&format!("{OTHER}:9"));
        assert!(other(), "a rule allows the internet");
        send(&format!("{HOST_OUT}:9"));
        assert!(!host(), "the host's address");

        // It is published, as a container's port is.
        let publish = format!(
            "table ip published {{ chain prerouting {{ type nat hook prerouting priority dstnat; \
             ip daddr {HOST_OUT} udp dport 10 dnat to {SERVER}:9;\n}}\n}}\n"
        );
        nft::load(&world.host.0, &publish).unwrap();
        send(&format!("{HOST_OUT}:10"));
        assert!(!server(), "what the host publishes at its address");

        // An address that became the host's own after the connection was opened.
        let rtnl = tapgate_netns::Rtnl::connect(&world.host.0).unwrap();
        let loopback = rtnl.link("lo").await.unwrap();
        rtnl.set_up(loopback).await.unwrap();
        rtnl.add_address(loopback, ip(OTHER), 32).await.unwrap();
        send(&format!("{OTHER}:9"));
        assert!(!host() && !other(), "the host's address as of now");
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn nothing_from_outside_reaches_a_guest_that_did_not_ask() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["203.0.113.0/24"]).await;
        let a_udp = a.ns.0.run(|| UdpSocket::bind("0.0.0.0:9").unwrap()).unwrap();
        a_udp.set_read_timeout(Some(SILENCE)).unwrap();
        // A neighbour of the host that knows the guest's address and routes to it.
        let internet = tapgate_netns::Rtnl::connect(&world.internet.0).unwrap();
        let link = internet.link("in0").await.unwrap();
        internet
            .add_route(&tapgate_netns::Route {
                to: (ip("10.214.0.0"), 16),
                kind: tapgate_netns::RouteKind::Unicast,
                link: Some(link),
                via: Some(ip(HOST_OUT)),
                source: None,
                table: 254,
            })
            .await
            .unwrap();
        let out = world.internet.0.run(|| UdpSocket::bind("203.0.113.1:9").unwrap()).unwrap();
        out.send_to(b"x", "10.214.0.1:9").unwrap();
        // And the host itself.
        let host = world.host.0.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
        host.send_to(b"x", "10.214.0.1:9").unwrap();
        assert!(a_udp.recv_from(&mut [0; 8]).is_err());
        // The daemon itself does reach it, from the egress namespace: as it does for SSH.
        let ssh = echo(listen(&a.ns.0, "0.0.0.0:22"));
        let mut stream = datapath.egress().run(|| TcpStream::connect("10.214.0.1:22").unwrap()).unwrap();
        assert_eq!(stream.local_addr().unwrap().ip(), ip("169.254.77.1"));
        round_trip(&mut stream).unwrap();
        drop(stream);
        ssh.join().unwrap();
        assert!(datapath.counters(0).unwrap().passed(Reason::Answer) > 2);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_connection_that_loses_its_rule_is_cut_at_both_ends() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _listeners = listeners(&datapath);
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24", "203.0.113.0/24"]).await;
        let listener = listen(&world.internet.0, "198.51.100.1:5000");
        let mut idle = a.connect("198.51.100.1:5000").unwrap();
        let (mut server, _) = listener.accept().unwrap();
        let kept_server = echo(listen(&world.internet.0, "203.0.113.1:5001"));
        let mut kept = a.connect("203.0.113.1:5001").unwrap();
        round_trip(&mut kept).unwrap();
        idle.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();

        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &["203.0.113.0/24"])).unwrap();
        // Neither end sends anything: both hear of it all the same.
        idle.set_read_timeout(Some(PATIENCE)).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(idle.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        assert_eq!(server.read(&mut [0; 8]).unwrap_err().kind(), ErrorKind::ConnectionReset);
        round_trip(&mut kept).expect("the other connection goes on");
        drop(kept);
        kept_server.join().unwrap();
        // Deleting the last rule closes everything.
        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &[])).unwrap();
        // What is cut now sends its resets first.
        eventually("no flow is left", || datapath.flows(0).unwrap() == 0);
        let arrived = world.quiet();
        let socket = a.udp();
        socket.connect("203.0.113.1:9").unwrap();
        socket.send(b"x").unwrap();
        assert!(socket.recv(&mut [0; 8]).is_err());
        assert_eq!(world.arrived(), arrived);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn answers_above_the_mtu_arrive_in_fragments() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let rules = ["198.51.100.0/24", "2001:db8:1::/48"];
        let a = guest_v6(&datapath, 0, Mode::Enforce, &rules).await;
        for (at, own) in [("198.51.100.1:7", "0.0.0.0:0"), ("[2001:db8:1::1]:7", "[::]:0")] {
            let server = world.internet.0.run(|| UdpSocket::bind(at).unwrap()).unwrap();
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            let client = a.udp_at(own);
            client.connect(at).unwrap();
            client.send(b"much, please").unwrap();
            let (_, from) = server.recv_from(&mut [0; 16]).unwrap();
            let sent: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
            server.send_to(&sent, from).unwrap();
            let mut got = vec![0; 30_000];
            let n = client.recv(&mut got).expect("the answer, put together");
            assert!(got[..n] == sent[..], "{at}: {n} octets");
            // What was not asked for stays out, in pieces as much as whole.
            let other = world.internet.0.run(|| {
                UdpSocket::bind(if at.starts_with('[') { "[2001:db8:1::1]:8" } else { "198.51.100.1:8" })
                    .unwrap()
            });
            other.unwrap().send_to(&sent, from).unwrap();
            client.set_read_timeout(Some(SILENCE)).unwrap();
            assert!(client.recv(&mut got).is_err());
        }
        datapath.teardown().await.unwrap();
    });
}
