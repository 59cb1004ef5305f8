//! A host that is full says so, and has room again when something went.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{PUBLIC_KEY, TestApp, no_limits};
use serde_json::json;
use tapgate::Settings;
use tapgate::capacity::{Room, Share};
use tapgate_model::StatusDetail as S;

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
