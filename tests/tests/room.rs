//! A host whose disk is small: ten snapshots at once, and VMs made of one of them, leave its reserve alone, and everybody else is
//! served. With real guests.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use nix::mount::{MsFlags, mount};
use serde_json::{Value, json};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    ssh,
};

const RESERVE: u64 = 1 << 30;
/// How often the disk is given away is not what is tried.
const LINES: &str = "disk_reserve_gib = 1\nmemory_mib = 256\ndisk_gib = 2\ndisk_overcommit = 100.0\n";
/// How many times a state is looked at, ten times a second.
const TRIES: usize = 1800;

/// A disk in memory, which the world's reaper takes away with all that is on it.
struct Disk(PathBuf);

impl Disk {
    fn mount(folder: PathBuf, mib: u64) -> Self {
        fs::create_dir_all(&folder).unwrap();
        let size = format!("size={mib}m,mode=0711");
        mount(Some("tmpfs"), &folder, Some("tmpfs"), MsFlags::empty(), Some(size.as_str())).unwrap();
        Self(folder)
    }
}

fn free(folder: &Path) -> u64 {
    let stat = nix::sys::statvfs::statvfs(folder).unwrap();
    stat.blocks_available() * stat.fragment_size()
}

/// The least that was free while something was done.
fn least_free(folder: &Path, done: impl FnOnce()) -> u64 {
    let (least, over) = (AtomicU64::new(u64::MAX), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::SeqCst) {
                least.fetch_min(free(folder), Ordering::SeqCst);
                thread::sleep(Duration::from_millis(5));
            }
        });
        let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(done));
        over.store(true, Ordering::SeqCst);
        if let Err(panic) = done {
            std::panic::resume_unwind(panic);
        }
    });
    least.into_inner()
}

/// Asks until each has one of the states; another account's writes are answered all the while.
fn all_become(stage: &Stage<'_>, paths: &[String], field: &str, wanted: &[&str]) -> Vec<Value> {
    let other = stage.daemon().client().sign_up(&format!("other{field}")).unwrap();
    for _ in 0..TRIES {
        other.put("/v1/env/K", &json!({ "value": "v" })).unwrap().expect(200).unwrap();
        let now: Vec<Value> = paths
            .iter()
            .map(|path| {
                let body = stage.api().get(path).unwrap().expect(200).unwrap();
                body.get("data").unwrap_or(&body).clone()
            })
            .collect();
        if now.iter().all(|one| wanted.iter().any(|word| one[field] == *word)) {
            return now;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("they do not become {wanted:?}\n{}", stage.daemon().log());
}

#[test]
fn real_vm_ten_snapshots_and_what_is_made_of_them_leave_the_reserve() {
    let world = World::new().unwrap();
    // Room for two or three copies beside what is stored of them.
    let disk = Disk::mount(world.folder().join("data"), (RESERVE >> 20) + 1500);
    let settings = Settings::of(Driver::Qemu).unwrap();
    let daemon = Daemon::start_with(&world, settings, LINES, &[]).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("parent").unwrap();
    let vm = stage.vm().unwrap().to_owned();

    let mut snapshots = Vec::new();
    let least = least_free(&disk.0, || {
        let mut paths = Vec::new();
        for _ in 0..10 {
            let made = stage.api().post(&format!("/v1/vms/{vm}/snapshots"), &json!({})).unwrap();
            // One that comes late may be refused at once.
            if made.status == 201 {
                paths.push(format!("/v1/snapshots/{}", made.body["data"]["id"].as_str().unwrap()));
            } else {
                assert_eq!(made.body["error"]["code"], "host_disk_full", "{made:?}");
            }
        }
        snapshots = all_become(&stage, &paths, "status", &["ready", "failed"]);
    });
    println!("{} MiB were free above the reserve at the least", (least as i64 - RESERVE as i64) >> 20);
    for one in &snapshots {
        println!("{} {} {}", one["status"], one["size_bytes"], one["failure_reason"]);
    }
    assert!(least >= RESERVE, "{} MiB of the reserve were taken", (RESERVE - least) >> 20);
    let (ready, failed): (Vec<&Value>, Vec<&Value>) =
        snapshots.iter().partition(|one| one["status"] == "ready");
    assert!(!ready.is_empty() && !failed.is_empty(), "some have room, and not all");
    for one in failed {
        let reason = one["failure_reason"].as_str().unwrap();
        assert!(reason.contains("no room for it: needs") && reason.contains("above the reserve"), "{reason}");
    }
    let now = stage.api().get(&format!("/v1/vms/{vm}")).unwrap().expect(200).unwrap();
    assert_eq!(now["status_detail"], "ready", "the VM is none the worse for it");
    assert_eq!(stage.sh("echo here").unwrap().out.trim(), "here");

    // Room for two disks or so, and for none of the others.
    for one in &ready[1..] {
        let path = format!("/v1/snapshots/{}", one["id"].as_str().unwrap());
        stage.api().delete(&path).unwrap().expect(204).unwrap();
    }
    let key = ssh::key(&world).unwrap();
    let least = least_free(&disk.0, || {
        let mut paths = Vec::new();
        for n in 0..8 {
            let body = json!({"name": format!("clone-{n}"), "public_key": key, "memory_mib": 256, "snapshot_id": ready[0]["id"]});
            let made = stage.api().post("/v1/vms", &body).unwrap();
            match made.status {
                201 => paths.push(format!("/v1/vms/{}", made.body["id"].as_str().unwrap())),
                _ => assert_eq!(made.body["error"]["code"], "host_disk_full", "{made:?}"),
            }
        }
        let vms = all_become(&stage, &paths, "status_detail", &["ready", "failed"]);
        for vm in &vms {
            println!("{} {}", vm["status_detail"], vm["failure_reason"]);
        }
        assert!(vms.iter().any(|vm| vm["status_detail"] == "ready"), "one has room");
        assert!(vms.len() < 8 || vms.iter().any(|vm| vm["status_detail"] == "failed"), "not all have");
        for vm in vms.iter().filter(|vm| vm["status_detail"] == "failed") {
            let reason = vm["failure_reason"].as_str().unwrap();
            assert!(reason.contains("no room for it: needs"), "{reason}");
        }
    });
    // Guests that boot write to their disks, as they do without a snapshot: that is not what is promised.
    println!("{} MiB were free above the reserve at the least", (least as i64 - RESERVE as i64) >> 20);
    assert!(least >= RESERVE, "{} MiB of the reserve were taken", (RESERVE - least) >> 20);
    assert_eq!(stage.sh("echo here").unwrap().out.trim(), "here");
}
