//! The life of a real VM through the API: stop and start, snapshot and what comes of it, with the gate checked each time.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{thread, time::Duration};
use tapgate_e2e::{
    World,
    bucket::{Bucket, SECRET},
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    sites, ssh,
};

/// How many times a state is looked at, ten times a second.
const TRIES: usize = 1200;

/// A guest with no rule reaches nothing, by name or by address.
fn held(stage: &Stage<'_>) {
    let before = stage.world().counters().unwrap();
    let done = stage
        .sh(&format!(
            "curl -sS -m 20 --resolve {0}:443:{1} https://{0}/; ping -c1 -W1 {1}; true",
            sites::API.name,
            sites::API.v4
        ))
        .unwrap();
    assert!(!done.out.contains("hello from"), "{done:?}");
    assert_eq!(stage.world().counters().unwrap().since(&before).any(), 0, "something got out");
}

fn shown(stage: &Stage<'_>, id: &str) -> Value {
    stage.api().get(&format!("/v1/snapshots/{id}")).unwrap().expect(200).unwrap()["data"].clone()
}

/// Waits for a snapshot's status.
fn becomes(stage: &Stage<'_>, id: &str, wanted: &[&str]) -> Value {
    let mut last = Value::Null;
    for _ in 0..TRIES {
        last = shown(stage, id);
        if wanted.iter().any(|word| last["status"] == *word) {
            return last;
        }
        assert_ne!(last["status"], "failed", "{last}");
        thread::sleep(Duration::from_millis(100));
    }
    panic!("the snapshot never becomes {wanted:?}: {last}");
}

fn begin(stage: &Stage<'_>, vm: &str) -> String {
    let made = stage.api().post(&format!("/v1/vms/{vm}/snapshots"), &json!({"label": "test"})).unwrap();
    let made = made.expect(201).unwrap()["data"].clone();
    assert_eq!(made["status"], "pending");
    made["id"].as_str().unwrap().to_owned()
}

/// Takes a snapshot, with the daemon killed while it is copied and again while it is stored.
fn snapshot(stage: &mut Stage<'_>, vm: &str) -> String {
    let id = begin(stage, vm);
    thread::sleep(Duration::from_millis(500));
    for stages in [["pending", "uploading", "ready"], ["uploading", "ready", "ready"]] {
        let now = becomes(stage, &id, &stages);
        println!("the daemon is killed while the snapshot is {}", now["status"]);
        stage.daemon_mut().kill().unwrap();
        stage.daemon_mut().start_again().unwrap();
    }
    let ready = becomes(stage, &id, &["ready"]);
    assert!(ready["size_bytes"].as_u64().is_some_and(|size| size > 1 << 20), "{ready}");
    assert_eq!(ready["r2_key"], format!("snapshots/{id}.qcow2.zst"));
    id
}

fn from(stage: &Stage<'_>, name: &str, snapshot: &str) -> String {
    let body = json!({"name": name, "public_key": ssh::key(stage.world()).unwrap(), "snapshot_id": snapshot});
    let vm = stage.api().post("/v1/vms", &body).unwrap().expect(201).unwrap();
    vm["id"].as_str().unwrap().to_owned()
}

fn identity(stage: &Stage<'_>) -> Vec<String> {
    let script = "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub; hostname; \
                  openssl x509 -noout -fingerprint -in /usr/local/share/ca-certificates/tapgate.crt; \
                  ip -4 -o addr show dev eth0 | awk '{print $4}'";
    stage.guest().unwrap().expect(script).unwrap().lines().map(str::to_owned).collect()
}

#[test]
fn real_vm_stopped_started_and_made_again_from_a_snapshot() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Qemu).unwrap();
    let bucket = Bucket::start(&world).unwrap();
    let daemon = Daemon::start_with(&world, settings, &bucket.lines(), &Bucket::environment()).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("first").unwrap();
    let first = stage.vm().unwrap().to_owned();
    held(&stage);
    stage.guest().unwrap().expect("echo kept > /root/file; sync").unwrap();

    stage.restart().unwrap();
    held(&stage);
    assert_eq!(stage.guest().unwrap().expect("cat /root/file").unwrap().trim(), "kept");

    stage.guest().unwrap().expect("echo just-written > /root/late").unwrap();
    let id = snapshot(&mut stage, &first);
    stage.api().wait_ready(&first).unwrap();
    stage.enter(first.clone()).unwrap();
    let original = identity(&stage);
    let second = from(&stage, "second", &id);
    stage.api().wait_ready(&second).unwrap();
    stage.enter(second.clone()).unwrap();
    held(&stage);
    let copy = stage.guest().unwrap().expect("cat /root/file /root/late").unwrap();
    assert_eq!(copy.split_whitespace().collect::<Vec<_>>(), ["kept", "just-written"]);
    let other = identity(&stage);
    assert_eq!(original.len(), 5, "{original:?}");
    for (one, two) in original.iter().zip(&other) {
        assert_ne!(one, two, "a copy shares an identity with its origin");
    }

    // One that was changed where it is stored is never booted.
    let key = format!("one/two/snapshots/{id}.qcow2.zst");
    assert_eq!(bucket.keys().unwrap(), [key.as_str()]);
    assert_eq!(bucket.open_uploads().unwrap(), Vec::<String>::new(), "an upload that was cut off is left");
    bucket.tamper(&key).unwrap();
    let third = from(&stage, "third", &id);
    let mut vm = Value::Null;
    for _ in 0..TRIES {
        vm = stage.api().get(&format!("/v1/vms/{third}")).unwrap().expect(200).unwrap();
        if vm["status"] == "failed" {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert!(vm["failure_reason"].as_str().unwrap_or_default().contains("changed"), "{vm}");
    stage.api().delete(&format!("/v1/vms/{third}")).unwrap().expect(204).unwrap();
    stage.api().wait_for(&third, "destroyed").unwrap();
    // A chain: of a VM that came from a snapshot.
    let chained = begin(&stage, &second);
    assert_eq!(becomes(&stage, &chained, &["ready"])["source_snapshot_id"], *id);

    for vm in [&first, &second] {
        stage.api().post(&format!("/v1/vms/{vm}/stop"), &json!({})).unwrap().expect(200).unwrap();
        stage.api().wait_for(vm, "stopped").unwrap();
        stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().expect(204).unwrap();
        stage.api().wait_for(vm, "destroyed").unwrap();
    }
    for id in [&id, &chained] {
        stage.api().delete(&format!("/v1/snapshots/{id}")).unwrap().expect(204).unwrap();
        assert_eq!(stage.api().get(&format!("/v1/snapshots/{id}")).unwrap().status, 404);
    }
    for _ in 0..TRIES {
        if bucket.keys().unwrap().is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(bucket.keys().unwrap(), Vec::<String>::new(), "a deleted snapshot's bytes are left");
    let log = stage.daemon().log();
    assert!(!log.contains(SECRET), "the log has the store's credentials");
    for line in log.lines().filter(|line| line.contains("snapshot.taken")) {
        println!("{line}");
    }
}
