//! A full host: a hundred VMs side by side, as many real ones as its memory allows, and a clear answer to whoever comes after that.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{collections::BTreeSet, thread, time::Duration};
use tapgate_e2e::{
    World,
    api::Client,
    chaos::Chaos,
    daemon::{Daemon, Driver, Settings},
    ssh,
};

/// Callers at a time.
const CALLERS: usize = 4;
/// A guest's memory, and what is added for its VMM (docs/recovery.md).
const GUEST_MIB: u64 = 256;
const OVERHEAD_MIB: u64 = 64;

fn body(key: &str, name: &str) -> Value {
    json!({"name": name, "public_key": key, "memory_mib": GUEST_MIB})
}

/// So many at once, from several callers.
fn create(api: &Client<'_>, key: &str, count: usize) {
    thread::scope(|scope| {
        for caller in 0..CALLERS {
            scope.spawn(move || {
                for n in (caller..count).step_by(CALLERS) {
                    api.post("/v1/vms", &body(key, &format!("vm-{n}"))).unwrap().expect(201).unwrap();
                }
            });
        }
    });
}

/// All that are ready, once there are so many; fails with the first that failed.
fn all_ready(api: &Client<'_>, count: usize) -> Vec<Value> {
    let mut ready = Vec::new();
    for _ in 0..6000 {
        let failed = api.get("/v1/vms?status=failed&limit=1").unwrap().expect(200).unwrap();
        assert_eq!(failed["data"].as_array().unwrap().len(), 0, "{failed}");
        let page = api.get("/v1/vms?status_detail=ready&limit=100").unwrap().expect(200).unwrap();
        ready.clone_from(page["data"].as_array().unwrap());
        if ready.len() >= count {
            return ready;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("only {} of {count} are ready", ready.len());
}

#[test]
fn a_hundred_vms_start_side_by_side_and_the_next_is_refused() {
    const COUNT: usize = 100;
    let world = World::new().unwrap();
    let environment = [("TAPGATE_SSH_PORTS", "22000-22099"), ("TAPGATE_QUOTA_VMS", "1000")];
    let mut daemon =
        Daemon::start_with(&world, Settings::of(Driver::Netns).unwrap(), "", &environment).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let key = ssh::key(&world).unwrap();
    create(&api, &key, COUNT);
    let vms = all_ready(&api, COUNT);
    let ports: BTreeSet<String> = vms
        .iter()
        .map(|vm| {
            let path = format!("/v1/vms/{}/ssh", vm["id"].as_str().unwrap());
            api.get(&path).unwrap().expect(200).unwrap()["port"].to_string()
        })
        .collect();
    assert_eq!(ports.len(), COUNT, "a port of its own for each");
    // Each through its own gate and port.
    for vm in vms.iter().step_by(20) {
        let guest = ssh::Guest::of(&world, &api, vm["id"].as_str().unwrap()).unwrap();
        assert_eq!(guest.expect("echo here").unwrap(), "here");
        guest.hang_up();
    }
    let full = api.post("/v1/vms", &body(&key, "late")).unwrap();
    assert_eq!(full.body["error"]["code"], "host_full", "{:?}", full.body);
    assert_eq!(full.status, 409);
    let first = vms[0]["id"].as_str().unwrap();
    api.post(&format!("/v1/vms/{first}/stop"), &json!({})).unwrap().expect(200).unwrap();
    api.wait_for(first, "stopped").unwrap();
    api.delete(&format!("/v1/vms/{first}")).unwrap().expect(204).unwrap();
    api.wait_for(first, "destroyed").unwrap();
    api.post("/v1/vms", &body(&key, "late")).unwrap().expect(201).unwrap();
    all_ready(&api, COUNT);
    Chaos::new(&world, &mut daemon, api, 1).clear().unwrap();
}

/// Room for two in the ordinary run; in the long one for what is free, at most 24.
#[test]
fn real_vm_as_many_as_memory_allows_and_the_next_is_refused() {
    let long = std::env::var_os("TAPGATE_LONG").is_some();
    let mib = |name: &str| -> u64 {
        let text = std::fs::read_to_string("/proc/meminfo").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse::<u64>().unwrap() / 1024
    };
    let each = GUEST_MIB + OVERHEAD_MIB;
    let count = if long { (mib("MemAvailable:") / 2 / each).clamp(2, 24) } else { 2 };
    // What is left for VMs is enough for these and not for one more.
    let reserve = mib("MemTotal:") - count * each - each / 2;
    let world = World::new().unwrap();
    let lines = format!("memory_reserve_mib = {reserve}\n");
    let mut daemon = Daemon::start_with(&world, Settings::of(Driver::Qemu).unwrap(), &lines, &[]).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let key = ssh::key(&world).unwrap();
    let count = usize::try_from(count).unwrap();
    create(&api, &key, count);
    let refused = || {
        let full = api.post("/v1/vms", &body(&key, "late")).unwrap();
        assert_eq!(full.body["error"]["code"], "host_memory_full", "{:?}", full.body);
        assert_eq!(full.status, 503);
    };
    refused();
    let vms = all_ready(&api, count);
    refused();
    eprintln!("{count} real VMs side by side");
    // One that is stopped makes room, and finds none when another took it.
    let first = vms[0]["id"].as_str().unwrap();
    api.post(&format!("/v1/vms/{first}/stop"), &json!({})).unwrap().expect(200).unwrap();
    api.wait_for(first, "stopped").unwrap();
    api.post("/v1/vms", &body(&key, "late")).unwrap().expect(201).unwrap();
    let start = api.post(&format!("/v1/vms/{first}/start"), &json!({})).unwrap();
    assert_eq!((start.status, &start.body["error"]["code"]), (503, &json!("host_memory_full")));
    Chaos::new(&world, &mut daemon, api, 1).clear().unwrap();
}
