//! Prints what the programs cost for each class of frame: nanoseconds a packet, by the kernel's own clock. Needs root.
#![allow(clippy::unwrap_used, reason = "a measurement that fails may panic")]

#[path = "../tests/common/mod.rs"]
mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use aya::{
    TestRun as _, TestRunOptions,
    maps::{
        HashMap, Map, MapData,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{SchedClassifier, TcAttachType},
};
use common::{guest, in_world_v6, ip};
use frames::{ACK, OWN, SYN, Setup, icmp, ip_from, octets, tcp, udp};
use tapgate_ebpf_common::maps::{RuleKey, VERSION, Vm};
use tapgate_model::Mode;

const RUNS: u32 = 200_000;
const ROUNDS: usize = 5;

fn main() {
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        datapath.set_host_addresses(&frames::HOST.map(ip)).unwrap();
        let _guest = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let folder = world.pins().join(format!("maps-{VERSION}"));
        let map = |name: &str| Map::from_map_data(MapData::from_pin(folder.join(name)).unwrap()).unwrap();
        let mut vms: HashMap<_, u32, Vm> = HashMap::try_from(map("VMS")).unwrap();
        let mut rules: LpmTrie<_, RuleKey, u8> = LpmTrie::try_from(map("RULES")).unwrap();
        vms.insert(1, Setup::Rules.vm(77), 0).unwrap();
        for rule in Setup::Rules.rules() {
            let (network, length) = rule.split_once('/').unwrap();
            let v6 = network.contains(':');
            let key =
                Key::new(RuleKey::prefix(v6, length.parse().unwrap()), RuleKey::new(77, v6, octets(network)));
            rules.insert(&key, 1, 0).unwrap();
        }
        let program = |kind| {
            let info = datapath
                .egress()
                .run(|| SchedClassifier::query_tcx("tg0", kind).unwrap().1.remove(0))
                .unwrap();
            println!(
                "{}: {} instructions verified, {} octets of machine code",
                info.name_as_str().unwrap_or("?"),
                info.verified_instruction_count().unwrap_or(0),
                info.size_jitted()
            );
            SchedClassifier::from_program_info(info, "program".into()).unwrap()
        };
        let (from_guest, to_guest) = (program(TcAttachType::Ingress), program(TcAttachType::Egress));
        let uplink = tapgate_netns::Rtnl::connect(datapath.egress()).unwrap().link("uplink0").await.unwrap();
        let answer = {
            let mut body = udp(123, b"x");
            body.swap(0, 2);
            body.swap(1, 3);
            frames::ethernet(frames::MAC, [2; 6], 0x0800, &ip_from("198.51.100.1", OWN, 17, &body))
        };
        let open = |frame: &[u8]| cost(&from_guest, frame, 0, 1);
        open(&frames::ip("198.51.100.1", 6, &tcp(5000, SYN)));
        open(&frames::ip("198.51.100.1", 17, &udp(123, b"x")));
        open(&frames::ip("2001:db8:1::1", 6, &tcp(5000, SYN)));
        for (name, program, frame, came_by) in [
            ("known flow, TCP, IPv4", &from_guest, frames::ip("198.51.100.1", 6, &tcp(5000, ACK)), 0),
            ("known flow, TCP, IPv6", &from_guest, frames::ip("2001:db8:1::1", 6, &tcp(5000, ACK)), 0),
            ("known flow, UDP, IPv4", &from_guest, frames::ip("198.51.100.1", 17, &udp(123, b"x")), 0),
            ("known flow, answer", &to_guest, answer.clone(), uplink),
            ("gateway's own to the guest", &to_guest, answer, 0),
            ("to the proxy, not a SYN", &from_guest, frames::ip("203.0.113.1", 6, &tcp(443, ACK)), 0),
            ("DNS, no listener", &from_guest, frames::ip("203.0.113.1", 17, &udp(53, b"x")), 0),
            ("refused UDP", &from_guest, frames::ip("203.0.113.1", 17, &udp(99, b"x")), 0),
            ("QUIC", &from_guest, frames::ip("203.0.113.1", 17, &udp(443, b"x")), 0),
            ("denied ping", &from_guest, frames::ip("10.0.0.1", 1, &icmp(8)), 0),
            ("spoofed", &from_guest, frames::ethernet([2; 6], [4; 6], 0x0800, &[0; 60]), 0),
        ] {
            let mut times: Vec<u128> = (0..ROUNDS).map(|_| cost(program, &frame, came_by, RUNS)).collect();
            times.sort_unstable();
            println!("{name:<30} {:>5} ns (least {})", times[ROUNDS / 2], times[0]);
        }
        datapath.teardown().await.unwrap();
    });
}

fn cost(program: &SchedClassifier, frame: &[u8], came_by: u32, repeat: u32) -> u128 {
    let mut context = [0u8; 192];
    context[36..40].copy_from_slice(&came_by.to_ne_bytes());
    let options =
        TestRunOptions { data_in: Some(frame), ctx_in: Some(&context), repeat, ..TestRunOptions::default() };
    program.test_run(options).unwrap().duration.as_nanos()
}
