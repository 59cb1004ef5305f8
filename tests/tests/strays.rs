//! A backup from before a VM is put back while it runs: the next daemon ends what no record knows of, and gives its address out again.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::json;
use std::path::Path;
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
    demo::Stage,
    reaper::CGROUPS,
    sh,
    wait::until,
};

fn stage(world: &World, driver: Driver) -> Stage<'_> {
    let settings = Settings::of(driver).unwrap();
    Stage::new(world, Daemon::start(world, settings).unwrap()).unwrap()
}

fn admin(stage: &Stage<'_>, words: &[&str]) -> String {
    let mut command = stage.world().on_host(daemon::binary().unwrap());
    command.arg("admin").args(words).arg("--data-dir").arg(stage.daemon().data_dir());
    sh::expect(&mut command, b"").unwrap()
}

/// Whether the process runs: what only waits for its parent to look has ended.
fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z') && !line.contains('X'))
}

fn taps(world: &World) -> String {
    sh::ip(&format!("-n {} -brief link", world.names().egress())).unwrap()
}

/// The index of the tap, so that the next one of its name is told from it.
fn tap(world: &World) -> String {
    let links = sh::ip(&format!("-n {} -o link", world.names().egress())).unwrap();
    let line = links.lines().find(|line| line.contains("tg0")).unwrap();
    line.split(':').next().unwrap().to_owned()
}

fn put_back(driver: Driver) {
    let world = World::new().unwrap();
    let mut stage = stage(&world, driver);
    let backup = world.folder().join("backup").to_str().unwrap().to_owned();
    admin(&stage, &["backup", &backup]);
    stage.boot("unknown").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    let vmm = stage.daemon().vmm(&vm).unwrap();
    assert!(runs(vmm) && taps(&world).contains("tg0"));
    stage.guest().unwrap().hang_up();
    stage.daemon_mut().kill().unwrap();
    let said = admin(&stage, &["restore", &backup]);
    assert!(runs(vmm), "restoring ends nothing");

    stage.daemon_mut().start_again().unwrap();
    until("its VMM ends", || !runs(vmm));
    assert!(!taps(&world).contains("tg0"), "its tap is left: {}", taps(&world));
    for group in CGROUPS {
        assert!(!Path::new(group).join(&vm).exists(), "its control group is left");
    }
    let log = stage.daemon().log();
    let line = log.lines().find(|line| line.contains("strays.ended")).unwrap();
    assert!(line.contains(&vm), "{line}");
    assert!(stage.daemon().vm_folder(&vm).exists(), "its disk is its owner's");
    assert!(said.contains(&vm), "whoever restores was told what would be ended: {said}");
    assert_eq!(stage.api().get(&format!("/v1/vms/{vm}")).unwrap().status, 404);

    // The next VM has its place.
    stage.boot("next").unwrap();
    assert!(taps(&world).contains("tg0"));
    assert_eq!(stage.guest().unwrap().expect("echo in").unwrap(), "in");
    stage.clear().unwrap();
}

#[test]
fn a_vm_that_no_record_knows_is_ended_and_its_place_is_free() {
    put_back(Driver::Netns);
}

#[test]
fn real_vm_that_no_record_knows_is_ended_and_its_place_is_free() {
    put_back(Driver::Qemu);
}

/// In the backup it is at rest; it was started since.
#[test]
fn a_vm_that_runs_though_the_records_say_that_it_is_stopped_is_ended_and_starts_again() {
    let world = World::new().unwrap();
    let mut stage = stage(&world, Driver::Netns);
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    stage.guest().unwrap().hang_up();
    stage.api().post(&format!("/v1/vms/{vm}/stop"), &json!({})).unwrap().expect(200).unwrap();
    stage.api().wait_for(&vm, "stopped").unwrap();
    let backup = world.folder().join("backup").to_str().unwrap().to_owned();
    admin(&stage, &["backup", &backup]);
    stage.api().post(&format!("/v1/vms/{vm}/start"), &json!({})).unwrap().expect(200).unwrap();
    stage.api().wait_ready(&vm).unwrap();
    let (vmm, before) = (stage.daemon().vmm(&vm).unwrap(), tap(&world));
    stage.daemon_mut().kill().unwrap();
    admin(&stage, &["restore", &backup]);

    stage.daemon_mut().start_again().unwrap();
    until("its VMM ends", || !runs(vmm));
    assert!(!taps(&world).contains("tg0"), "its tap is left: {}", taps(&world));
    stage.api().post(&format!("/v1/vms/{vm}/start"), &json!({})).unwrap().expect(200).unwrap();
    stage.api().wait_ready(&vm).unwrap();
    assert_ne!(tap(&world), before);
    stage.enter(vm).unwrap();
    assert_eq!(stage.guest().unwrap().expect("echo in").unwrap(), "in");
    stage.clear().unwrap();
}
