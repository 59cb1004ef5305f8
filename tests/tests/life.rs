//! The life of a real VM through the API: stop and start, snapshot and what comes of it, with the gate checked each time.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{thread, time::Duration};
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
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

fn snapshot(stage: &Stage<'_>, vm: &str) -> String {
    let made = stage.api().post(&format!("/v1/vms/{vm}/snapshots"), &json!({"label": "test"})).unwrap();
    let made = made.expect(201).unwrap()["data"].clone();
    assert_eq!(made["status"], "pending");
    let id = made["id"].as_str().unwrap().to_owned();
    let mut last = Value::Null;
    for _ in 0..TRIES {
        last = stage.api().get(&format!("/v1/snapshots/{id}")).unwrap().expect(200).unwrap()["data"].clone();
        match last["status"].as_str() {
            Some("ready") => {
                assert!(last["size_bytes"].as_u64().is_some_and(|size| size > 0), "{last}");
                assert_eq!(last["r2_key"], format!("snapshots/{id}.qcow2"));
                return id;
            }
            Some("failed") => break,
            _ => thread::sleep(Duration::from_millis(100)),
        }
    }
    panic!("the snapshot never became ready: {last}");
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
    let images = "/var/cache/tapgate/images".into();
    let settings = Settings { binary: daemon::binary().unwrap(), driver: Driver::Qemu, images };
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("first").unwrap();
    let first = stage.vm().unwrap().to_owned();
    held(&stage);
    stage.guest().unwrap().expect("echo kept > /root/file; sync").unwrap();

    stage.restart().unwrap();
    held(&stage);
    assert_eq!(stage.guest().unwrap().expect("cat /root/file").unwrap().trim(), "kept");

    stage.guest().unwrap().expect("echo just-written > /root/late").unwrap();
    let id = snapshot(&stage, &first);
    let original = identity(&stage);
    let body = json!({"name": "second", "public_key": ssh::key(&world).unwrap(), "snapshot_id": id});
    let second = stage.api().post("/v1/vms", &body).unwrap().expect(201).unwrap();
    let second = second["id"].as_str().unwrap().to_owned();
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

    for vm in [&first, &second] {
        stage.api().post(&format!("/v1/vms/{vm}/stop"), &json!({})).unwrap().expect(200).unwrap();
        stage.api().wait_for(vm, "stopped").unwrap();
        stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().expect(204).unwrap();
        stage.api().wait_for(vm, "destroyed").unwrap();
    }
    stage.api().delete(&format!("/v1/snapshots/{id}")).unwrap().expect(204).unwrap();
}
