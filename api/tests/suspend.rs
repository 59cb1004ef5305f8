//! What the API says of suspension and of snapshots with memory: extensions, which change nothing of what the contract has.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]
#![allow(missing_docs, reason = "tests")]

mod common;

use common::{PUBLIC_KEY, TestApp, keys, no_limits};
use serde_json::json;
use tapgate::Settings;
use tapgate_model::VmId;

const CONTRACT: [&str; 6] = ["created_at", "id", "name", "status", "status_detail", "updated_at"];

#[tokio::test]
async fn a_suspended_vm_is_stopped_and_says_that_it_is_suspended() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    let (path, suspend) = (format!("/v1/vms/{vm}"), format!("/v1/vms/{vm}/suspend"));
    assert_eq!(app.call(&key, "POST", &suspend, None).await.error(409), "vm_not_running");
    app.make_ready(&vm).await;
    let bob = app.user("bob@example.com").await;
    assert_eq!(app.call(&bob, "POST", &suspend, None).await.error(404), "vm_not_found");
    let answer = app.call(&key, "POST", &suspend, None).await.is(200);
    assert_eq!((&answer["status"], &answer["status_detail"]), (&json!("stopped"), &json!("stopping")));
    assert_eq!(keys(&answer), CONTRACT);
    for call in ["suspend", "stop"] {
        let path = format!("/v1/vms/{vm}/{call}");
        assert_eq!(app.call(&key, "POST", &path, None).await.error(409), "vm_not_running");
    }
    assert_eq!(app.call(&key, "POST", &format!("{path}/start"), None).await.error(409), "vm_stopping");

    // It cannot be done: the VM runs on and says why, until it is asked for again.
    let id: VmId = vm.parse().unwrap();
    app.store.vm_not_suspended(&id, "the disk is full".into()).await.unwrap();
    let running = app.get(&key, &path).await.is(200);
    assert_eq!(
        (&running["status"], &running["suspend_failure"]),
        (&json!("running"), &json!("the disk is full"))
    );
    let answer = app.call(&key, "POST", &suspend, None).await.is(200);
    assert_eq!(keys(&answer), CONTRACT);
    app.store.vm_suspended(&id).await.unwrap();
    let stopped = app.get(&key, &path).await.is(200);
    assert_eq!((&stopped["status_detail"], &stopped["suspended"]), (&json!("stopped"), &json!(true)));
    // What comes late changes nothing.
    app.store.vm_not_suspended(&id, "late".into()).await.unwrap();
    assert_eq!(app.get(&key, &path).await.is(200), stopped);
    app.call(&key, "DELETE", &path, None).await.is(204);
    assert!(app.get(&key, &path).await.is(200)["suspended"].is_null());
}

#[tokio::test]
async fn a_snapshot_with_memory_says_so() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    app.make_ready(&vm).await;
    let of_vm = format!("/v1/vms/{vm}/snapshots");
    for wrong in [json!("ram"), json!(7), json!("")] {
        assert_eq!(app.post(&key, &of_vm, json!({ "kind": wrong })).await.error(422), "validation_error");
    }
    let disk = app.post(&key, &of_vm, json!({ "kind": "disk" })).await.is(201);
    assert!(disk["data"]["kind"].is_null());
    let made =
        app.post(&key, &of_vm, json!({ "kind": "memory", "label": "warm" })).await.is(201)["data"].clone();
    assert_eq!(made["kind"], "memory");
    let listed = app.get(&key, "/v1/snapshots").await.is(200);
    assert_eq!((&listed["data"][0], &listed["data"][1]["kind"]), (&made, &json!(null)));
    // Its machine is the parent's or none, and no agent's.
    let mut from = json!({ "name": "from", "public_key": PUBLIC_KEY, "snapshot_id": made["id"], "vcpus": 3 });
    assert_eq!(app.post(&key, "/v1/vms", from.clone()).await.error(422), "validation_error");
    from["vcpus"] = json!(1);
    assert_eq!(app.post(&key, "/v1/vms", from).await.error(409), "snapshot_not_ready");
    let agent = json!({ "name": "a", "repo": "o/r", "prompt": "p", "snapshot_id": made["id"] });
    assert_eq!(app.post(&key, "/v1/agents", agent).await.error(422), "validation_error");
}

#[tokio::test]
async fn a_driver_that_cannot_keep_memory_says_so() {
    let app = TestApp::with(Settings { keeps_memory: false, rates: no_limits(), ..Settings::default() });
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    app.make_ready(&vm).await;
    let suspend = format!("/v1/vms/{vm}/suspend");
    assert_eq!(app.call(&key, "POST", &suspend, None).await.error(422), "driver_cannot");
    let of_vm = format!("/v1/vms/{vm}/snapshots");
    assert_eq!(app.post(&key, &of_vm, json!({ "kind": "memory" })).await.error(422), "driver_cannot");
    app.post(&key, &of_vm, json!({})).await.is(201);
    assert_eq!(app.get(&key, &format!("/v1/vms/{vm}")).await.is(200)["status_detail"], "ready");
}
