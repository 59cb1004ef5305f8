//! What a VM is made from is its snapshot or nothing; and a snapshot that nobody wants any more is not stored. With real guests.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{
    fs,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    ssh,
    wait::until,
};

fn stage(world: &World) -> Stage<'_> {
    let settings = Settings::of(Driver::Qemu).unwrap();
    let mut stage = Stage::new(world, Daemon::start(world, settings).unwrap()).unwrap();
    stage.boot("parent").unwrap();
    stage
}

fn begin(stage: &Stage<'_>, kind: &str) -> String {
    let path = format!("/v1/vms/{}/snapshots", stage.vm().unwrap());
    let made = stage.api().post(&path, &json!({ "kind": kind })).unwrap().expect(201).unwrap();
    made["data"]["id"].as_str().unwrap().to_owned()
}

fn take(stage: &Stage<'_>, kind: &str) -> String {
    let id = begin(stage, kind);
    until("the snapshot is ready", || {
        let now = stage.api().get(&format!("/v1/snapshots/{id}")).unwrap().expect(200).unwrap();
        assert_ne!(now["data"]["status"], "failed", "{now}");
        now["data"]["status"] == "ready"
    });
    id
}

/// Where the disk of a snapshot is stored.
fn object(stage: &Stage<'_>, snapshot: &str) -> PathBuf {
    stage.daemon().data_dir().join(format!("snapshots/{snapshot}.qcow2.zst"))
}

/// Changes an octet in the middle; the same again puts it back.
fn flip(file: &Path) {
    let open = fs::File::options().read(true).write(true).open(file).unwrap();
    let (at, mut octet) = (open.metadata().unwrap().len() / 2, [0]);
    open.read_exact_at(&mut octet, at).unwrap();
    open.write_all_at(&[!octet[0]], at).unwrap();
}

fn begin_from(stage: &Stage<'_>, name: &str, snapshot: &str) -> String {
    let key = ssh::key(stage.world()).unwrap();
    let body = json!({"name": name, "public_key": key, "snapshot_id": snapshot});
    let vm = stage.api().post("/v1/vms", &body).unwrap().expect(201).unwrap();
    vm["id"].as_str().unwrap().to_owned()
}

fn failed(vm: &Value) {
    assert_eq!(vm["status"], "failed", "{vm}");
    assert!(vm["failure_reason"].as_str().unwrap_or_default().contains("changed or damaged"), "{vm}");
}

#[test]
fn real_vm_one_whose_snapshot_cannot_be_had_starts_from_nothing_else() {
    let world = World::new().unwrap();
    let mut stage = stage(&world);
    stage.guest().unwrap().expect("echo kept > /root/marker; sync").unwrap();
    let boot = stage.guest().unwrap().expect("cat /proc/sys/kernel/random/boot_id").unwrap();
    let snapshots = ["disk", "memory"].map(|kind| take(&stage, kind));
    stage.clear().unwrap();

    for snapshot in &snapshots {
        flip(&object(&stage, snapshot));
    }
    let vms =
        snapshots.each_ref().map(|snapshot| begin_from(&stage, &format!("of-{}", &snapshot[5..]), snapshot));
    for vm in &vms {
        let path = format!("/v1/vms/{vm}");
        let mut now = Value::Null;
        until("it fails", || {
            now = stage.api().get(&path).unwrap().expect(200).unwrap();
            now["status"] != "pending"
        });
        failed(&now);
        failed(&stage.api().post(&format!("{path}/start"), &json!({})).unwrap().expect(200).unwrap());
    }
    // They may still be started from what they were to be made from.
    for snapshot in &snapshots {
        stage.api().delete(&format!("/v1/snapshots/{snapshot}")).unwrap().expect(204).unwrap();
    }
    thread::sleep(Duration::from_secs(1));
    for snapshot in &snapshots {
        flip(&object(&stage, snapshot));
    }
    for (vm, kind) in vms.iter().zip(["disk", "memory"]) {
        stage.api().post(&format!("/v1/vms/{vm}/start"), &json!({})).unwrap().expect(200).unwrap();
        stage.api().wait_ready(vm).unwrap();
        stage.enter(vm.clone()).unwrap();
        let guest = stage.guest().unwrap();
        assert_eq!(guest.expect("cat /root/marker").unwrap().trim(), "kept");
        let same = guest.expect("cat /proc/sys/kernel/random/boot_id").unwrap() == boot;
        assert_eq!(same, kind == "memory", "whether it goes on with its parent's memory");
        assert!(!guest.expect("dmesg").unwrap().contains("EXT4-fs error"));
        stage.clear().unwrap();
    }
    for snapshot in &snapshots {
        let object = object(&stage, snapshot);
        until("a deleted snapshot's bytes go", || !object.exists());
    }
}

#[test]
fn real_vm_a_snapshot_that_is_deleted_while_it_is_copied_is_not_stored() {
    let world = World::new().unwrap();
    let mut stage = stage(&world);
    let staging = stage.daemon().data_dir().join("staging");
    // What takes a while to copy.
    stage.guest().unwrap().expect("head -c 300M /dev/urandom > /root/large; sync").unwrap();
    let id = begin(&stage, "disk");
    until("the copy begins", || staging.join(format!("{id}.part")).exists());
    stage.api().delete(&format!("/v1/snapshots/{id}")).unwrap().expect(204).unwrap();
    let said =
        |word: &str| stage.daemon().log().lines().any(|line| line.contains(word) && line.contains(&id));
    assert!(!said("snapshot.taken"), "it was deleted while it was copied");
    until("the copy ends", || said("snapshot.taken"));
    until("nothing is staged", || fs::read_dir(&staging).unwrap().next().is_none());
    until("nothing is stored", || !object(&stage, &id).exists());
    // Another is taken as ever.
    let next = take(&stage, "disk");
    assert!(object(&stage, &next).exists());
    stage.clear().unwrap();
}
