//! Cloud Hypervisor's part: the VM by arguments, then the requests of `cloud-hypervisor.yaml` that a running VM takes.

use crate::api::{self, Answer, Call};
use crate::{Machine, Role, agent, flag, refuse};
use serde_json::{Value, json};
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::os::fd::FromRawFd as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::{Arc, Mutex};
use tokio::net::UnixListener;

/// The flags that it is given, and the keys that each may have; `None` where the value is no list of keys.
const FLAGS: &[(&str, Option<&[&str]>)] = &[
    ("--api-socket", Some(&["fd", "path"])),
    ("--seccomp", None),
    (
        "--cpus",
        Some(&["boot", "max", "topology", "kvm_hyperv", "max_phys_bits", "affinity", "features", "nested"]),
    ),
    (
        "--memory",
        Some(&[
            "size",
            "mergeable",
            "shared",
            "hugepages",
            "hugepage_size",
            "hotplug_method",
            "hotplug_size",
            "hotplugged_size",
            "prefault",
            "reserve",
            "thp",
        ]),
    ),
    ("--kernel", None),
    ("--initramfs", None),
    ("--cmdline", None),
    (
        "--net",
        Some(&[
            "tap",
            "ip",
            "mask",
            "mac",
            "fd",
            "iommu",
            "num_queues",
            "queue_size",
            "id",
            "mtu",
            "host_mac",
        ]),
    ),
    ("--rng", Some(&["src", "iommu"])),
    ("--vsock", Some(&["cid", "socket", "iommu", "id"])),
    ("--serial", None),
    ("--console", None),
    ("--event-monitor", Some(&["path", "fd"])),
    ("--log-file", None),
    (
        "--disk",
        Some(&[
            "path",
            "readonly",
            "direct",
            "image_type",
            "num_queues",
            "queue_size",
            "id",
            "serial",
            "sparse",
            "backing_files",
        ]),
    ),
];

pub fn serve(args: &[String]) -> Arc<Machine> {
    let disks = check(args);
    let keys = |name: &str| keys(flag(args, name));
    if flag(args, "--seccomp") != "true" || flag(args, "--console") != "off" {
        refuse("the VMM's own filter is off, or there is a second console");
    }
    if keys("--net")["fd"] != "[3]" || !is_tap(3) {
        refuse("descriptor 3 is not a tap");
    }
    for (file, disk) in &disks {
        if disk.get("image_type").map(String::as_str) != Some("raw") {
            refuse(&format!("{file}: the format would be the guest's choice"));
        }
    }
    let open = |path: &str, write: bool| {
        OpenOptions::new()
            .read(true)
            .write(write)
            .open(path)
            .unwrap_or_else(|e| refuse(&format!("{path}: {e}")))
    };
    let root = open(&disks[0].0, true);
    for path in [disks[1].0.as_str(), flag(args, "--kernel"), flag(args, "--initramfs"), "/dev/urandom"] {
        open(path, false);
    }
    let file = |name: &str| File::create(name).unwrap_or_else(|e| refuse(&format!("{name}: {e}")));
    let machine = Arc::new(Machine {
        role: Role::CloudHypervisor,
        state: Mutex::new("Created"),
        console: Mutex::new(file(flag(args, "--serial").strip_prefix("file=").unwrap())),
        events: Mutex::new(Some(file(&keys("--event-monitor")["path"]))),
        refusals: Mutex::new(crate::wishes::refusals()),
    });
    agent::listen(&keys("--vsock")["socket"], machine.clone());
    // SAFETY: the number is the listening socket that the daemon handed over, and nothing else here owns it.
    let listener = unsafe { StdUnixListener::from_raw_fd(keys("--api-socket")["fd"].parse().unwrap()) };
    listener.set_nonblocking(true).unwrap();
    let served = machine.clone();
    api::serve(UnixListener::from_std(listener).unwrap(), move |call| answer(&call, &served));
    let started = machine.clone();
    tokio::spawn(async move {
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        started.start(&root);
    });
    machine
}

/// Every flag is known, has a value, and only known keys; answers the disks.
fn check(args: &[String]) -> Vec<(String, HashMap<String, String>)> {
    let mut disks = Vec::new();
    let mut current: Option<&(&str, Option<&[&str]>)> = None;
    for arg in args {
        if arg.starts_with("--") {
            current = FLAGS.iter().find(|(name, _)| name == arg);
            if current.is_none() {
                refuse(&format!("unknown argument {arg}"));
            }
            continue;
        }
        let Some((name, known)) = current else { refuse(&format!("a value without a flag: {arg}")) };
        if let Some(known) = known {
            let keys = keys(arg);
            if let Some(key) = keys.keys().find(|key| !known.contains(&key.as_str())) {
                refuse(&format!("{name} has no key {key}"));
            }
            if *name == "--disk" {
                disks.push((keys["path"].clone(), keys));
            }
        }
    }
    if disks.len() != 2 {
        refuse("it takes a root disk and a seed");
    }
    disks
}

fn keys(value: &str) -> HashMap<String, String> {
    let pair = |part: &str| {
        let (key, value) =
            part.split_once('=').unwrap_or_else(|| refuse(&format!("`{part}` is not key=value")));
        (key.to_owned(), value.to_owned())
    };
    value.split(',').map(pair).collect()
}

fn is_tap(number: i32) -> bool {
    // SAFETY: only looked at, and never closed: the VMM keeps it for its guest.
    let file = std::mem::ManuallyDrop::new(unsafe { File::from_raw_fd(number) });
    file.metadata().is_ok_and(|data| {
        data.file_type().is_char_device()
            && (nix::sys::stat::major(data.rdev()), nix::sys::stat::minor(data.rdev())) == (10, 200)
    })
}

fn answer(call: &Call, machine: &Machine) -> Answer {
    let mut state = machine.state.lock().unwrap();
    if call.body != Value::Null {
        return Err("this request has no body".into());
    }
    match (call.method.as_str(), call.path.as_str(), *state) {
        ("GET", "/api/v1/vm.info", now) => return Ok(Some(json!({"config": {"payload": {}}, "state": now}))),
        ("GET", "/api/v1/vmm.ping", _) => return Ok(Some(json!({"version": "0-simulated"}))),
        ("PUT", "/api/v1/vm.pause", "Running") => *state = "Paused",
        ("PUT", "/api/v1/vm.resume", "Paused") => {
            machine.refuses()?;
            *state = "Running";
        }
        ("PUT", "/api/v1/vm.power-button", "Running") => {
            drop(state);
            machine.power_off();
        }
        (method, path, state) => return Err(format!("{method} {path} is not possible: {state}")),
    }
    Ok(None)
}
