//! What a guest's network driver leaves to the host: checksums and segmentation, over a real tap, on both paths out.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use common::*;
use std::{
    io::Read as _,
    net::{TcpListener, UdpSocket},
};
use tapgate_ebpf_common::{Reason, net::GATEWAY_MAC};
use tapgate_model::{GuestNet, Mode, VmId};

const NEEDS_CHECKSUM: u8 = 1;
const GSO_TCP_V4: u8 = 1;
const GSO_TCP_V6: u8 = 4;
const SEGMENT: u16 = 1400;
const PAYLOAD: usize = 40_000;

/// `struct virtio_net_hdr_v1`.
fn virtio(gso: u8, headers: u16, checksum_from: u16, checksum_at: u16) -> [u8; 12] {
    let mut header = [0; 12];
    header[0] = NEEDS_CHECKSUM;
    header[1] = gso;
    if gso != 0 {
        header[2..4].copy_from_slice(&headers.to_le_bytes());
        header[4..6].copy_from_slice(&SEGMENT.to_le_bytes());
    }
    header[6..8].copy_from_slice(&checksum_from.to_le_bytes());
    header[8..10].copy_from_slice(&checksum_at.to_le_bytes());
    header
}

/// The sum over the pseudo header that a driver leaves in place of the checksum.
fn partial(packet: &mut [u8], header: usize, at: usize, protocol: u8) {
    let length = ((packet.len() - header) as u32).to_be_bytes();
    let addresses = if header == 20 { 12..20 } else { 8..40 };
    let [a, b] = frames::checksum(&[&packet[addresses], &length, &[0, 0, 0, protocol]]);
    packet[header + at..header + at + 2].copy_from_slice(&[!a, !b]);
}

/// Without "don't fragment".
fn may_be_taken_apart(packet: &mut [u8]) {
    packet[6] = 0;
    packet[10..12].fill(0);
    let sum = frames::checksum(&[&packet[..20]]);
    packet[10..12].copy_from_slice(&sum);
}

fn send_large(wire: &mut Wire, to: &str, port: u16, listener: &TcpListener) {
    let v6 = to.contains(':');
    let (own, header) = if v6 { (frames::OWN_V6, 40) } else { (frames::OWN, 20) };
    let kind = if v6 { 0x86dd } else { 0x0800 };
    wire.send(&frames::ip(to, 6, &frames::tcp(port, frames::SYN)));
    let tcp = 14 + header;
    let protocol = if v6 { 20 } else { 23 };
    let is_tcp = |frame: &[u8]| {
        frame.len() >= tcp + 20 && frame[12..14] == [(kind >> 8) as u8, kind as u8] && frame[protocol] == 6
    };
    let answer = wire.wait(PATIENCE, is_tcp).expect("SYN and ACK");
    assert_eq!(answer[tcp + 13], 0x12, "{to}");
    let theirs = u32::from_be_bytes(answer[tcp + 4..tcp + 8].try_into().unwrap());
    let mut body = frames::tcp(port, frames::ACK | 8);
    body[4..8].copy_from_slice(&10u32.to_be_bytes());
    body[8..12].copy_from_slice(&theirs.wrapping_add(1).to_be_bytes());
    let mut plain = body.clone();
    plain[13] = frames::ACK;
    wire.send(&frames::ip(to, 6, &plain));
    let data: Vec<u8> = (0..PAYLOAD).map(|n| n as u8).collect();
    body.extend(&data);
    let mut packet = frames::ip_from(own, to, 6, &body);
    partial(&mut packet, header, 16, 6);
    let gso = if v6 { GSO_TCP_V6 } else { GSO_TCP_V4 };
    let offloads = virtio(gso, tcp as u16 + 20, tcp as u16, 16);
    wire.send_with(&offloads, &frames::ethernet(GATEWAY_MAC, frames::MAC, kind, &packet));
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // As much as the first window takes: the guest here does not answer acknowledgements.
    let mut got = vec![0; PAYLOAD / 2];
    stream.read_exact(&mut got).unwrap();
    assert!(got == data[..got.len()], "{to}");
}

#[test]
fn checksums_and_segments_are_made_on_both_paths_in_both_families() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let listeners = listeners_of(&datapath, socket2::Domain::IPV6);
        let vm = VmId::generate();
        let net = GuestNet::new(0, "10.214.0.0".parse().unwrap(), Some("fd74:6761:7465::".parse().unwrap()));
        let rules = policy(&vm, Mode::Enforce, &["198.51.100.0/24", "2001:db8:1::/48"]);
        let mut gate = datapath.attach_tap(&vm, net, &rules).await.unwrap();
        let mut wire = Wire::new(gate.take_tap().unwrap());

        let server = world.internet.0.run(|| UdpSocket::bind("198.51.100.1:7").unwrap()).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut packet = frames::ip_from(frames::OWN, "198.51.100.1", 17, &frames::udp(7, b"partial"));
        partial(&mut packet, 20, 6, 17);
        wire.send_with(&virtio(0, 0, 34, 6), &frames::ethernet(GATEWAY_MAC, frames::MAC, 0x0800, &packet));
        let mut got = [0; 16];
        let (n, from) = server.recv_from(&mut got).unwrap();
        assert_eq!((&got[..n], from.ip()), (&b"partial"[..], ip(HOST_OUT)));

        for to in ["198.51.100.1", "2001:db8:1::1"] {
            let at = if to.contains(':') { format!("[{to}]:5000") } else { format!("{to}:5000") };
            let listener = listen(&world.internet.0, &at);
            send_large(&mut wire, to, 5000, &listener);
        }
        for to in ["203.0.113.1", "2001:db8:2::1"] {
            send_large(&mut wire, to, 443, &listeners.tcp);
        }
        let counters = datapath.counters(0).unwrap();
        assert_eq!(counters.reasons().filter(|(_, _, dropped)| *dropped > 0).count(), 0, "{counters:?}");
        assert!(counters.passed(Reason::Cidr) > 0);
        datapath.teardown().await.unwrap();
    });
}

/// The kernel writes a checksum wherever the guest said, after the frame was judged: it could be into the destination.
#[test]
fn no_checksum_is_written_anywhere_but_in_the_header_that_was_judged() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let vm = VmId::generate();
        let net = GuestNet::new(0, "10.214.0.0".parse().unwrap(), Some("fd74:6761:7465::".parse().unwrap()));
        let rules = policy(&vm, Mode::Enforce, &["198.51.100.0/24", "2001:db8:1::/48"]);
        let mut gate = datapath.attach_tap(&vm, net, &rules).await.unwrap();
        let mut wire = Wire::new(gate.take_tap().unwrap());
        for (to, own, header) in [(SERVER, frames::OWN, 20u16), (SERVER_V6, frames::OWN_V6, 40)] {
            let transport = 14 + header;
            let mut bodies = vec![(17, frames::udp(7, &[0; 64]), 6), (6, frames::tcp(7, frames::SYN), 16)];
            if header == 20 {
                // Taken apart on the way: each part's header gets a new checksum, whatever its destination is by then.
                bodies.push((17, frames::udp(7, &[0; 3000]), 6));
            }
            // On the way of a frame that is judged, and on that of a flow that is known.
            for known in [false, true] {
                for (protocol, body, field) in bodies.clone() {
                    let mut packet = frames::ip_from(own, to, protocol, &body);
                    if packet.len() > 1500 {
                        may_be_taken_apart(&mut packet);
                    }
                    let kind = if header == 40 { 0x86dd } else { 0x0800 };
                    let frame = frames::ethernet(GATEWAY_MAC, frames::MAC, kind, &packet);
                    if known {
                        let before = world.quiet();
                        // The parts of a datagram have no checksum left open, so the whole one's must be right.
                        match frame.len() > 1514 {
                            true => wire.send(&frame),
                            false => wire.send_with(&virtio(0, 0, transport, field), &frame),
                        }
                        eventually("what is right arrives", || world.arrived() > before);
                    }
                    let before = (world.quiet(), datapath.counters(0).unwrap().dropped(Reason::Malformed));
                    let places = (20..transport + 16).flat_map(|start| (0..40).map(move |at| (start, at)));
                    let wrong = places.filter(|place| *place != (transport, field));
                    let mut taken = 0;
                    for (start, at) in wrong {
                        // Some the kernel itself refuses.
                        taken += u64::from(wire.try_send_with(&virtio(0, 0, start, at), &frame).is_ok());
                    }
                    assert!(taken > 100, "{taken}");
                    eventually("all are dropped", || {
                        datapath.counters(0).unwrap().dropped(Reason::Malformed) == before.1 + taken
                    });
                    assert_eq!(world.quiet(), before.0, "{to} {protocol}");
                }
            }
        }
        datapath.teardown().await.unwrap();
    });
}
