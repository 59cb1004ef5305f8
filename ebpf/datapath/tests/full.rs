//! Tables that are full to the last entry, filled by whoever else is on the host: what does not fit is refused, nothing is let
//! through for want of room, and with room it goes on. What fills millions of entries runs only with `TAPGATE_LONG` set; a VM's
//! own share of them is filled by `faults.rs` in every run.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use aya::maps::{HashMap, lpm_trie::LpmTrie};
use common::*;
use std::{net::UdpSocket, time::Duration};
use tapgate_datapath::DatapathError;
use tapgate_ebpf_common::{
    Reason,
    maps::{Address, Flow, FlowKey, MAX_FLOWS, MAX_RULES, MAX_VMS, RuleKey},
};
use tapgate_model::Mode;

#[test]
fn a_full_table_of_flows_refuses_new_flows_and_opens_nothing() {
    if std::env::var_os("TAPGATE_LONG").is_none() {
        return;
    }
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Warn, &["198.51.100.0/24"]).await;
        let hear = |at: &str| {
            let socket = world.internet.0.run(|| UdpSocket::bind(at).unwrap()).unwrap();
            socket.set_read_timeout(Some(SILENCE)).unwrap();
            socket
        };
        let (allowed, tolerated) = (hear("198.51.100.1:9"), hear("203.0.113.1:9"));
        let socket = a.udp();
        socket.send_to(b"known", "198.51.100.1:9").unwrap();
        assert_eq!(allowed.recv_from(&mut [0; 8]).unwrap().0, 5);
        // Flows of a VM that no daemon of this life knows: the kernel's to keep.
        let mut flows: HashMap<_, FlowKey, Flow> = HashMap::try_from(map(&world, "FLOWS")).unwrap();
        let foreign = |number: u32| FlowKey {
            slot: MAX_VMS as u16 - 1,
            protocol: 17,
            remote: Address([0, 0, 0, number]),
            ..FlowKey::default()
        };
        let filled = fill(MAX_FLOWS, |number| flows.insert(foreign(number), Flow::default(), 0));
        assert!(filled >= MAX_FLOWS - 64, "{filled}");
        let before = datapath.counters(0).unwrap();
        let other = a.udp();
        for to in ["198.51.100.1:9", "203.0.113.1:9"] {
            let _ = other.send_to(b"new", to);
        }
        eventually("both are refused", || {
            datapath.counters(0).unwrap().dropped(Reason::Fault) == before.dropped(Reason::Fault) + 2
        });
        assert!(tolerated.recv_from(&mut [0; 8]).is_err() && allowed.recv_from(&mut [0; 8]).is_err());
        socket.send_to(b"known", "198.51.100.1:9").unwrap();
        assert_eq!(allowed.recv_from(&mut [0; 8]).unwrap().0, 5, "a known flow goes on");
        for number in 0..256 {
            flows.remove(&foreign(number)).unwrap();
        }
        let third = a.udp();
        eventually("with room there are new flows again", || {
            let _ = third.send_to(b"room", "198.51.100.1:9");
            allowed.recv_from(&mut [0; 8]).is_ok_and(|(octets, _)| octets == 4)
        });
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_full_table_of_rules_refuses_the_change_by_name_and_still_closes() {
    if std::env::var_os("TAPGATE_LONG").is_none() {
        return;
    }
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let mut rules: LpmTrie<_, RuleKey, u8> = LpmTrie::try_from(map(&world, "RULES")).unwrap();
        let foreign = |number: u32| {
            let [a, b, c, d] = number.to_be_bytes();
            let key = RuleKey::new(1 << 30, false, tapgate_ebpf_common::maps::mapped([a, b, c, d]));
            aya::maps::lpm_trie::Key::new(RuleKey::prefix(false, 32), key)
        };
        let filled = fill(MAX_RULES, |number| rules.insert(&foreign(number), 1, 0));
        assert!(filled >= MAX_RULES - 64, "{filled}");
        let other = policy(&a.vm, Mode::Enforce, &["203.0.113.0/24", "192.0.2.128/25"]);
        let refused = datapath.set_policy(a.net, &other).unwrap_err();
        assert!(matches!(refused, DatapathError::TooManyRules { .. }), "{refused}");
        // What the engine does then: the VM is closed, for which there is always room.
        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &[])).unwrap();
        let arrived = world.quiet();
        for to in ["198.51.100.1:9", "203.0.113.1:9"] {
            let _ = a.udp().send_to(b"x", to);
        }
        std::thread::sleep(Duration::from_millis(300));
        assert_eq!(world.arrived(), arrived);
        for number in 0..64 {
            rules.remove(&foreign(number)).unwrap();
        }
        datapath.set_policy(a.net, &other).unwrap();
        datapath.teardown().await.unwrap();
    });
}
