//! What goes wrong while traffic runs: a daemon killed at any moment, full tables, thousands of rules.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use aya::maps::{Map, MapData, lpm_trie::LpmTrie};
use common::*;
use std::{
    net::{SocketAddr, TcpStream, UdpSocket},
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tapgate_datapath::{Datapath, DatapathConfig, DatapathError};
use tapgate_ebpf_common::{
    Reason,
    maps::{MAX_FLOWS_PER_VM, MAX_VMS, RuleKey, VERSION},
};
use tapgate_model::{Mode, VmId};
use tapgate_netns::Netns;

/// Set in the process that plays the daemon: instance, then the guests' namespaces.
const CHILD: &str = "TAPGATE_FAULT_CHILD";
/// Daemons are killed for five minutes where this is set, and for some seconds where not.
const LONG: &str = "TAPGATE_LONG";
const GUESTS: u32 = 3;
/// Daemons that are killed at least, however slow the machine.
const FEWEST: u64 = 8;

fn config(instance: &str) -> DatapathConfig {
    DatapathConfig {
        instance: instance.into(),
        pin_root: format!("/sys/fs/bpf/tapgate-test-{instance}").into(),
        guest_v4: "10.214.0.0/16".parse().unwrap(),
        guest_v6: None,
        guest_v6_routed: false,
        uplink: None,
        flows_per_second: 1000.try_into().unwrap(),
    }
}

/// A daemon's start: adopts what is there, makes what isn't, removes what nobody wants.
async fn start(instance: &str, guests: &[Netns]) -> (Datapath, Vec<VmId>) {
    let datapath = Datapath::open(config(instance)).await.unwrap();
    let mut vms = Vec::new();
    for (slot, guest) in (0..).zip(guests) {
        let vm = VmId::generate();
        let policy = policy(&vm, Mode::Enforce, &["198.51.100.0/24"]);
        if let Err(error) = datapath.adopt(&vm, net(slot), &policy).await {
            assert!(
                matches!(error, DatapathError::NotAdoptable { .. } | DatapathError::Program { .. }),
                "{error}"
            );
            datapath.attach_netns(&vm, net(slot), &policy, guest).await.unwrap();
        }
        vms.push(vm);
    }
    let keep: Vec<_> = (0..guests.len() as u32).map(net).collect();
    datapath.detach_others(&keep).await.unwrap();
    (datapath, vms)
}

/// The daemon's part; does nothing unless the test below started it.
#[test]
fn child() {
    let Ok(given) = std::env::var(CHILD) else { return };
    let mut words = given.split(' ');
    let instance = words.next().unwrap();
    let guests: Vec<Netns> = words.map(|name| Netns::open(name).unwrap()).collect();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let (datapath, vms) = start(instance, &guests).await;
        let until = Instant::now() + Duration::from_secs(60);
        for round in 0.. {
            for (slot, vm) in (0..).zip(&vms) {
                let rules: &[&str] =
                    if (round + slot) % 2 == 0 { &["198.51.100.0/24", "10.9.0.0/16"] } else { &[] };
                datapath.set_policy(net(slot), &policy(vm, Mode::Enforce, rules)).unwrap();
            }
            if round % 7 == 0 {
                datapath.detach(net(0)).await.unwrap();
                let rules = policy(&vms[0], Mode::Enforce, &[]);
                datapath.attach_netns(&vms[0], net(0), &rules, &guests[0]).await.unwrap();
            }
            assert!(Instant::now() < until, "nobody killed this daemon");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    });
}

#[test]
fn a_daemon_killed_at_any_moment_opens_nothing_and_is_followed_by_the_next() {
    if std::env::var(CHILD).is_ok() {
        return;
    }
    let seconds = if std::env::var_os(LONG).is_some() { 300 } else { 8 };
    in_world(|world| async move {
        let instance = world.config.instance.clone();
        let spaces: Vec<Temporary> = (0..GUESTS).map(|_| Temporary::new("guest")).collect();
        let guests: Vec<Netns> = spaces.iter().map(|space| space.0.clone()).collect();
        let names: Vec<&str> = guests.iter().map(Netns::name).collect();
        let given = format!("{instance} {}", names.join(" "));

        // Whoever hears anything here, something leaked.
        let hear = |ns: &Netns, at: &str| {
            let socket = ns.run(|| UdpSocket::bind(at).unwrap()).unwrap();
            socket.set_nonblocking(true).unwrap();
            socket
        };
        let mut ears: Vec<UdpSocket> = guests.iter().map(|guest| hear(guest, "0.0.0.0:9")).collect();
        ears.push(hear(&world.internet.0, "203.0.113.1:9"));
        ears.push(hear(&world.host.0, "0.0.0.0:9"));
        let allowed = hear(&world.internet.0, "198.51.100.1:9");
        let stop = Arc::new(AtomicBool::new(false));
        let senders: Vec<_> = (0..)
            .zip(&guests)
            .map(|(slot, guest)| {
                let stop = Arc::clone(&stop);
                let socket = guest.run(|| UdpSocket::bind("0.0.0.0:0").unwrap()).unwrap();
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        let others = (0..GUESTS).filter(|&other| other != slot);
                        let others = others.map(|other| SocketAddr::from((net(other).v4, 9)));
                        let rest = ["203.0.113.1:9", "192.0.2.1:9", "198.51.100.1:9"];
                        for to in others.chain(rest.map(|to| to.parse().unwrap())) {
                            let _ = socket.send_to(b"x", to);
                        }
                        std::thread::sleep(Duration::from_millis(1));
                    }
                })
            })
            .collect();

        // A slow machine's daemon takes longer to start: the moments are spread over that.
        let began = Instant::now();
        drop(start(&instance, &guests).await);
        let start_takes = began.elapsed();
        let until = Instant::now() + Duration::from_secs(seconds);
        let (mut kills, mut removed) = (0u64, 0u64);
        let pins = world.pins();
        while Instant::now() < until || kills < FEWEST {
            let mut daemon = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--nocapture"])
                .env(CHILD, &given)
                .stdout(Stdio::null())
                .spawn()
                .unwrap();
            // From the middle of its start to long after it.
            let longest = (2 * start_takes.as_millis() as u64).max(500);
            std::thread::sleep(Duration::from_millis(20 + (kills * 137 * longest / 500) % longest));
            assert!(daemon.try_wait().unwrap().is_none(), "the daemon failed by itself");
            // Now and then a program is taken off its tap, under the daemon or after it.
            let lost = pins.join("links").join(format!(
                "{}-{}",
                kills % u64::from(GUESTS),
                if kills % 2 == 0 { "from_guest" } else { "to_guest" }
            ));
            if kills % 5 == 1 {
                removed += u64::from(std::fs::remove_file(&lost).is_ok());
            }
            daemon.kill().unwrap();
            daemon.wait().unwrap();
            if kills % 5 == 3 {
                removed += u64::from(std::fs::remove_file(&lost).is_ok());
            }
            kills += 1;
        }
        stop.store(true, Ordering::Relaxed);
        for sender in senders {
            sender.join().unwrap();
        }
        for (number, ear) in ears.iter().enumerate() {
            assert!(ear.recv_from(&mut [0; 8]).is_err(), "number {number} heard something");
        }
        assert!(allowed.recv_from(&mut [0; 8]).is_ok(), "what a rule allows did pass");

        // The last one finds everything in order, and leaves nothing.
        let (datapath, vms) = start(&instance, &guests).await;
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        let to: SocketAddr = "198.51.100.1:5000".parse().unwrap();
        for (slot, vm) in (0..).zip(&vms) {
            datapath.set_policy(net(slot), &policy(vm, Mode::Enforce, &["198.51.100.0/24"])).unwrap();
        }
        let stream = guests[1].run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap().unwrap();
        drop(stream);
        server.join().unwrap();
        rules_settle_at(&world, GUESTS as usize).await;
        assert_eq!(datapath.slots().unwrap().len(), GUESTS as usize);
        datapath.teardown().await.unwrap();
        assert!(!world.pins().exists() && !Netns::exists(&format!("tapgate-{instance}")));
        println!("{kills} daemons killed, {removed} programs taken off their taps");
    });
}

/// Waits until the kernel holds so many rules.
async fn rules_settle_at(world: &World, wanted: usize) {
    let map = MapData::from_pin(world.pins().join(format!("maps-{VERSION}/RULES"))).unwrap();
    let rules: LpmTrie<_, RuleKey, u8> = LpmTrie::try_from(Map::from_map_data(map).unwrap()).unwrap();
    let until = Instant::now() + PATIENCE;
    while rules.keys().count() != wanted {
        assert!(Instant::now() < until, "{} rules instead of {wanted}", rules.keys().count());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn thousands_of_rules_change_at_once_and_leave_nothing_behind() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let b = guest(&datapath, 1, Mode::Enforce, &["203.0.113.0/24"]).await;
        let mut many: Vec<String> =
            (0..4999u32).map(|n| format!("10.{}.{}.{}/32", 1 + (n >> 16), n >> 8 & 255, n & 255)).collect();
        many.push("198.51.100.0/24".into());
        let many: Vec<&str> = many.iter().map(String::as_str).collect();
        for _ in 0..3 {
            datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &many)).unwrap();
        }
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        drop(a.connect("198.51.100.1:5000").unwrap());
        server.join().unwrap();
        rules_settle_at(&world, many.len() + 1).await;
        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &[])).unwrap();
        rules_settle_at(&world, 1).await;
        datapath.detach(b.net).await.unwrap();
        rules_settle_at(&world, 0).await;
        let beyond = datapath.attach_tap(&a.vm, net(MAX_VMS), &policy(&a.vm, Mode::Enforce, &[])).await;
        assert!(matches!(beyond, Err(DatapathError::NoSuchSlot { .. })));
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_guest_that_opens_too_many_flows_fills_its_own_share_only() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let b = guest(&datapath, 1, Mode::Enforce, &["198.51.100.0/24"]).await;
        let socket = a.udp();
        let flood = MAX_FLOWS_PER_VM + 500;
        for number in 0..flood {
            let to =
                SocketAddr::from(([198, 51, 100, 1 + (number / 60_000) as u8], 1 + (number % 60_000) as u16));
            let _ = socket.send_to(b"x", to);
        }
        // Port 53 is the gateway's.
        eventually("the rest is refused", || datapath.counters(0).unwrap().dropped(Reason::Limit) == 499);
        assert_eq!(datapath.flows(0).unwrap(), u64::from(MAX_FLOWS_PER_VM));
        let server = world.internet.0.run(|| UdpSocket::bind("198.51.100.1:9").unwrap()).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        b.udp().send_to(b"other", "198.51.100.1:9").unwrap();
        let mut got = [0; 8];
        // The first guest's datagram to this port may have come before.
        while server.recv_from(&mut got).unwrap().0 != 5 {}
        datapath.set_policy(a.net, &policy(&a.vm, Mode::Enforce, &[])).unwrap();
        let until = Instant::now() + PATIENCE;
        while datapath.flows(0).unwrap() > 0 {
            assert!(Instant::now() < until, "{} flows are left", datapath.flows(0).unwrap());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        datapath.teardown().await.unwrap();
    });
}
