//! What cannot be read, ended or removed of a VM: no state is entered that is not true, and what stands in the way is tried again.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::json;
use std::{thread, time::Duration};
use tapgate_e2e::{
    World,
    api::Client,
    daemon::{Daemon, Driver, Settings},
    sh, ssh,
};

/// How many times a state is looked at, ten times a second.
const TRIES: usize = 600;

fn becomes(api: &Client<'_>, vm: &str, wanted: &str) {
    let mut last = String::new();
    for _ in 0..TRIES {
        let body = api.get(&format!("/v1/vms/{vm}")).unwrap().expect(200).unwrap();
        last = body["status_detail"].as_str().unwrap_or_default().to_owned();
        if last == wanted {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("it stays {last} and never becomes {wanted}");
}

fn eventually(what: &str, happened: impl Fn() -> bool) {
    for _ in 0..TRIES {
        if happened() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("{what}: never");
}

fn change(daemon: &Daemon<'_>, sql: &str) {
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])";
    let database = daemon.data_dir().join("tapgate.db");
    sh::run("python3", ["-c", script, database.to_str().unwrap(), sql]).unwrap();
}

/// Whether the process runs: what only waits for its parent to look has ended.
fn runs(pid: u32) -> bool {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.lines().any(|line| line.starts_with("State:") && !line.contains('Z') && !line.contains('X'))
}

/// The daemon dies while a VM is being stopped, and the next cannot open one of the account's variables.
#[test]
fn a_vm_is_ended_although_its_environment_cannot_be_read() {
    let world = World::new().unwrap();
    let mut daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    for (state, desired, end) in
        [("stopping", "stopped", "stopped"), ("destroying", "destroyed", "destroyed")]
    {
        // The variable of the round before does not open any more: it is made anew.
        let _ = api.delete("/v1/env/K").unwrap();
        api.put("/v1/env/K", &json!({ "value": "v" })).unwrap().expect(200).unwrap();
        let vm = api.create_vm(state, &ssh::key(&world).unwrap()).unwrap();
        api.wait_ready(&vm).unwrap();
        let vmm = daemon.vmm(&vm).unwrap();
        daemon.kill().unwrap();
        change(
            &daemon,
            &format!(
                "UPDATE env SET value = zeroblob(64);
                 UPDATE vms SET detail = '{state}', desired = '{desired}' WHERE id = '{vm}'"
            ),
        );
        daemon.start_again().unwrap();
        becomes(&api, &vm, end);
        assert!(!runs(vmm), "it is {end}, and its VMM {vmm} runs");
    }
}

/// What cannot be read of the account is missing, and the VM runs on.
#[test]
fn a_vm_that_runs_is_taken_up_although_its_environment_cannot_be_read() {
    let world = World::new().unwrap();
    let mut daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    api.put("/v1/env/K", &json!({ "value": "v" })).unwrap().expect(200).unwrap();
    let vm = api.create_vm("vm", &ssh::key(&world).unwrap()).unwrap();
    api.wait_ready(&vm).unwrap();
    let vmm = daemon.vmm(&vm).unwrap();
    daemon.kill().unwrap();
    change(&daemon, "UPDATE env SET value = zeroblob(64)");
    daemon.start_again().unwrap();
    assert_eq!(daemon.vmm(&vm), Some(vmm));
    assert!(runs(vmm), "{}", daemon.log());
    becomes(&api, &vm, "ready");
    assert!(daemon.log().contains("vm.environment_not_read"), "{}", daemon.log());
}

#[test]
fn a_folder_that_cannot_be_removed_is_tried_again_now_and_then() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let vm = api.create_vm("vm", &ssh::key(&world).unwrap()).unwrap();
    api.wait_ready(&vm).unwrap();
    let kept = daemon.vm_folder(&vm).join("kept");
    std::fs::write(&kept, "").unwrap();
    let immutable = |flag: &str| sh::run("chattr", [flag, kept.to_str().unwrap()]).unwrap();
    immutable("+i");
    api.post(&format!("/v1/vms/{vm}/stop"), &json!({})).unwrap();
    becomes(&api, &vm, "stopped");
    api.delete(&format!("/v1/vms/{vm}")).unwrap();
    thread::sleep(Duration::from_secs(6));
    let tries = daemon.log().matches("vm.left").count();
    immutable("-i");
    becomes(&api, &vm, "destroyed");
    // After 1, 2 and 4 seconds.
    assert!((1..=4).contains(&tries), "{tries} tries in six seconds");
    assert!(!kept.exists());
}

/// The records refuse a snapshot's last step for a while. (A namespace has none to give: it fails, which is a step like another.)
#[test]
fn a_snapshot_whose_last_step_is_refused_takes_it_later_without_a_call() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let vm = api.create_vm("one", &ssh::key(&world).unwrap()).unwrap();
    api.wait_ready(&vm).unwrap();
    change(
        &daemon,
        "CREATE TRIGGER refused BEFORE UPDATE OF status ON snapshots BEGIN SELECT RAISE(ABORT, 'refused'); END",
    );
    let made = api.post(&format!("/v1/vms/{vm}/snapshots"), &json!({})).unwrap().expect(201).unwrap();
    let path = format!("/v1/snapshots/{}", made["data"]["id"].as_str().unwrap());
    let status = || api.get(&path).unwrap().expect(200).unwrap()["data"]["status"].clone();
    eventually("the refusal is logged", || daemon.log().contains("refused"));
    assert_eq!(status(), "pending");
    change(&daemon, "DROP TRIGGER refused");
    eventually("the snapshot ends", || status() == "failed");
}

/// A copy that a daemon before this one left to be uploaded; the store is there, the records refuse that it is ready.
#[test]
fn a_snapshot_that_is_stored_is_not_stored_again_because_the_records_refuse_it() {
    let world = World::new().unwrap();
    let mut daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let vm = api.create_vm("one", &ssh::key(&world).unwrap()).unwrap();
    api.wait_ready(&vm).unwrap();
    let made = api.post(&format!("/v1/vms/{vm}/snapshots"), &json!({})).unwrap().expect(201).unwrap();
    let id = made["data"]["id"].as_str().unwrap();
    let path = format!("/v1/snapshots/{id}");
    let status = || api.get(&path).unwrap().expect(200).unwrap()["data"]["status"].clone();
    // A namespace has none to give.
    eventually("it fails", || status() == "failed");
    daemon.kill().unwrap();
    change(
        &daemon,
        "UPDATE snapshots SET status = 'uploading', failure = NULL;
         CREATE TRIGGER refused BEFORE UPDATE OF status ON snapshots BEGIN SELECT RAISE(ABORT, 'refused'); END",
    );
    let staged = daemon.data_dir().join("staging").join(format!("{id}.qcow2"));
    std::fs::write(&staged, vec![7; 1 << 20]).unwrap();
    daemon.start_again().unwrap();
    eventually("the refusal is logged", || daemon.log().contains("refused"));
    assert_eq!(status(), "uploading");
    // What is stored already needs nothing of the copy.
    std::fs::rename(&staged, staged.with_extension("away")).unwrap();
    change(&daemon, "DROP TRIGGER refused");
    // Anything that calls for a look at what there is to store.
    api.post(&format!("/v1/vms/{vm}/snapshots"), &json!({})).unwrap().expect(201).unwrap();
    eventually("the snapshot ends", || status() != "uploading");
    assert_eq!(status(), "ready", "{}", daemon.log());
}
