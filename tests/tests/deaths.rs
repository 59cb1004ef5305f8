//! The daemon killed at each step of a VM's life, one by one: what was half done is finished or undone by the next, and nothing is left.
//!
//! The points are in the code (`tapgate_fault`), the random moments in `recovery.rs`. The ordinary run takes every point with
//! namespaces and one of each kind with real guests; with `TAPGATE_LONG` set, all.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use anyhow::{Result, ensure};
use serde_json::json;
use std::{thread, time::Duration};
use tapgate_e2e::{
    World,
    api::Client,
    chaos::{Chaos, Probe},
    daemon::{Daemon, Driver, Settings},
    sites, ssh,
};

/// In the order in which a VM meets them, whatever runs it.
const CREATION: [&str; 13] = [
    "create.folder",
    "state.starting",
    "release.detached",
    "gate.link",
    "gate.entries",
    "gate.programs",
    "gate.up",
    "boot.gated",
    "vmm.spawned",
    "vmm.noted",
    "boot.vmm",
    "boot.recorded",
    "state.running",
];
const STOP: [&str; 4] = ["release.ended", "detach.entries", "detach.link", "release.detached"];
const START: [&str; 5] = ["gate.programs", "boot.gated", "vmm.spawned", "boot.vmm", "state.running"];
const DESTRUCTION: [&str; 4] = ["release.ended", "remove.namespace", "remove.folder", "state.destroyed"];

fn long() -> bool {
    std::env::var_os("TAPGATE_LONG").is_some()
}

/// A world whose daemon can be told where to die, and what must be so at the end.
fn with(driver: Driver, test: impl FnOnce(&World, &std::path::Path, &mut Chaos<'_, '_>)) {
    let world = World::new().unwrap();
    let fault = world.folder().join("fault");
    let settings = Settings::of(driver).unwrap();
    let environment = [("TAPGATE_FAULT", fault.to_str().unwrap())];
    let mut daemon = Daemon::start_with(&world, settings, "", &environment).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let before = world.counters().unwrap();
    let probe = Probe::start(&world);
    let mut chaos = Chaos::new(&world, &mut daemon, api, 1);
    test(&world, &fault, &mut chaos);
    chaos.clear().unwrap();
    drop(probe);
    let out = world.counters().unwrap().since(&before).of(sites::EVIL);
    assert_eq!(out, 0, "something got out");
}

fn create<'a>(key: &'a str, name: &'a str) -> impl FnOnce(&Client<'_>) -> Result<()> + 'a {
    move |api| {
        let name = name.replace(['.', '_'], "-");
        let body = json!({"name": name, "public_key": key, "memory_mib": 256});
        api.post("/v1/vms", &body)?.expect(201).map(drop)
    }
}

/// Of the one VM that is not destroyed.
fn state(api: &Client<'_>) -> Result<(String, String)> {
    let all = api.get("/v1/vms?limit=100")?.expect(200)?;
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let mut living =
        all["data"].as_array().into_iter().flatten().filter(|vm| vm["status_detail"] != "destroyed");
    let one = living.next().map(|vm| (text(&vm["id"]), text(&vm["status_detail"])));
    ensure!(living.next().is_none(), "more than one VM: {all}");
    one.ok_or_else(|| anyhow::anyhow!("no VM: {all}"))
}

fn becomes(api: &Client<'_>, wanted: &[&str]) -> Result<String> {
    let mut last = String::new();
    for _ in 0..2400 {
        let (vm, detail) = state(api)?;
        if wanted.contains(&detail.as_str()) {
            return Ok(vm);
        }
        last = detail;
        thread::sleep(Duration::from_millis(100));
    }
    anyhow::bail!("it stays {last} and never becomes {wanted:?}")
}

#[test]
fn a_daemon_that_dies_at_any_step_leaves_nothing_half_done() {
    with(Driver::Netns, |world, fault, chaos| {
        let key = ssh::key(world).unwrap();
        let api = chaos.api().clone();
        for point in CREATION {
            eprintln!("--- creation, {point}");
            chaos.die_at(fault, point, create(&key, point)).unwrap();
            becomes(&api, &["ready"]).unwrap();
            chaos.settle().unwrap();
            chaos.clear().unwrap();
        }
        chaos.vm().unwrap();
        let vm = becomes(&api, &["ready"]).unwrap();
        let ask = |what: &'static str| {
            let path = format!("/v1/vms/{vm}/{what}");
            move |api: &Client<'_>| api.post(&path, &json!({})).map(drop)
        };
        for point in STOP {
            eprintln!("--- stop, {point}");
            chaos.die_at(fault, point, ask("stop")).unwrap();
            becomes(&api, &["stopped"]).unwrap();
            chaos.settle().unwrap();
            ask("start")(&api).unwrap();
            becomes(&api, &["ready"]).unwrap();
        }
        for point in START {
            eprintln!("--- start, {point}");
            ask("stop")(&api).unwrap();
            becomes(&api, &["stopped"]).unwrap();
            chaos.die_at(fault, point, ask("start")).unwrap();
            becomes(&api, &["ready"]).unwrap();
            chaos.settle().unwrap();
        }
        chaos.clear().unwrap();
        for point in DESTRUCTION {
            eprintln!("--- destruction, {point}");
            chaos.vm().unwrap();
            let vm = becomes(&api, &["ready"]).unwrap();
            api.post(&format!("/v1/vms/{vm}/stop"), &json!({})).unwrap();
            becomes(&api, &["stopped"]).unwrap();
            let destroy = |api: &Client<'_>| api.delete(&format!("/v1/vms/{vm}")).map(drop);
            chaos.die_at(fault, point, destroy).unwrap();
            api.wait_for(&vm, "destroyed").unwrap();
            chaos.clear().unwrap();
        }
    });
}

#[test]
fn real_vm_a_daemon_that_dies_while_it_starts_a_vmm_leaves_one_at_most() {
    with(Driver::Qemu, |world, fault, chaos| {
        let key = ssh::key(world).unwrap();
        let api = chaos.api().clone();
        let points: &[&str] = match long() {
            true => &["vmm.disk", "vmm.enclosed", "vmm.spawned", "vmm.noted", "boot.vmm", "boot.recorded"],
            false => &["vmm.spawned"],
        };
        for point in points.iter().copied() {
            eprintln!("--- creation, {point}");
            chaos.die_at(fault, point, create(&key, point)).unwrap();
            let vm = becomes(&api, &["running", "ready"]).unwrap();
            let vmms = tapgate_e2e::reaper::processes_with(std::slice::from_ref(&vm));
            assert_eq!(vmms, [chaos.daemon().vmm(&vm).unwrap()], "at {point}");
            chaos.clear().unwrap();
        }
    });
}

/// Steps of a running real guest: snapshots, a clone, its end.
#[test]
fn real_vm_a_daemon_that_dies_during_a_snapshot_finishes_it() {
    with(Driver::Qemu, |world, fault, chaos| {
        let api = chaos.api().clone();
        chaos.vm().unwrap();
        let vm = becomes(&api, &["ready"]).unwrap();
        let vmm = chaos.daemon().vmm(&vm);
        let points: &[&str] = match long() {
            true => {
                &["snapshot.frozen", "snapshot.begun", "snapshot.copied", "snapshot.named", "snapshot.stored"]
            }
            false => &["snapshot.begun"],
        };
        let mut last = String::new();
        for point in points.iter().copied() {
            eprintln!("--- snapshot, {point}");
            let mut id = String::new();
            chaos
                .die_at(fault, point, |api| {
                    let body = api.post(&format!("/v1/vms/{vm}/snapshots"), &json!({}))?.expect(201)?;
                    id = body["data"]["id"].as_str().unwrap().to_owned();
                    Ok(())
                })
                .unwrap();
            for _ in 0..1200 {
                let now = api.get(&format!("/v1/snapshots/{id}")).unwrap().expect(200).unwrap();
                assert_ne!(now["data"]["status"], "failed", "{now}");
                if now["data"]["status"] == "ready" {
                    break;
                }
                thread::sleep(Duration::from_millis(100));
            }
            let now = api.get(&format!("/v1/snapshots/{id}")).unwrap().expect(200).unwrap();
            assert_eq!(now["data"]["status"], "ready", "{now}");
            becomes(&api, &["ready"]).unwrap();
            assert_eq!(chaos.daemon().vmm(&vm), vmm, "the guest was booted again");
            last = id;
        }
        // It writes again: nothing left it frozen.
        let guest = ssh::Guest::of(world, &api, &vm).unwrap();
        guest.expect("timeout 60 sh -c 'echo x > /root/x && sync'").unwrap();
        guest.hang_up();
        if !long() {
            return;
        }
        for point in ["release.ended", "detach.link"] {
            eprintln!("--- stop, {point}");
            let stop = |api: &Client<'_>| api.post(&format!("/v1/vms/{vm}/stop"), &json!({})).map(drop);
            chaos.die_at(fault, point, stop).unwrap();
            becomes(&api, &["stopped"]).unwrap();
            api.post(&format!("/v1/vms/{vm}/start"), &json!({})).unwrap();
            becomes(&api, &["ready"]).unwrap();
        }
        chaos.clear().unwrap();
        eprintln!("--- clone, create.fetched");
        let key = ssh::key(world).unwrap();
        let body = json!({"name": "clone", "public_key": key, "memory_mib": 256, "snapshot_id": last});
        chaos.die_at(fault, "create.fetched", |api| api.post("/v1/vms", &body).map(drop)).unwrap();
        becomes(&api, &["ready"]).unwrap();
        eprintln!("--- deletion, snapshot.removed");
        let delete = |api: &Client<'_>| api.delete(&format!("/v1/snapshots/{last}")).map(drop);
        chaos.die_at(fault, "snapshot.removed", delete).unwrap();
        let stored = chaos.daemon().data_dir().join(format!("snapshots/{last}.qcow2.zst"));
        assert!(!stored.exists());
    });
}

/// Without what puts policies in force it would only look alive: it ends, and whoever started it starts it again.
#[test]
fn a_daemon_that_lost_a_part_of_its_engine_ends() {
    let world = World::new().unwrap();
    let fault = world.folder().join("fault");
    let settings = Settings::of(Driver::Netns).unwrap();
    let environment = [("TAPGATE_FAULT", fault.to_str().unwrap())];
    let mut daemon = Daemon::start_with(&world, settings, "", &environment).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    std::fs::write(&fault, "policy.enforced").unwrap();
    // Whether it is still answered is no matter.
    let _ = api.rule("cidr", "198.51.100.0/24");
    daemon.wait_for_death().unwrap();
    assert!(daemon.log().contains("the engine ended: the enforcer of policies panicked"), "{}", daemon.log());
    std::fs::remove_file(&fault).unwrap();
    daemon.start_again().unwrap();
    api.rule("cidr", "203.0.113.0/24").unwrap();
}
