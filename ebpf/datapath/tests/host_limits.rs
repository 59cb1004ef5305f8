//! What one guest may take of the host's: entries in its table of connections, refusals by ICMP.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use common::*;
use tapgate_ebpf_common::{maps::MAX_FLOWS_PER_VM, net::GATEWAY_MAC};
use tapgate_model::{Mode, VmId};

async fn wire(datapath: &tapgate_datapath::Datapath, slot: u32) -> (tapgate_datapath::Gate, Wire) {
    let vm = VmId::generate();
    let rules = policy(&vm, Mode::Enforce, &["198.51.100.0/24"]);
    let mut gate = datapath.attach_tap(&vm, net(slot), &rules).await.unwrap();
    let wire = Wire::new(gate.take_tap().unwrap());
    (gate, wire)
}

/// The host remembers connections for longer than the programs do, and than the VM lives.
#[test]
fn the_hosts_table_of_connections_has_room_for_others() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let most = 2 * MAX_FLOWS_PER_VM;
        for life in 0..3u16 {
            let (gate, mut wire) = wire(&datapath, 0).await;
            for n in 0..MAX_FLOWS_PER_VM as u16 {
                let mut datagram = frames::udp(1000 + life, b"x");
                datagram[..2].copy_from_slice(&(1024 + n).to_be_bytes());
                wire.send(&frames::ip("198.51.100.2", 17, &datagram));
            }
            drop(wire);
            drop(gate);
            datapath.detach(net(0)).await.unwrap();
        }
        let count = || std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").unwrap();
        let count: u32 = world.host.0.run(count).unwrap().trim().parse().unwrap();
        assert!(
            count > MAX_FLOWS_PER_VM && count <= most + 100,
            "{count} connections are tracked for one guest"
        );
        datapath.teardown().await.unwrap();
    });
}

/// The kernel limits the ICMP errors of all together.
#[test]
fn a_guest_that_floods_uses_up_its_own_refusals() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let (_first, mut flooding) = wire(&datapath, 0).await;
        let (_second, mut other) = wire(&datapath, 1).await;
        for _ in 0..5000 {
            flooding.send(&frames::ip(OTHER, 17, &frames::udp(443, b"x")));
        }
        let packet = frames::ip_from(&net(1).v4.to_string(), OTHER, 17, &frames::udp(443, b"x"));
        other.send(&frames::ethernet(GATEWAY_MAC, net(1).mac, 0x0800, &packet));
        let refusal = |frame: &[u8]| frame.len() > 36 && frame[12..14] == [8, 0] && frame[34..36] == [3, 3];
        assert!(other.wait(PATIENCE, refusal).is_some(), "the other guest is refused without a word");
        let mut refused = 0;
        while flooding.wait(SILENCE, refusal).is_some() {
            refused += 1;
        }
        assert!((1..=1000).contains(&refused), "{refused}");
        datapath.teardown().await.unwrap();
    });
}
