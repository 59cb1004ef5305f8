//! A VM does not start without the limits that its host offers. The control groups are the kernel's, which is told to make no more.
#![allow(missing_docs, dead_code, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
mod subject;

use common::World;
use std::path::{Path, PathBuf};
use tapgate_model::VmId;
use tapgate_vmm::accel::Accel;
use tapgate_vmm::cgroup::{Cgroup, Demand};
use tapgate_vmm::{ApiDriver, ApiKind, QemuDriver, VmSpec, Vmm};

const SLOT: u32 = 46;

pub fn fresh() -> VmId {
    VmId::generate()
}

/// A group of this host's below which there can be no other.
struct Full(PathBuf);

impl Full {
    fn make() -> Option<Self> {
        let full = Self(Cgroup::root()?.join(format!("tapgate-test-{}", std::process::id())));
        std::fs::create_dir(&full.0).unwrap();
        std::fs::write(full.0.join("cgroup.max.descendants"), "0").unwrap();
        Some(full)
    }
}

impl Drop for Full {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

fn qemu(cgroups: Option<&Path>, demand: Demand) -> Box<dyn Vmm> {
    let cgroups = cgroups.map(Path::to_owned);
    Box::new(QemuDriver { cgroups, demand, ..QemuDriver::new(Accel::Tcg) })
}

fn simulated(cgroups: Option<&Path>, demand: Demand) -> Box<dyn Vmm> {
    let program = env!("CARGO_BIN_EXE_tapgate-vmm-sim").into();
    let driver = ApiDriver::new(ApiKind::CloudHypervisor, program);
    Box::new(ApiDriver { cgroups: cgroups.map(Path::to_owned), demand, ..driver })
}

/// A VM whose image nothing could boot: it does not come to that.
fn spec(world: &World) -> VmSpec {
    let image = common::stand_in(&world.dir.path().join("image"));
    let disk_bytes = 32 << 20;
    VmSpec { image: Some(image), disk_bytes, ..world.spec_without_image(&fresh(), SLOT, Vec::new()) }
}

fn running() -> usize {
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let of_it = |entry: &std::fs::DirEntry| {
        entry
            .metadata()
            .is_ok_and(|data| std::os::unix::fs::MetadataExt::uid(&data) == tapgate_vmm::uid_of(SLOT))
    };
    entries.filter(of_it).count()
}

#[test]
fn a_vm_does_not_start_without_its_control_group() {
    World::run(|world| async move {
        let Some(full) = Full::make() else {
            eprintln!("SKIPPED: this host has no control groups of version 2 that can be written");
            return;
        };
        let datapath = world.datapath().await;
        // Offers what nothing below it has.
        let idle = world.dir.path().join("idle");
        std::fs::create_dir(&idle).unwrap();
        std::fs::write(idle.join("cgroup.controllers"), "cpu memory pids").unwrap();
        let (full, idle) = (Some(full.0.as_path()), Some(idle.as_path()));
        let cases = [
            (full, Demand::Offered, "control group below"),
            (full, Demand::Required, "control group below"),
            (idle, Demand::Offered, "memory.max"),
            (None, Demand::Required, "delegates no control groups"),
        ];
        for (cgroups, demand, why) in cases {
            for driver in [qemu(cgroups, demand), simulated(cgroups, demand)] {
                let spec = spec(&world);
                let gate = common::gate(&datapath, &spec).await;
                let Err(error) = driver.boot(&spec, gate).await else {
                    panic!("{} starts it without {why}", driver.name());
                };
                let error = error.to_string();
                assert!(error.contains(why) && error.contains("cgroup_limits"), "{error}");
                assert_eq!(running(), 0, "a process is left");
                assert!(!spec.dir.join("vmm.json").exists());
                datapath.detach(spec.net).await.unwrap();
            }
        }

        // Whoever asks for it has it.
        for (cgroups, demand) in [(full, Demand::BestEffort), (None, Demand::Offered)] {
            let spec = spec(&world);
            let gate = common::gate(&datapath, &spec).await;
            let machine = simulated(cgroups, demand).boot(&spec, gate).await.unwrap();
            assert!(machine.handle().notes.contains(&"no control group".to_owned()));
            machine.kill().await.unwrap();
            datapath.detach(spec.net).await.unwrap();
        }
    });
}
