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
        assert_eq!(std::fs::read_dir(world.pins().join("links")).unwrap().count(), 0);
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
