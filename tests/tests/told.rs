//! What VMs tried comes to the audit log whole, though a look at it fails on the way, or there is no daemon for a while. The
//! namespace driver stands in for a VM.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use aya::maps::{HashMap, Map, MapData};
use std::{path::Path, thread, time::Duration};
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
    demo::Stage,
    net, sh,
};
use tapgate_ebpf_common::maps::{Address, AttemptKey, MAX_ATTEMPTS, MAX_VMS, VERSION};

/// Attempts of a VM that the daemon does not know.
fn foreign(number: u32) -> AttemptKey {
    AttemptKey { slot: MAX_VMS - 1, destination: Address([0, 0, 0, number]), ..AttemptKey::default() }
}

/// What UDP to refused ports the VM's events stand for.
fn told(stage: &Stage<'_>, vm: &str) -> u64 {
    let events = stage.api().audit(vm, "&protocol=udp").unwrap();
    events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum()
}

fn comes_to(stage: &Stage<'_>, vm: &str, wanted: u64) {
    for _ in 0..50 {
        if told(stage, vm) >= wanted {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(told(stage, vm), wanted, "{}", stage.daemon().log());
}

#[test]
fn what_a_vm_tries_while_there_is_no_daemon_is_on_record() {
    const PORTS: u64 = 100;
    let world = World::new().unwrap();
    let images = "/var/cache/tapgate/images".into();
    let settings = Settings { binary: daemon::binary().unwrap(), driver: Driver::Netns, images };
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    stage.daemon_mut().kill().unwrap();
    let send = format!(
        "import socket; s = socket.socket(2, 2)\nfor p in range({PORTS} * 3): s.sendto(b'x', ('203.0.113.9', 20000 + p % {PORTS}))"
    );
    let guest = format!("{}-0", world.names().egress());
    sh::expect(net::inside(&guest, "python3").args(["-c", &send]), b"").unwrap();
    stage.daemon_mut().start_again().unwrap();
    comes_to(&stage, &vm, PORTS * 3);
}

/// The kernel's tables are full, by whoever else is on the host.
#[test]
fn a_look_that_fails_loses_nothing_and_tells_nothing_twice() {
    const PORTS: u64 = 20;
    /// For the daemon to look and fail: it looks once a second, and so long after a failure.
    const LOOKS: Duration = Duration::from_millis(2500);
    let world = World::new().unwrap();
    let images = "/var/cache/tapgate/images".into();
    let settings = Settings { binary: daemon::binary().unwrap(), driver: Driver::Netns, images };
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();

    let pins = Path::new("/sys/fs/bpf/tapgate").join(&world.names().world).join(format!("maps-{VERSION}"));
    let notes = MapData::from_pin(pins.join("ATTEMPTS_TOLD")).and_then(Map::from_map_data).unwrap();
    let mut notes: HashMap<_, AttemptKey, u64> = HashMap::try_from(notes).unwrap();
    let filled = (0..=MAX_ATTEMPTS).find(|number| notes.insert(foreign(*number), 1, 0).is_err());
    assert!(filled.is_some(), "the table has a limit");
    // There is room for some of the counts.
    for number in 0..5 {
        notes.remove(&foreign(number)).unwrap();
    }
    let send = format!(
        "python3 -c \"import socket; s = socket.socket(2, 2)\n\
         for p in range({PORTS} * 3): s.sendto(b'x', ('203.0.113.9', 20000 + p % {PORTS}))\""
    );
    let tried = || assert!(stage.sh(&send).unwrap().ok());
    tried();
    // Looks that nobody waits for fail.
    thread::sleep(LOOKS);
    tried();
    let failures = || stage.daemon().log().matches("events.not_read").count();
    let before = failures();
    assert!(before > 0, "no look failed");
    // And those at the VM's end, which it waits for.
    thread::scope(|scope| {
        let stopped = scope.spawn(|| {
            stage.api().post(&format!("/v1/vms/{vm}/stop"), &serde_json::json!({})).unwrap().expect(200)
        });
        thread::sleep(LOOKS);
        for number in 5..1000 {
            notes.remove(&foreign(number)).unwrap();
        }
        stopped.join().unwrap().unwrap();
    });
    stage.api().wait_for(&vm, "stopped").unwrap();
    assert!(failures() > before, "no look at its end failed");
    comes_to(&stage, &vm, PORTS * 6);
    stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().expect(204).unwrap();
}
