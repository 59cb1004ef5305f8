//! What becomes of VMs when things die: random lives under random deaths, and each single death on its own.
//!
//! `TAPGATE_CHAOS_ROUNDS` and `TAPGATE_CHAOS_SEED` make the campaign longer or another.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{
    thread,
    time::{Duration, Instant},
};
use tapgate_e2e::{
    World,
    chaos::{Chaos, Probe},
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    sh, sites,
};

fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn long() -> bool {
    std::env::var_os("TAPGATE_LONG").is_some()
}

fn campaign(driver: Driver, rounds: u64) {
    let world = World::new().unwrap();
    let mut daemon = Daemon::start(&world, Settings::of(driver).unwrap()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let seed = number("TAPGATE_CHAOS_SEED", 7);
    let before = world.counters().unwrap();
    let probe = Probe::start(&world);
    let started = Instant::now();
    let mut chaos = Chaos::new(&world, &mut daemon, api, seed);
    let mut incited = 0;
    if driver == Driver::Qemu {
        // Their boots take a while: from the first round on there is somebody to kill.
        for _ in 0..3 {
            chaos.vm().unwrap();
        }
        chaos.settle().unwrap();
        incited += chaos.incite().unwrap();
    }
    for round in 0..rounds {
        chaos.round().unwrap_or_else(|error| panic!("round {round} of seed {seed}: {error:#}"));
        // Real guests are few and slow: they rest more often, and are set on getting out.
        if driver == Driver::Qemu && round % 5 == 4 {
            chaos.settle().unwrap_or_else(|error| panic!("after round {round} of seed {seed}: {error:#}"));
            incited += chaos.incite().unwrap();
            thread::sleep(Duration::from_secs(2));
        }
        if round % 20 == 19 {
            chaos.settle().unwrap_or_else(|error| panic!("after round {round} of seed {seed}: {error:#}"));
        }
    }
    chaos.settle().unwrap();
    chaos.reboot().unwrap();
    let after = chaos.settle().unwrap();
    if driver == Driver::Qemu {
        chaos.incite().unwrap();
        thread::sleep(Duration::from_secs(10));
        incited += chaos.incite().unwrap();
    }
    chaos.clear().unwrap();
    let (tries, tally) = (probe.tries() + incited, chaos.tally.clone());
    drop(probe);
    let out = world.counters().unwrap().since(&before).of(sites::EVIL);
    println!(
        "{rounds} rounds in {:.0} s, seed {seed}: {tally:?}; {} VMs at the end; {tries} attempts to get out, {out} arrived",
        started.elapsed().as_secs_f64(),
        after.len()
    );
    assert_eq!(out, 0, "something got out");
    let least = if driver == Driver::Qemu { 5 } else { rounds };
    assert!(tries > least, "nobody tried to get out: {tries}");
}

#[test]
fn random_lives_under_random_deaths_end_in_true_states() {
    campaign(Driver::Netns, number("TAPGATE_CHAOS_ROUNDS", if long() { 200 } else { 25 }));
}

/// Rounds with real guests: only when asked for, because each boot takes seconds.
#[test]
fn real_vm_random_lives_under_random_deaths() {
    match number("TAPGATE_CHAOS_REAL_ROUNDS", if long() { 20 } else { 0 }) {
        0 => eprintln!("SKIPPED: set TAPGATE_LONG, or TAPGATE_CHAOS_REAL_ROUNDS"),
        rounds => campaign(Driver::Qemu, rounds),
    }
}

/// Waits for a `status_detail` and answers the VM.
fn becomes(stage: &Stage<'_>, vm: &str, wanted: &str) -> Value {
    let mut body = Value::Null;
    for _ in 0..1200 {
        body = stage.api().get(&format!("/v1/vms/{vm}")).unwrap().expect(200).unwrap();
        if body["status_detail"] == wanted {
            return body;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("it never becomes {wanted}: {body}");
}

fn signal(stage: &Stage<'_>, vm: &str, signal: &str) {
    sh::run("kill", [signal, &stage.daemon().vmm(vm).unwrap().to_string()]).unwrap();
}

/// A VM that failed is closed, and is itself again after a start.
fn failed_and_back(stage: &mut Stage<'_>, vm: &str, why: &str) {
    let failed = becomes(stage, vm, "failed");
    assert!(failed["failure_reason"].as_str().unwrap().contains(why), "{failed}");
    assert!(stage.daemon().vmm(vm).is_none(), "the VMM's note is left");
    stage.guest().unwrap().hang_up();
    stage.api().post(&format!("/v1/vms/{vm}/start"), &json!({})).unwrap().expect(200).unwrap();
    stage.api().wait_ready(vm).unwrap();
    stage.enter(vm.to_owned()).unwrap();
}

#[test]
fn a_vmm_that_dies_or_hangs_fails_with_a_reason_and_starts_again() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    signal(&stage, &vm, "-KILL");
    failed_and_back(&mut stage, &vm, "ended");
    signal(&stage, &vm, "-STOP");
    failed_and_back(&mut stage, &vm, "hangs");
    // Dead or hanging while nobody watches: the next daemon starts it again.
    for deadly in ["-KILL", "-STOP"] {
        stage.guest().unwrap().hang_up();
        stage.daemon_mut().kill().unwrap();
        let before = stage.daemon().vmm(&vm).unwrap();
        signal(&stage, &vm, deadly);
        stage.daemon_mut().start_again().unwrap();
        // Until the daemon has looked, the records say what was.
        let mut now = Some(before);
        for _ in 0..600 {
            now = stage.daemon().vmm(&vm).filter(|pid| *pid != before);
            if now.is_some() {
                break;
            }
            thread::sleep(Duration::from_millis(100));
        }
        assert!(now.is_some(), "no other VMM was started: {}", becomes(&stage, &vm, "ready"));
        becomes(&stage, &vm, "ready");
    }
    stage.enter(vm).unwrap();
    stage.clear().unwrap();
}

#[test]
fn real_vm_guest_reboot_shutdown_crash_and_vmm_hang() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Qemu).unwrap()).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    let pid = stage.daemon().vmm(&vm).unwrap();
    // A kernel that panics restarts (panic=-1), as a guest that is told to: the VMM goes on, the record follows.
    let panic = "echo 1 > /proc/sys/kernel/sysrq; nohup sh -c 'sleep 1; echo c > /proc/sysrq-trigger' >/dev/null 2>&1 &";
    stage.guest().unwrap().expect(panic).unwrap();
    stage.guest().unwrap().hang_up();
    for _ in 0..600 {
        if stage.daemon().log().contains("vm.rebooted") {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert!(stage.daemon().log().contains("vm.rebooted"), "the panic was not noticed");
    becomes(&stage, &vm, "ready");
    assert_eq!(stage.daemon().vmm(&vm), Some(pid));
    signal(&stage, &vm, "-STOP");
    failed_and_back(&mut stage, &vm, "hangs");
    let _ = stage.sh("systemctl poweroff");
    stage.guest().unwrap().hang_up();
    becomes(&stage, &vm, "stopped");
    assert!(stage.daemon().vmm(&vm).is_none());
    stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().expect(204).unwrap();
    stage.api().wait_for(&vm, "destroyed").unwrap();
}
