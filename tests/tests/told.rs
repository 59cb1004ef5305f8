//! What VMs tried comes to the audit log whole, though a look at it fails on the way, or there is no daemon for a while. The
//! namespace driver stands in for a VM.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use aya::maps::{HashMap, Map, MapData};
use std::{path::Path, thread, time::Duration};
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
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
    let settings = Settings::of(Driver::Netns).unwrap();
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

/// Nobody can take the VM up: the records do not know its VMM any more.
#[test]
fn what_a_vm_tried_that_nobody_takes_up_is_on_record() {
    const PORTS: u64 = 100;
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    let rule = stage.api().rule("cidr", "203.0.113.8/32").unwrap();
    let database = stage.daemon().data_dir().join("tapgate.db");
    let guest = format!("{}-0", world.names().egress());
    // Running, and in the middle of a start and of a stop.
    for state in ["ready", "starting", "stopping"] {
        stage.boot(state).unwrap();
        let vm = stage.vm().unwrap().to_owned();
        stage.daemon_mut().kill().unwrap();
        let send = format!(
            "import socket; s = socket.socket(2, 2)\nfor p in range({PORTS} * 3): s.sendto(b'x', ('203.0.113.9', 20000 + p % {PORTS}))\n\
             s.sendto(b'x', ('203.0.113.8', 7))"
        );
        sh::expect(net::inside(&guest, "python3").args(["-c", &send]), b"").unwrap();
        sh::run("kill", ["-KILL", &stage.daemon().vmm(&vm).unwrap().to_string()]).unwrap();
        let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])";
        let sql = format!("UPDATE vms SET handle = NULL, detail = '{state}' WHERE id = '{vm}'");
        sh::run("python3", ["-c", script, database.to_str().unwrap(), &sql]).unwrap();
        stage.daemon_mut().start_again().unwrap();
        comes_to(&stage, &vm, PORTS * 3 + 1);
        let allowed = stage.api().audit(&vm, "&protocol=udp&verdict=allowed").unwrap();
        assert!(!allowed.is_empty() && allowed.iter().all(|event| event["rule_id"] == rule), "{allowed:?}");
        if state != "stopping" {
            stage.api().wait_ready(&vm).unwrap();
        }
        let _ = stage.api().post(&format!("/v1/vms/{vm}/stop"), &serde_json::json!({})).unwrap();
        stage.api().wait_for(&vm, "stopped").unwrap();
        stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().expect(204).unwrap();
        stage.api().wait_for(&vm, "destroyed").unwrap();
    }
}

/// The VMM of one is gone with its tap, and that of another hangs, which takes a while to find out.
#[test]
fn real_vm_what_one_tried_is_on_record_while_another_is_still_looked_at() {
    const TRIES: u64 = 300;
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Qemu).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("hangs").unwrap();
    let hangs = stage.vm().unwrap().to_owned();
    stage.boot("gone").unwrap();
    let gone = stage.vm().unwrap().to_owned();
    let send = format!(
        "import socket; s = socket.socket(2, 2)\nfor p in range({TRIES}): s.sendto(b'x', ('203.0.113.9', 20000 + p % 100))"
    );
    let when = "--on-active=3 --timer-property=AccuracySec=100ms";
    stage.guest().unwrap().expect(&format!("systemd-run -q {when} python3 -c \"{send}\"")).unwrap();
    stage.daemon_mut().kill().unwrap();
    thread::sleep(Duration::from_secs(8));
    for (vm, signal) in [(&hangs, "-STOP"), (&gone, "-KILL")] {
        sh::run("kill", [signal, &stage.daemon().vmm(vm).unwrap().to_string()]).unwrap();
    }
    stage.daemon_mut().start_again().unwrap();
    let told = || {
        let events = stage.api().audit(&gone, "&protocol=udp&cidr=203.0.113.9/32").unwrap();
        events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum::<u64>()
    };
    for _ in 0..450 {
        if told() >= TRIES {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(told(), TRIES, "{}", stage.daemon().log());
}

/// The kernel's tables are full, by whoever else is on the host.
#[test]
fn a_look_that_fails_loses_nothing_and_tells_nothing_twice() {
    const PORTS: u64 = 20;
    /// For the daemon to look and fail: it looks once a second, and so long after a failure.
    const LOOKS: Duration = Duration::from_millis(2500);
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
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
