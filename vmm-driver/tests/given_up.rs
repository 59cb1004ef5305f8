//! A start that takes too long is given up: what it began ends before the next begins, and it leaves nothing that runs. The VMM is
//! the simulated one; the converter of snapshots is the real one, held by a signal.
#![allow(missing_docs, dead_code, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
mod subject;

use common::{PATIENCE, World};
use std::future::Future;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;
use subject::Subject;
use tapgate_model::VmId;
use tapgate_vmm::{ApiKind, VmSpec, Vmm as _};

/// Takes some seconds to unpack, and no space as it is.
const DISK: u64 = 1 << 30;
const FOLDER: &str = "TAPGATE_TEST_GIVEN_UP";
const SLOT: u32 = 43;

pub fn fresh() -> VmId {
    VmId::generate()
}

/// A snapshot full of a pattern, packed.
fn snapshot(dir: &Path) -> PathBuf {
    let (loose, packed) = (dir.join("loose.qcow2"), dir.join("snapshot.qcow2"));
    let run = |program: &str, words: &[&str]| {
        let done = Command::new(program).args(words).stdout(Stdio::null()).status().unwrap();
        assert!(done.success(), "{program} {words:?}");
    };
    let (from, to) = (loose.to_str().unwrap(), packed.to_str().unwrap());
    run("qemu-img", &["create", "-q", "-f", "qcow2", from, &DISK.to_string()]);
    run("qemu-io", &["-f", "qcow2", "-c", "write -P 0x5a 0 512M", "-c", "write -P 0xa5 512M 511M", from]);
    run("qemu-img", &["convert", "-c", "-f", "qcow2", "-O", "qcow2", from, to]);
    std::fs::remove_file(&loose).unwrap();
    packed
}

/// What runs as the VM's user; under this name if one is given.
fn running(slot: u32, name: Option<&str>) -> Vec<i32> {
    let uid = tapgate_vmm::uid_of(slot);
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|meta| meta.uid() == uid))
        .filter(|pid| {
            let comm = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            name.is_none_or(|name| comm.trim() == name)
        })
        .collect()
}

/// Ends with the test what it leaves of the VM's processes; one that is held would stay for ever.
struct Leave(u32);

impl Drop for Leave {
    fn drop(&mut self) {
        for pid in running(self.0, None) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

/// Waits for a converter and holds it.
async fn held(slot: u32) -> i32 {
    let found = async {
        loop {
            if let Some(pid) = running(slot, Some("qemu-img")).first() {
                subject::signal(*pid, libc::SIGSTOP);
                return *pid;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    tokio::time::timeout(PATIENCE, found).await.expect("it converts")
}

/// Lets it begin to convert, holds the converter, and gives up.
async fn given_up<T>(work: impl Future<Output = T>, slot: u32) {
    tokio::select! {
        _ = work => panic!("it was not held"),
        _ = held(slot) => {}
    }
}

/// Counts converters until it is told to stop: the most that were there at once.
fn most(slot: u32, stop: Arc<AtomicBool>) -> std::thread::JoinHandle<usize> {
    let most = AtomicUsize::new(0);
    std::thread::spawn(move || {
        while !stop.load(Ordering::Acquire) {
            most.fetch_max(running(slot, Some("qemu-img")).len(), Ordering::AcqRel);
            std::thread::sleep(Duration::from_millis(1));
        }
        most.into_inner()
    })
}

#[test]
fn a_start_that_was_given_up_has_ended_before_the_next_begins() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let subject = Subject::simulated(&world, ApiKind::CloudHypervisor);
        let file = snapshot(world.dir.path());
        let slot = 42;
        let _leave = Leave(slot);
        let spec = subject.spec(&world, slot, Vec::new());
        let spec = VmSpec { snapshot: Some(file.clone()), disk_bytes: DISK, ..spec };
        let stop = Arc::new(AtomicBool::new(false));
        let counter = most(slot, stop.clone());

        // While its disk is made.
        let gate = common::gate(&datapath, &spec).await;
        given_up(subject.driver().boot(&spec, gate), slot).await;
        subject.driver().sweep(&spec.place()).await.unwrap();
        datapath.detach(spec.net).await.unwrap();
        assert_eq!(running(slot, None), Vec::<i32>::new(), "what a start began that was given up");
        assert!(!spec.dir.join("disk.raw").exists());

        // The next one does not even have to wait to be asked.
        given_up(subject.driver().prepare(&spec), slot).await;
        let converted = async { subject.driver().prepare(&spec).await.unwrap() };
        tokio::time::timeout(PATIENCE, converted).await.unwrap();
        stop.store(true, Ordering::Release);
        assert_eq!(counter.join().unwrap(), 1, "converters at a time");
        let disk = spec.dir.join("disk.raw");
        let mut compare = Command::new("qemu-img");
        compare.args(["compare", "-f", "qcow2", "-F", "raw"]).args([&file, &disk]).stdout(Stdio::null());
        assert!(compare.status().unwrap().success(), "the disk is not what the snapshot is");
        assert!(!spec.dir.join("disk.new").exists(), "a half is left");

        // While its VMM is started.
        for _ in 0..5 {
            let gate = common::gate(&datapath, &spec).await;
            tokio::select! {
                biased;
                _ = subject.driver().boot(&spec, gate) => panic!("it was not given up"),
                () = std::future::ready(()) => {}
            }
            subject.driver().sweep(&spec.place()).await.unwrap();
            datapath.detach(spec.net).await.unwrap();
            tokio::time::sleep(Duration::from_millis(200)).await;
            assert_eq!(running(slot, None), Vec::<i32>::new(), "a VMM that nobody holds");
            assert!(!spec.dir.join("vmm.json").exists());
        }
        let gate = common::gate(&datapath, &spec).await;
        let machine = subject.driver().boot(&spec, gate).await.unwrap();
        let _reap = common::Reap::of(machine.handle().process.pid);
        machine.kill().await.unwrap();
        datapath.detach(spec.net).await.unwrap();
    });
}

/// Converts as the test beside it wants, until it is killed.
#[test]
fn a_daemon_that_converts() {
    let Some(dir) = std::env::var_os(FOLDER) else { return };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let (driver, spec) = of(Path::new(&dir));
    runtime.block_on(driver.prepare(&spec)).unwrap();
}

fn of(dir: &Path) -> (tapgate_vmm::ApiDriver, VmSpec) {
    let program = env!("CARGO_BIN_EXE_tapgate-vmm-sim").into();
    let driver = tapgate_vmm::ApiDriver::new(ApiKind::CloudHypervisor, program);
    let id = VmId::generate();
    let net = common::net(SLOT);
    let seed = tapgate_vmm::Seed {
        instance_id: id.to_string(),
        hostname: "vm".into(),
        ssh_keys: Vec::new(),
        net,
        ca_pem: String::new(),
        env: Vec::new(),
    };
    let spec = VmSpec {
        id,
        dir: dir.join("vm"),
        image: Some(common::stand_in(&dir.join("image"))),
        vcpus: 1,
        memory_mib: 128,
        disk_bytes: DISK,
        net,
        seed,
        snapshot: Some(dir.join("snapshot.qcow2")),
        resume: tapgate_vmm::Resume::Never,
        guest_ns: None,
    };
    (driver, spec)
}

#[test]
fn a_converter_does_not_outlive_its_daemon() {
    let dir = tempfile::tempdir().unwrap();
    snapshot(dir.path());
    let mut daemon = Command::new(std::env::current_exe().unwrap());
    daemon.args(["--exact", "a_daemon_that_converts"]).env(FOLDER, dir.path());
    let mut daemon = daemon.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let _leave = Leave(SLOT);
        let converter = held(SLOT).await;
        daemon.kill().unwrap();
        daemon.wait().unwrap();
        let ends = async {
            while running(SLOT, None).contains(&converter) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), ends).await.expect("it ends with the daemon");
    });
}
