//! A host that is full says so, and has room again when something went.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{PUBLIC_KEY, TestApp, no_limits};
use serde_json::json;
use tapgate::Settings;
use tapgate::capacity::{Room, Share};
use tapgate_model::{SnapshotId, StatusDetail as S};
use tapgate_store::{Resources, SnapshotStatus, StoredSnapshot};

const ALL: Share =
    Share { memory_reserve_mib: 0, memory_overcommit: 1.0, disk_reserve: 0, disk_overcommit: 1000.0 };

fn app(share: Share) -> TestApp {
    TestApp::with(Settings {
        room: Room::of_host(share, "/".into(), true),
        rates: no_limits(),
        start_wait: std::time::Duration::ZERO,
        ..Settings::default()
    })
}

#[tokio::test]
async fn memory_is_given_once_and_again_when_a_vm_has_stopped() {
    let total = Room::of_host(ALL, "/".into(), true).capacity().memory_mib;
    // Room for one VM of 256 MiB with what its VMM takes, not for two.
    let app = app(Share { memory_reserve_mib: total - 500, ..ALL });
    let key = app.user("alice@example.com").await;
    let body = |name: &str, mib: u32| json!({ "name": name, "public_key": PUBLIC_KEY, "memory_mib": mib });
    assert_eq!(app.post(&key, "/v1/vms", body("large", 512)).await.error(503), "host_memory_full");
    let one = app.post(&key, "/v1/vms", body("one", 256)).await.is(201)["id"].as_str().unwrap().to_owned();
    let full = app.post(&key, "/v1/vms", body("two", 256)).await;
    assert_eq!(full.headers["retry-after"], "30");
    assert!(full.body["error"]["message"].as_str().unwrap().contains("MiB"), "{}", full.body);
    assert_eq!(full.error(503), "host_memory_full");
    let agent = json!({ "name": "a", "repo": "o/r", "prompt": "p", "memory_mib": 256 });
    assert_eq!(app.post(&key, "/v1/agents", agent).await.error(503), "host_memory_full");

    app.make_ready(&one).await;
    app.call(&key, "POST", &format!("/v1/vms/{one}/stop"), None).await.is(200);
    app.advance(&one, S::Stopped).await;
    let two = app.post(&key, "/v1/vms", body("two", 256)).await.is(201)["id"].as_str().unwrap().to_owned();
    assert_eq!(
        app.call(&key, "POST", &format!("/v1/vms/{one}/start"), None).await.error(503),
        "host_memory_full"
    );
    app.advance(&two, S::Failed).await;
    app.call(&key, "POST", &format!("/v1/vms/{one}/start"), None).await.is(200);
}

#[tokio::test]
async fn disk_is_given_as_often_as_the_operator_allows() {
    let body = json!({ "name": "vm", "public_key": PUBLIC_KEY, "memory_mib": 128, "disk_gib": 512 });
    let small = app(Share { disk_overcommit: 0.0001, ..ALL });
    let token = small.user("alice@example.com").await;
    assert_eq!(small.post(&token, "/v1/vms", body.clone()).await.error(503), "host_disk_full");
    let reserved = app(Share { disk_reserve: u64::MAX / 2, ..ALL });
    let token = reserved.user("alice@example.com").await;
    assert_eq!(reserved.post(&token, "/v1/vms", body).await.error(503), "host_disk_full");
}

#[tokio::test]
async fn no_copy_and_no_memory_is_written_into_the_disks_reserve() {
    let free = nix::sys::statvfs::statvfs("/").unwrap();
    let free = free.blocks_available() * free.fragment_size();
    // What is free beyond the reserve is less than the memory, and more than nothing.
    let app = app(Share { disk_reserve: free - (300 << 20), ..ALL });
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    app.make_ready(&vm).await;
    let full = app.call(&key, "POST", &format!("/v1/vms/{vm}/suspend"), None).await;
    assert_eq!(full.headers["retry-after"], "30");
    assert_eq!(full.error(503), "host_disk_full");
    let of_vm = format!("/v1/vms/{vm}/snapshots");
    assert_eq!(app.post(&key, &of_vm, json!({ "kind": "memory" })).await.error(503), "host_disk_full");
    app.post(&key, &of_vm, json!({})).await.is(201);
    assert_eq!(app.get(&key, &format!("/v1/vms/{vm}")).await.is(200)["status"], "running");
}

/// What it takes is known by where the disk has data: one octet in each cluster of a copy is as much as all.
#[tokio::test]
async fn a_snapshot_for_whose_copy_there_is_no_room_is_refused() {
    use std::os::unix::fs::FileExt as _;
    let folder = tempfile::tempdir().unwrap();
    let stat = nix::sys::statvfs::statvfs(folder.path()).unwrap();
    let free = stat.blocks_available() * stat.fragment_size();
    let share = Share { disk_reserve: free - (1 << 30), ..ALL };
    let app = TestApp::with(Settings {
        room: Room::of_host(share, folder.path().into(), true),
        rates: no_limits(),
        ..Settings::default()
    });
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    app.make_ready(&vm).await;
    let dir = folder.path().join("vms").join(&vm);
    std::fs::create_dir_all(&dir).unwrap();
    let disk = std::fs::File::create(dir.join("disk.raw")).unwrap();
    disk.set_len(8 << 30).unwrap();
    let of_vm = format!("/v1/vms/{vm}/snapshots");
    app.post(&key, &of_vm, json!({})).await.is(201);
    for at in 0..16_384 {
        disk.write_all_at(&[7], at << 17).unwrap();
    }
    let full = app.post(&key, &of_vm, json!({})).await;
    assert_eq!(full.headers["retry-after"], "30");
    assert_eq!(full.error(503), "host_disk_full");
    assert_eq!(app.get(&key, &format!("/v1/vms/{vm}")).await.is(200)["status"], "running");
}

#[tokio::test]
async fn a_vm_from_a_snapshot_needs_the_room_that_its_disk_takes_at_once() {
    let app = app(ALL);
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    app.make_ready(&vm).await;
    let large = snapshot_of(&app, &key, &vm, 1 << 50).await;
    let small = snapshot(&app, &key, &vm).await;
    let body = |name: &str, of: &str| json!({ "name": name, "public_key": PUBLIC_KEY, "memory_mib": 128, "snapshot_id": of });
    assert_eq!(app.post(&key, "/v1/vms", body("large", &large)).await.error(503), "host_disk_full");
    let agent = json!({ "name": "a", "repo": "o/r", "prompt": "p", "memory_mib": 128, "snapshot_id": large });
    assert_eq!(app.post(&key, "/v1/agents", agent).await.error(503), "host_disk_full");
    app.post(&key, "/v1/vms", body("small", &small)).await.is(201);
}

#[tokio::test]
async fn a_vm_from_a_snapshot_takes_the_disk_that_the_snapshot_has() {
    let total = Room::of_host(ALL, "/".into(), true).capacity().disk_bytes / 1000;
    // Room for about two and a half disks of 512 GiB.
    let share = Share { disk_overcommit: (1300u64 << 30) as f64 / total as f64, ..ALL };
    let room = Room::of_host(share.clone(), "/".into(), true);
    let app = app(share);
    let key = app.user("alice@example.com").await;
    let create = async |name: &str, more: serde_json::Value| {
        let mut body = json!({ "name": name, "public_key": PUBLIC_KEY, "memory_mib": 128 });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        app.post(&key, "/v1/vms", body).await
    };
    let id = |answer: common::Answer| answer.is(201)["id"].as_str().unwrap().to_owned();
    let large = id(create("large", json!({ "disk_gib": 512 })).await);
    app.make_ready(&large).await;
    let snapshot = snapshot(&app, &key, &large).await;
    app.call(&key, "POST", &format!("/v1/vms/{large}/stop"), None).await.is(200);
    app.advance(&large, S::Stopped).await;
    app.call(&key, "DELETE", &format!("/v1/vms/{large}"), None).await.is(204);
    app.advance(&large, S::Destroyed).await;
    assert!(room.capacity().disk_bytes >> 30 < 3 * 512, "the test's host is as large as it is meant to be");

    // Smaller than it is, it cannot be had.
    let small = create("small", json!({ "snapshot_id": snapshot, "disk_gib": 1 })).await;
    assert!(small.body["error"]["message"].as_str().unwrap().contains("512"), "{}", small.body);
    assert_eq!(small.error(422), "validation_error");
    let agent =
        json!({ "name": "a", "repo": "o/r", "prompt": "p", "memory_mib": 128, "snapshot_id": snapshot });
    let mut small = agent.clone();
    small["disk_gib"] = json!(1);
    assert_eq!(app.post(&key, "/v1/agents", small).await.error(422), "validation_error");

    // Without a word of its size it is as large, and counted so.
    for name in ["one", "two"] {
        let vm = id(create(name, json!({ "snapshot_id": snapshot })).await);
        let record = app.store.vm_any(&vm.parse().unwrap()).await.unwrap();
        assert_eq!(record.resources.disk_bytes, 512 << 30);
    }
    assert_eq!(create("three", json!({ "snapshot_id": snapshot })).await.error(503), "host_disk_full");
    assert_eq!(app.post(&key, "/v1/agents", agent).await.error(503), "host_disk_full");
    let same = create("same", json!({ "snapshot_id": snapshot, "disk_gib": 512 })).await;
    assert_eq!(same.error(503), "host_disk_full");
}

#[tokio::test]
async fn a_snapshot_that_is_larger_than_a_vm_may_be_is_refused() {
    let of = |max_gib: u64| {
        let settings = Settings { rates: no_limits(), ..Settings::default() };
        let max_resources = Resources { disk_bytes: max_gib << 30, ..settings.max_resources };
        Settings { max_resources, ..settings }
    };
    let app = TestApp::with(of(64));
    let key = app.user("alice@example.com").await;
    let body = json!({ "name": "a", "public_key": PUBLIC_KEY, "disk_gib": 64 });
    let vm = app.post(&key, "/v1/vms", body).await.is(201)["id"].as_str().unwrap().to_owned();
    app.make_ready(&vm).await;
    let snapshot = snapshot(&app, &key, &vm).await;
    let body = json!({ "name": "b", "public_key": PUBLIC_KEY, "snapshot_id": snapshot });
    let app = app.again(of(32));
    let refused = app.post(&key, "/v1/vms", body).await;
    assert!(refused.body["error"]["message"].as_str().unwrap().contains("at most 32"), "{}", refused.body);
    assert_eq!(refused.error(422), "validation_error");
}

/// One that is ready, as the engine would make it.
async fn snapshot(app: &TestApp, key: &str, vm: &str) -> String {
    snapshot_of(app, key, vm, 1).await
}

/// The same with a disk whose file has so many octets.
async fn snapshot_of(app: &TestApp, key: &str, vm: &str, file_bytes: u64) -> String {
    let made = app.post(key, &format!("/v1/vms/{vm}/snapshots"), json!({})).await.is(201);
    let id = made["data"]["id"].as_str().unwrap().to_owned();
    let snapshot: SnapshotId = id.parse().unwrap();
    app.store.snapshot_advance(&snapshot, SnapshotStatus::Uploading, None).await.unwrap();
    let stored = StoredSnapshot {
        key: format!("snapshots/{id}"),
        size_bytes: 1,
        sha256: "00".into(),
        file_bytes,
        memory: None,
    };
    app.store.snapshot_stored(&snapshot, stored).await.unwrap();
    id
}
