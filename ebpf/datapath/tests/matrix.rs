//! The loaded programs against the native judge: every crafted frame through `BPF_PROG_TEST_RUN`, with equal verdicts.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
#[path = "../../common/tests/frames/mod.rs"]
mod frames;

use aya::{
    TestRun as _, TestRunOptions,
    maps::{Array, HashMap, Map, MapData, lpm_trie::LpmTrie},
    programs::SchedClassifier,
};
use common::*;
use frames::{SETUPS, Setup, cases, verdict};
use std::path::Path;
use tapgate_datapath::{Counters, Datapath, DatapathConfig, Gate};
use tapgate_ebpf_common::{
    Reason, Verdict,
    maps::{FlowKey, Listener, RuleKey, Tap, Vm},
    net::{GATEWAY_MAC, MARK_PROXY, MARK_REJECT, MARK_UPLINK},
    packet::{Header, TCP},
};
use tapgate_model::{Mode, VmId};

/// A test run's frames come from the loopback device.
const LOOPBACK: u32 = 1;
const PASS: u32 = 0;
const DROP: u32 = 2;
/// `struct __sk_buff` and where its mark is.
const CONTEXT: usize = 192;
const MARK: usize = 8;

/// A tap that nobody sends on: its counters are the test's alone.
async fn quiet_tap(datapath: &Datapath) -> Gate {
    let vm = VmId::generate();
    datapath.attach_tap(&vm, net(0), &policy(&vm, Mode::Enforce, &[])).await.unwrap()
}

/// With such a tap, of a daemon's life before: nobody adopts it, so no sweep cuts the flows that a test makes in its slot.
async fn unswept(config: DatapathConfig) -> (Datapath, Gate) {
    let before = Datapath::open(config.clone()).await.unwrap();
    let tap = quiet_tap(&before).await;
    drop(before);
    (Datapath::open(config).await.unwrap(), tap)
}

struct Programs {
    from_guest: SchedClassifier,
    to_guest: SchedClassifier,
    vms: HashMap<MapData, u32, Vm>,
    taps: Array<MapData, Tap>,
    flows: HashMap<MapData, FlowKey, tapgate_ebpf_common::maps::Flow>,
}

fn map(pins: &Path, name: &str) -> Map {
    let folder = format!("maps-{}", tapgate_ebpf_common::maps::VERSION);
    Map::from_map_data(MapData::from_pin(pins.join(folder).join(name)).unwrap()).unwrap()
}

impl Programs {
    fn find(world: &World) -> Self {
        let attached =
            |name| SchedClassifier::from_program_info(world.program(name), "program".into()).unwrap();
        Self {
            from_guest: attached("from_guest"),
            to_guest: attached("to_guest"),
            vms: HashMap::try_from(map(&world.pins(), "VMS")).unwrap(),
            taps: Array::try_from(map(&world.pins(), "TAPS")).unwrap(),
            flows: HashMap::try_from(map(&world.pins(), "FLOWS")).unwrap(),
        }
    }

    /// Makes the loopback device the VM's tap; answers the policy's number.
    fn set_up(&mut self, setup: Setup, policy: u32) {
        let vm = setup.vm(policy);
        self.vms.insert(LOOPBACK, vm, 0).unwrap();
        self.taps.set(Tap::place(LOOPBACK), Tap::new(LOOPBACK, &vm), 0).unwrap();
    }

    /// Return value and mark. The kernel takes no test frame without a whole network header: for such a short one there
    /// is no answer.
    fn try_run(program: &SchedClassifier, frame: &[u8], came_by: u32) -> Option<(u32, u32)> {
        let mut given = [0; CONTEXT];
        // A mark from before must not count for anything.
        given[MARK..MARK + 4].copy_from_slice(&MARK_UPLINK.to_ne_bytes());
        given[36..40].copy_from_slice(&came_by.to_ne_bytes());
        let mut left = [0; CONTEXT];
        let mut out = vec![0; frame.len() + 64];
        let result = program.test_run(TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&given),
            ctx_out: Some(&mut left),
            ..TestRunOptions::default()
        });
        match result {
            Ok(result) => {
                Some((result.return_value, u32::from_ne_bytes(left[MARK..MARK + 4].try_into().unwrap())))
            }
            Err(_) if frame.len() < 14 + 40 => None,
            Err(error) => panic!("{error}: {frame:x?}"),
        }
    }

    fn run(program: &SchedClassifier, frame: &[u8], came_by: u32) -> (u32, u32) {
        Self::try_run(program, frame, came_by).unwrap()
    }
}

/// What a run must leave behind: return value, mark if it passes, the counted reason and whether it counts as passed.
fn expected(verdict: Verdict, header: &Header) -> (u32, u32, Reason, bool) {
    match verdict {
        Verdict::Drop(reason) => (DROP, 0, reason, false),
        Verdict::Refuse(reason) => (PASS, MARK_REJECT, reason, false),
        Verdict::Gateway(reason) => (PASS, MARK_PROXY, reason, true),
        // There is no connection for it.
        Verdict::Answer => (PASS, MARK_REJECT, Reason::HostAddress, false),
        // A report of a failure, and there is no flow that it could be about.
        Verdict::Uplink(_) if header.is_icmp() && !header.pings() => (DROP, 0, Reason::Protocol, false),
        Verdict::Uplink(reason) | Verdict::Tolerate(reason) => (PASS, MARK_UPLINK, reason, true),
        Verdict::Proxy(Listener::Tcp | Listener::DnsTcp | Listener::Service, reason)
            if header.protocol == TCP && !header.opens() =>
        {
            (PASS, MARK_PROXY, reason, true)
        }
        // A test run has no listeners.
        Verdict::Proxy(..) => (DROP, 0, Reason::Fault, false),
    }
}

fn difference(before: &Counters, after: &Counters) -> Vec<(Reason, u64, u64)> {
    Reason::ALL
        .iter()
        .map(|&reason| {
            (
                reason,
                after.passed(reason) - before.passed(reason),
                after.dropped(reason) - before.dropped(reason),
            )
        })
        // The gateway's own stack says what it likes to a new tap.
        .filter(|(reason, passed, dropped)| *reason != Reason::Answer && passed + dropped > 0)
        .collect()
}

#[test]
fn the_programs_judge_every_crafted_frame_as_the_table_does() {
    in_world(|world| async move {
        let mut config = world.config.clone();
        config.guest_v6 = Some(format!("{}/{}", frames::GUESTS_V6.0, frames::GUESTS_V6.1).parse().unwrap());
        let (datapath, _tap) = unswept(config).await;
        datapath.set_host_addresses(&frames::HOST.map(ip)).unwrap();
        let mut programs = Programs::find(&world);
        let mut rules: LpmTrie<_, RuleKey, u8> = LpmTrie::try_from(map(&world.pins(), "RULES")).unwrap();

        let cases = cases();
        let mut count = 0;
        let mut short = std::collections::BTreeSet::new();
        for (number, setup) in SETUPS.into_iter().enumerate() {
            let number = 1000 + number as u32;
            for rule in setup.rules() {
                let (network, length) = rule.split_once('/').unwrap();
                let v6 = network.contains(':');
                let prefix = RuleKey::prefix(v6, length.parse().unwrap());
                let key = RuleKey::new(number, v6, frames::octets(network));
                rules.insert(&aya::maps::lpm_trie::Key::new(prefix, key), 1, 0).unwrap();
            }
            programs.set_up(setup, number);
            for case in &cases {
                // Each frame on its own: no flow of a frame before.
                let flows: Vec<FlowKey> = programs.flows.keys().filter_map(Result::ok).collect();
                for flow in flows {
                    programs.flows.remove(&flow).unwrap();
                }
                let (native, header) = verdict(&case.frame, setup);
                let (returned, mark, reason, passes) = expected(native, &header);
                let before = datapath.counters(0).unwrap();
                let Some(got) = Programs::try_run(&programs.from_guest, &case.frame, 0) else {
                    short.insert(case.name.clone());
                    continue;
                };
                assert_eq!(got, (returned, mark), "{} under {setup:?}: {native:?}", case.name);
                let counted = difference(&before, &datapath.counters(0).unwrap());
                let (passed, dropped) = (u64::from(passes), u64::from(!passes));
                assert_eq!(counted, [(reason, passed, dropped)], "{} under {setup:?}", case.name);
                count += 1;
            }
        }
        println!("{count} frames judged by the programs as by the table");
        println!("too short for the kernel's test run: {short:?}");
        assert!(count >= 300 && short.len() < 5);
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn arbitrary_frames_never_get_the_uplinks_mark_without_a_rule() {
    in_world(|world| async move {
        let (datapath, _tap) = unswept(world.config.clone()).await;
        let mut programs = Programs::find(&world);
        programs.set_up(Setup::Closed, 999);
        let cases = cases();
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state as usize
        };
        for _ in 0..30_000 {
            let mut frame = cases[next() % cases.len()].frame.clone();
            for _ in 0..next() % 5 {
                let at = next() % frame.len();
                frame[at] = next() as u8;
            }
            frame.truncate(14 + next() % 200);
            let native = verdict(&frame, Setup::Closed);
            let Some((returned, mark)) = Programs::try_run(&programs.from_guest, &frame, 0) else { continue };
            assert_ne!((returned, mark), (PASS, MARK_UPLINK), "{frame:x?}");
            let wanted = expected(native.0, &native.1);
            // What the native book calls the host's or a guest's may differ: those were not set here.
            let book = |reason| matches!(reason, Reason::HostAddress | Reason::OtherVm);
            if !book(wanted.2) && frame.get(12..14) != Some(&[0x86, 0xdd]) {
                assert_eq!((returned, mark), (wanted.0, wanted.1), "{:?} {frame:x?}", native.0);
            }
        }
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn only_answers_to_the_guests_own_flows_come_back() {
    use frames::*;
    in_world(|world| async move {
        let (datapath, _tap) = unswept(world.config.clone()).await;
        let mut programs = Programs::find(&world);
        let mut rules: LpmTrie<_, RuleKey, u8> = LpmTrie::try_from(map(&world.pins(), "RULES")).unwrap();
        for policy in [500, 501] {
            let key = RuleKey::new(policy, false, octets("198.51.100.0"));
            rules.insert(&aya::maps::lpm_trie::Key::new(RuleKey::prefix(false, 24), key), 1, 0).unwrap();
        }
        let inside = tapgate_netns::Rtnl::connect(datapath.egress()).unwrap();
        let uplink = inside.link("uplink0").await.unwrap();
        let other = inside.link("tg0").await.unwrap();
        let framed = |packet: &[u8]| ethernet(MAC, [2, 0x74, 0x67, 0, 0, 2], 0x0800, packet);
        let reversed = |mut body: Vec<u8>| {
            let (a, b) = ([body[0], body[1]], [body[2], body[3]]);
            body[..2].copy_from_slice(&b);
            body[2..4].copy_from_slice(&a);
            body
        };
        let answer = |from: &str, protocol, body: Vec<u8>| framed(&ip_from(from, OWN, protocol, &body));
        programs.set_up(Setup::Rules, 500);
        let to = "198.51.100.1";
        let echo_answer = |id: u8| answer(to, 1, with_id(icmp(0), id));

        // Before the guest asks, nothing.
        for frame in [
            answer(to, 17, reversed(udp(123, b"x"))),
            answer(to, 6, reversed(tcp(80, SYN | ACK))),
            echo_answer(0x34),
        ] {
            assert_eq!(Programs::run(&programs.to_guest, &frame, uplink).0, DROP);
        }
        let mark = |frame: &[u8]| Programs::run(&programs.from_guest, frame, 0).1;
        assert_eq!(mark(&ip(to, 17, &udp(123, b"x"))), MARK_UPLINK);
        assert_eq!(mark(&ip(to, 6, &tcp(80, SYN))), MARK_UPLINK);
        assert_eq!(mark(&ip(to, 1, &icmp(8))), MARK_UPLINK);
        let report =
            |inner: Vec<u8>| answer("203.0.113.200", 1, [vec![3, 4, 0, 0, 0, 0, 5, 0], inner].concat());
        let good = [
            answer(to, 17, reversed(udp(123, b"x"))),
            answer(to, 6, reversed(tcp(80, SYN | ACK))),
            echo_answer(0x34),
            // A router on the way reports about the flow.
            report(ip_from(OWN, to, 6, &tcp(80, ACK))),
        ];
        let bad = [
            answer("198.51.100.2", 17, reversed(udp(123, b"x"))),
            answer(to, 17, reversed(udp(124, b"x"))),
            answer(to, 6, reversed(tcp(81, SYN | ACK))),
            echo_answer(0x35),
            answer(to, 1, icmp(8)),
            answer(to, 1, icmp(5)),
            answer(to, 47, vec![0; 20]),
            report(ip_from(OWN, to, 6, &tcp(81, ACK))),
            report(ip_from("10.214.0.2", to, 6, &tcp(80, ACK))),
            framed(&ip_from(to, "10.214.0.2", 17, &reversed(udp(123, b"x")))),
            ethernet(MAC, [2, 0x74, 0x67, 0, 0, 2], 0x8100, &[0; 60]),
            ethernet(MAC, [2, 0x74, 0x67, 0, 0, 2], 0x0806, &arp(1, [2; 6], to, OWN)),
        ];
        // With its entry in the table of taps, without it, and where another tap has its place.
        let own = Tap::new(LOOPBACK, &Setup::Rules.vm(500));
        for entry in [Tap::default(), Tap { link: LOOPBACK + tapgate_ebpf_common::maps::TAPS, ..own }, own] {
            programs.taps.set(Tap::place(LOOPBACK), entry, 0).unwrap();
            for frame in &good {
                assert_eq!(Programs::run(&programs.to_guest, frame, uplink).0, PASS, "{frame:x?}");
                // From anywhere but the uplink it is another guest's.
                assert_eq!(Programs::run(&programs.to_guest, frame, other).0, DROP);
            }
            for frame in &bad {
                assert_eq!(Programs::run(&programs.to_guest, frame, uplink).0, DROP, "{frame:x?}");
            }
            assert_eq!(mark(&ip(to, 6, &tcp(80, ACK))), MARK_UPLINK, "{entry:?}");
        }
        // The same rules under another number: judged anew, and still allowed.
        programs.set_up(Setup::Rules, 501);
        for frame in &good {
            assert_eq!(Programs::run(&programs.to_guest, frame, uplink).0, PASS, "{frame:x?}");
        }
        // No rules: what comes in for a known flow stops at once.
        programs.set_up(Setup::Closed, 502);
        for frame in &good {
            assert_eq!(Programs::run(&programs.to_guest, frame, uplink).0, DROP, "{frame:x?}");
        }
        assert_eq!(Programs::run(&programs.from_guest, &ip(to, 6, &tcp(80, ACK)), 0), (PASS, MARK_REJECT));
        assert!(datapath.counters(0).unwrap().dropped(Reason::Revoked) > 0);
        datapath.teardown().await.unwrap();
    });
}

/// A place in the table of taps that another tap has says nothing of this one: whoever speaks as the other guest is dropped,
/// though the other has such a flow.
#[test]
fn an_entry_of_another_tap_lets_nobody_speak_for_it() {
    use frames::*;
    use tapgate_ebpf_common::maps::{Address, Flow, TAPS, halves};
    in_world(|world| async move {
        let (datapath, _tap) = unswept(world.config.clone()).await;
        let mut programs = Programs::find(&world);
        programs.set_up(Setup::Rules, 700);
        let (mac, to) = ([6, 0x74, 0, 0, 0, 9], "198.51.100.1");
        let v4 = u32::from_ne_bytes([10, 214, 0, 9]);
        let other = Vm { slot: 9, mac: halves(mac), v4, ..Setup::Rules.vm(700) };
        let (protocol, port, remote_port) = (17, 40000, 123);
        let remote = Address::new(octets(to));
        let key = FlowKey { slot: 9, protocol, v6: 0, port, remote_port, remote };
        programs.flows.insert(key, Flow { policy: 700, ..Flow::default() }, 0).unwrap();
        let frame =
            ethernet(GATEWAY_MAC, mac, 0x0800, &ip_from("10.214.0.9", to, protocol, &udp(remote_port, b"x")));
        // On the other's own tap it passes, so it is this check alone that holds.
        for (link, wanted) in [(LOOPBACK, (PASS, MARK_UPLINK)), (LOOPBACK + TAPS, (DROP, 0))] {
            programs.taps.set(Tap::place(LOOPBACK), Tap::new(link, &other), 0).unwrap();
            assert_eq!(Programs::run(&programs.from_guest, &frame, 0), wanted, "{link}");
        }
        datapath.teardown().await.unwrap();
    });
}

fn with_id(mut body: Vec<u8>, id: u8) -> Vec<u8> {
    body[5] = id;
    body
}

/// The kernel's own limit is a million.
const VERIFIED: u32 = 200_000;

/// `cargo xtask test-ebpf` shows what it prints.
#[test]
fn the_verifier_accepts_both_programs_with_room_to_spare() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let _tap = quiet_tap(&datapath).await;
        for name in ["from_guest", "to_guest"] {
            let info = world.program(name);
            let verified = info.verified_instruction_count().unwrap();
            println!(
                "{name}: {verified} instructions verified (limit 1,000,000), {} octets of machine code",
                info.size_jitted()
            );
            assert!(verified < VERIFIED, "{verified}");
        }
        datapath.teardown().await.unwrap();
    });
}
