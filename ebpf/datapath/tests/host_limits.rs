//! What one guest may take of the host's: entries in its table of connections, refusals by ICMP.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use common::*;
use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};
use tapgate_datapath::{Datapath, DatapathConfig};
use tapgate_ebpf_common::{
    Reason,
    maps::MAX_FLOWS_PER_VM,
    net::GATEWAY_MAC,
    packet::{RST, SYN},
};
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

/// What is new costs the host a search through what the guest had before.
#[test]
fn a_guest_that_opens_flows_faster_than_it_may_is_refused() {
    in_world(|world| async move {
        let config = DatapathConfig { flows_per_second: NonZeroU32::MIN, ..world.config.clone() };
        let datapath = Datapath::open(config).await.unwrap();
        let (_hasty, mut hasty) = wire(&datapath, 0).await;
        let (_other, mut other) = wire(&datapath, 1).await;
        let refused = |slot| datapath.counters(slot).unwrap().dropped(Reason::Limit);
        // A reset ends each: their number is no reason.
        let open = |n: u32| {
            [SYN, RST].map(|flags| frames::ip("198.51.100.2", 6, &frames::tcp((1024 + n) as u16, flags)))
        };
        let began = Instant::now();
        for frame in (0..2 * MAX_FLOWS_PER_VM).flat_map(open) {
            hasty.send(&frame);
        }
        // A reset of what was refused is as new.
        let (most, earned) = (2 * u64::from(MAX_FLOWS_PER_VM), 2 * (began.elapsed().as_secs() + 1));
        assert!((most - earned..=most).contains(&refused(0)), "{} of {most} were refused", refused(0));
        let packet = frames::ip_from(&net(1).v4.to_string(), "198.51.100.2", 17, &frames::udp(9, b"x"));
        other.send(&frames::ethernet(GATEWAY_MAC, net(1).mac, 0x0800, &packet));
        eventually("the other guest's flow is there", || datapath.flows(1).unwrap() == 1);
        assert_eq!(refused(1), 0);
        let until = Instant::now() + PATIENCE;
        while datapath.flows(0).unwrap() == 0 {
            assert!(Instant::now() < until, "time does not earn another");
            hasty.send(&open(0)[0]);
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
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
