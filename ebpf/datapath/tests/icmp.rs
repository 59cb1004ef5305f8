//! What a guest says by ICMP: pings, and reports about its own flows. Nothing else gets out, whatever it resembles.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use common::*;
use tapgate_ebpf_common::Reason;
use tapgate_model::{GuestNet, Mode, VmId};

const RULES: [&str; 2] = ["198.51.100.0/24", "2001:db8:1::/48"];

/// Runs the test with a guest of both families and its tap.
fn with_wire(test: impl FnOnce(&World, &tapgate_datapath::Datapath, &mut Wire) + Send) {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let vm = VmId::generate();
        let net = GuestNet::new(0, "10.214.0.0".parse().unwrap(), Some("fd74:6761:7465::".parse().unwrap()));
        let mut gate = datapath.attach_tap(&vm, net, &policy(&vm, Mode::Enforce, &RULES)).await.unwrap();
        let mut wire = Wire::new(gate.take_tap().unwrap());
        test(&world, &datapath, &mut wire);
        datapath.teardown().await.unwrap();
    });
}

/// An ICMP message with the identifier of a ping.
fn message(kind: u8, identifier: u16) -> Vec<u8> {
    let mut message = frames::icmp(kind);
    message[4..6].copy_from_slice(&identifier.to_be_bytes());
    message
}

/// A ping whose identifier is 0 makes a flow whose ports are 0, as those of every message without an identifier are.
#[test]
fn a_ping_opens_no_way_for_other_messages() {
    with_wire(|world, datapath, wire| {
        for (to, protocol, ping, others) in
            [(SERVER, 1, 8, [0, 5, 13, 15, 17].as_slice()), (SERVER_V6, 58, 128, &[129, 139, 200])]
        {
            let before = world.quiet();
            wire.send(&frames::ip(to, protocol, &message(ping, 0)));
            eventually("the ping arrives", || world.arrived() == before + 1);
            let dropped = datapath.counters(0).unwrap().dropped(Reason::Protocol);
            for kind in others {
                wire.send(&frames::ip(to, protocol, &message(*kind, 0)));
            }
            eventually("each is dropped", || {
                datapath.counters(0).unwrap().dropped(Reason::Protocol) == dropped + others.len() as u64
            });
            assert_eq!(world.quiet(), before + 1, "{to}");
        }
    });
}

/// The host's connection tracking believes a report by the packet in it, which could be of another VM's connection or the host's.
#[test]
fn a_guest_reports_about_its_own_flows_alone() {
    with_wire(|world, datapath, wire| {
        let cases = [
            (SERVER, frames::OWN, 1, [3, 4], [HOST_OUT, "10.214.0.2"]),
            (SERVER_V6, frames::OWN_V6, 58, [1, 4], [HOST_OUT_V6, "fd74:6761:7465::2"]),
        ];
        for (to, own, protocol, [kind, code], others) in cases {
            let before = world.quiet();
            wire.send(&frames::ip(to, 17, &frames::udp(7, b"x")));
            eventually("the datagram arrives", || world.arrived() == before + 1);
            // What came from there, as the report shows it.
            let came = |from: &str, to: &str, from_port: u16, to_port: u16| {
                let mut body = frames::udp(to_port, b"x");
                body[..2].copy_from_slice(&from_port.to_be_bytes());
                frames::ip_from(from, to, 17, &body)
            };
            let report = |inside: Vec<u8>| {
                frames::ip(to, protocol, &[vec![kind, code, 0, 0, 0, 0, 0, 0], inside].concat())
            };
            let forged = [
                report(came(to, others[0], 7, 40000)),
                report(came(to, others[1], 7, 40000)),
                report(came(to, own, 7, 40001)),
                report(came(to, own, 8, 40000)),
                report(came(others[0], own, 7, 40000)),
                report(came(own, to, 40000, 7)),
                report(vec![0; 12]),
            ];
            let dropped = datapath.counters(0).unwrap().dropped(Reason::Protocol);
            for frame in &forged {
                wire.send(frame);
            }
            eventually("each is dropped", || {
                datapath.counters(0).unwrap().dropped(Reason::Protocol) == dropped + forged.len() as u64
            });
            assert_eq!(world.quiet(), before + 1, "{to}");
            let passed = datapath.counters(0).unwrap().passed(Reason::Cidr);
            wire.send(&report(came(to, own, 7, 40000)));
            eventually("its own passes", || datapath.counters(0).unwrap().passed(Reason::Cidr) == passed + 1);
        }
    });
}
