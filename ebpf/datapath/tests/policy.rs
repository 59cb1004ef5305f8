//! Changes of policy under traffic: what the old one and the new one agree on holds at every moment in between.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use std::{net::UdpSocket, time::Duration};
use tapgate_ebpf_common::Reason;
use tapgate_model::Mode;

const CHANGES: u8 = 60;
/// New flows in each state of the policy.
const EACH: u8 = 8;

#[test]
fn no_frame_is_judged_by_half_a_change() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.1/32"]).await;
        let hear = |at: &str| {
            let socket = world.internet.0.run(|| UdpSocket::bind(at).unwrap()).unwrap();
            socket.set_read_timeout(Some(PATIENCE)).unwrap();
            socket
        };
        let (always, never) = (hear("198.51.100.1:9"), hear("203.0.113.1:9"));
        let sent = u64::from(CHANGES) * u64::from(EACH);
        // Read at once: a socket holds some hundreds.
        let reading =
            std::thread::spawn(move || (0..sent).take_while(|_| always.recv(&mut [0; 8]).is_ok()).count());
        // Two sets of rules that have one address in common, each too different from the other to be made of it in place.
        let ranges = |second: u8| -> Vec<String> {
            let other = (0..200).map(|n| format!("10.{second}.{n}.0/24"));
            other.chain(["198.51.100.1/32".into()]).collect()
        };
        let sets = [ranges(7), ranges(8)];
        let (vm, net) = (a.vm.clone(), a.net);
        // The sender goes on while the changes are made.
        let sending = std::thread::spawn({
            let ns = a.ns.0.clone();
            move || {
                for _ in 0..CHANGES {
                    for _ in 0..EACH {
                        let socket = ns.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
                        socket.send_to(b"x", "198.51.100.1:9").unwrap();
                        let _ = socket.send_to(b"x", "203.0.113.1:9");
                    }
                    std::thread::sleep(Duration::from_millis(4));
                }
            }
        });
        let mut changes = 0;
        while !sending.is_finished() {
            let rules: Vec<&str> = sets[changes % 2].iter().map(String::as_str).collect();
            datapath.set_policy(net, &policy(&vm, Mode::Enforce, &rules)).unwrap();
            changes += 1;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        sending.join().unwrap();
        assert!(changes > 20, "{changes}");
        assert_eq!(reading.join().unwrap() as u64, sent, "all that both allow arrived");
        never.set_nonblocking(true).unwrap();
        assert!(never.recv_from(&mut [0; 8]).is_err(), "what neither allows has passed");
        assert_eq!(datapath.counters(0).unwrap().dropped(Reason::NoRule), sent);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn what_a_crash_left_in_the_table_of_taps_is_put_right() {
    use aya::maps::{Array, Map, MapData};
    use tapgate_ebpf_common::maps::{Tap, VERSION};
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        drop(datapath);
        let map = MapData::from_pin(world.pins().join(format!("maps-{VERSION}/TAPS"))).unwrap();
        let mut taps: Array<_, Tap> = Array::try_from(Map::from_map_data(map).unwrap()).unwrap();
        let own = taps.iter().map(Result::unwrap).find(|tap| tap.link != 0).unwrap();
        // An entry of a VM that is gone; one with another generation than the VM's.
        let gone = Tap { link: own.link + 7, ..own };
        taps.set(Tap::place(gone.link), gone, 0).unwrap();
        taps.set(Tap::place(own.link), Tap { policy: own.policy + 9, ..own }, 0).unwrap();
        let datapath = world.open().await;
        assert_eq!(taps.get(&Tap::place(gone.link), 0).unwrap().link, 0);
        assert_eq!(taps.get(&Tap::place(own.link), 0).unwrap(), own);
        datapath.detach(a.net).await.unwrap();
        assert_eq!(taps.get(&Tap::place(own.link), 0).unwrap().link, 0);
        datapath.teardown().await.unwrap();
    });
}

/// A spare is a tap like any other once it is a VM's, and one that lost a program is no gate.
#[test]
fn a_tap_made_ahead_is_a_gate_only_with_its_programs() {
    use tapgate_datapath::Attachment;
    in_world(|world| async move {
        let datapath = world.open().await;
        if datapath.attachment() == Attachment::Clsact {
            return datapath.teardown().await.unwrap();
        }
        let links = world.pins().join("links");
        let spares = || {
            let names = std::fs::read_dir(&links).unwrap().map(|entry| entry.unwrap().path());
            names
                .filter(|path| path.file_name().unwrap().to_str().unwrap().starts_with("tgs"))
                .collect::<Vec<_>>()
        };
        let vm = tapgate_model::VmId::generate();
        for (slot, lose) in [(0, None), (1, Some("from_guest")), (2, Some("to_guest"))] {
            eventually("a spare is made", || spares().len() == 2);
            // The task has it in hand a moment after its pins are there.
            tokio::time::sleep(Duration::from_millis(200)).await;
            if let Some(lost) = lose {
                let lost = spares().into_iter().find(|path| path.to_str().unwrap().ends_with(lost)).unwrap();
                std::fs::remove_file(lost).unwrap();
            }
            let gate = datapath.attach_tap(&vm, net(slot), &policy(&vm, Mode::Enforce, &[])).await.unwrap();
            for name in ["from_guest", "to_guest"] {
                assert!(links.join(format!("{slot}-{name}")).exists(), "{name} of {slot}");
            }
            let other = tapgate_model::VmId::generate();
            datapath.adopt(&other, net(slot), &policy(&other, Mode::Enforce, &[])).await.unwrap_err();
            drop(gate);
        }
        datapath.teardown().await.unwrap();
    });
}
