//! One suite for every driver: created, ready, restarted, snapshotted, crashed, started, hung, stopped, cloned, adopted, destroyed,
//! with the gate looked at after each step.
//!
//! QEMU runs real guests here. Firecracker and Cloud Hypervisor run real guests where `TAPGATE_TEST_FIRECRACKER` and
//! `TAPGATE_TEST_CLOUD_HYPERVISOR` name their programs and KVM runs guests; everywhere they run against a simulated VMM
//! that checks every argument and request, in the real view, with the real tap.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod boxed;
mod common;
mod subject;

use common::{PATIENCE, Reap, World};
use std::sync::Arc;
use std::time::Duration;
use subject::Subject;
use tapgate_datapath::Datapath;
use tapgate_model::VmId;
use tapgate_vmm::{ApiKind, Exit, Running, VmSpec, noted_handle};

#[test]
fn real_vm_conformance_of_qemu() {
    World::run(|world| async move { suite(&world, Subject::qemu()).await });
}

/// With KVM: in a host of its own. `TAPGATE_LONG` runs all of it on both kernels, `TAPGATE_TEST_BOX` half of the steps on the newer one.
#[test]
fn real_vm_conformance_of_qemu_with_kvm_in_a_box() {
    if ["TAPGATE_LONG", "TAPGATE_TEST_BOX"].iter().all(|name| std::env::var_os(name).is_none()) {
        eprintln!("SKIPPED: set TAPGATE_LONG, or TAPGATE_TEST_BOX for a short form");
        return;
    }
    for kernel in boxed::kernels() {
        let mut variables = vec![("TAPGATE_TEST_ACCEL", "kvm")];
        if std::env::var_os("TAPGATE_LONG").is_none() {
            variables.push(("TAPGATE_TEST_SHORT", "1"));
        }
        boxed::run(*kernel, "real_vm_conformance_of_qemu", &variables);
    }
}

#[test]
fn real_vm_conformance_of_firecracker() {
    given(ApiKind::Firecracker, "TAPGATE_TEST_FIRECRACKER", "real_vm_conformance_of_firecracker");
}

#[test]
fn real_vm_conformance_of_cloud_hypervisor() {
    let test = "real_vm_conformance_of_cloud_hypervisor";
    given(ApiKind::CloudHypervisor, "TAPGATE_TEST_CLOUD_HYPERVISOR", test);
}

#[test]
fn conformance_of_firecracker_simulated() {
    World::run(|world| async move { suite(&world, Subject::simulated(&world, ApiKind::Firecracker)).await });
}

#[test]
fn conformance_of_cloud_hypervisor_simulated() {
    World::run(
        |world| async move { suite(&world, Subject::simulated(&world, ApiKind::CloudHypervisor)).await },
    );
}

/// Where KVM runs guests: here, else in the box.
fn given(kind: ApiKind, variable: &str, test: &str) {
    let Some(program) = std::env::var_os(variable) else {
        eprintln!("SKIPPED: no real guest under this VMM: {variable} names no program");
        return;
    };
    if boxed::kvm_is_here() {
        return World::run(|world| async move { suite(&world, Subject::given(kind, program.into())).await });
    }
    let program = program.into_string().unwrap();
    for kernel in boxed::kernels() {
        boxed::run(*kernel, test, &[(variable, &program)]);
    }
}

async fn suite(world: &Arc<World>, subject: Subject) {
    let mut datapath = world.datapath().await;
    let outside = subject::Outside::listen();
    let service = common::Service::start(&datapath, "#cloud-config\n{}".into());
    let other = world.dir.path().join("another-vms-disk");
    std::fs::write(&other, "secret").unwrap();
    let careless = std::fs::File::create(world.dir.path().join(subject::INHERITABLE)).unwrap();
    nix::fcntl::fcntl(&careless, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let env = vec![("PROBE".to_owned(), format!("{}:/var/lib/tapgate", other.display()))];
    let spec = subject.spec(world, 10, env);
    let step = |name: &str| eprintln!("--- {} {name}", subject.name());

    step("create, ready");
    let (machine, mut reap) = boot(&subject, &datapath, &spec).await;
    subject.probe(world, &datapath, &spec, &outside);
    subject.confined(&spec, machine.handle().process.pid);
    subject.leave_mark(world, &datapath, &spec);

    // The ordinary run with KVM leaves out what the emulated one has shown.
    let short = std::env::var_os("TAPGATE_TEST_SHORT").is_some();
    if !short {
        step("reboot");
        let mut observed = machine.observed();
        subject.restart(world, &datapath, &spec);
        let rebooted = observed.wait_for(|seen| seen.reboots == 1);
        tokio::time::timeout(PATIENCE, rebooted).await.expect("the restart is seen").unwrap();
        subject.ready(&datapath, &spec, machine.as_ref()).await;
        subject.probe(world, &datapath, &spec, &outside);
    }
    let now = noted_handle(&spec.dir).unwrap();
    reap.also(now.process.pid);

    step("snapshot");
    let file = world.dir.path().join("snapshot.qcow2");
    let info = machine.snapshot(&file).await.unwrap();
    eprintln!("{info:?}, a file of {} KiB", std::fs::metadata(&file).unwrap().len() >> 10);
    assert!(info.frozen && info.disk_bytes == spec.disk_bytes, "{info:?}");
    assert!(machine.snapshot(&file).await.is_err() && file.exists(), "never over a file that is there");
    subject.probe(world, &datapath, &spec, &outside);

    let machine = if subject.driver().name() == "qemu" {
        // Takes one connection at a time: a daemon that is gone cannot be played in its own process. See `vm.rs`.
        machine
    } else {
        step("adopt");
        let handle = machine.handle().clone();
        drop(machine);
        drop(datapath);
        datapath = world.datapath().await;
        service.hand_over(&datapath);
        let gate = datapath.adopt(&spec.id, spec.net, &common::policy(&spec.id)).await.unwrap();
        let machine = subject.driver().adopt(&spec, &handle, gate).await.unwrap();
        subject.ready(&datapath, &spec, machine.as_ref()).await;
        subject.probe(world, &datapath, &spec, &outside);
        machine
    };

    step("crash");
    // Not SIGSEGV: a program in Rust lets the first pass that comes from outside, and Firecracker makes an exit code of it.
    subject::signal(now.process.pid, libc::SIGABRT);
    let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
    assert!(matches!(exit, Exit::Crashed(_)), "{exit:?}");
    assert!(noted_handle(&spec.dir).is_none(), "what is gone leaves no handle");
    drop(machine);
    datapath.detach(spec.net).await.unwrap();

    if subject.is_simulated() {
        step("hang");
        let (machine, _reap) = boot(&subject, &datapath, &spec).await;
        subject::signal(machine.handle().process.pid, libc::SIGSTOP);
        let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
        assert!(matches!(&exit, Exit::Crashed(why) if why.contains("hung")), "{exit:?}");
        datapath.detach(spec.net).await.unwrap();

        step("power off");
        let (machine, _reap) = boot(&subject, &datapath, &spec).await;
        subject::signal(machine.handle().process.pid, libc::SIGUSR2);
        let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
        assert_eq!(exit, Exit::GuestShutdown);
        datapath.detach(spec.net).await.unwrap();
    }

    if !short {
        step("start, stop");
        let (machine, _reap) = boot(&subject, &datapath, &spec).await;
        subject.has_mark(world, &datapath, &spec);
        subject.probe(world, &datapath, &spec, &outside);
        assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), Exit::GuestShutdown);
        drop(machine);
        datapath.detach(spec.net).await.unwrap();
    }

    step("clone");
    let clone = VmSpec { snapshot: Some(file.clone()), ..subject.spec(world, 11, Vec::new()) };
    let (machine, _reap) = boot(&subject, &datapath, &clone).await;
    std::fs::remove_file(&file).unwrap();
    subject.has_mark(world, &datapath, &clone);
    subject.probe(world, &datapath, &clone, &outside);
    let pid = machine.handle().process.pid;
    assert_eq!(machine.kill().await.unwrap(), Exit::Stopped);
    drop(machine);

    step("destroy");
    datapath.detach(clone.net).await.unwrap();
    for spec in [&spec, &clone] {
        nothing_left(&datapath, spec);
    }
    assert!(!std::path::Path::new(&format!("/proc/{pid}/root/vm")).exists());
    drop(service);
    assert_eq!(outside.reached(), 0, "something came through");
}

async fn boot(subject: &Subject, datapath: &Datapath, spec: &VmSpec) -> (Box<dyn Running>, Reap) {
    let gate = common::gate(datapath, spec).await;
    let machine = subject.driver().boot(spec, gate).await.unwrap_or_else(|error| panic!("{error}"));
    let reap = Reap::of(machine.handle().process.pid);
    subject.ready(datapath, spec, machine.as_ref()).await;
    (machine, reap)
}

fn nothing_left(datapath: &Datapath, spec: &VmSpec) {
    assert!(!subject::link_exists(datapath, spec), "its tap is gone");
    for name in ["vmm.json", "qmp.sock", "agent.sock", "snapshot.raw"] {
        assert!(!spec.dir.join(name).exists(), "{name}");
    }
    if let Some(root) = tapgate_vmm::cgroup::Cgroup::root() {
        assert!(!root.join("tapgate").join(spec.id.as_str()).exists(), "its control group is gone");
    }
    std::fs::remove_dir_all(&spec.dir).unwrap();
}

/// A VM's own name.
pub fn fresh() -> VmId {
    VmId::generate()
}

#[test]
fn a_vmm_that_refuses_its_vm_says_why_and_leaves_nothing() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let subject = Subject::simulated(&world, ApiKind::Firecracker);
        let refused = async |spec: &VmSpec| {
            let gate = common::gate(&datapath, spec).await;
            let error = subject.driver().boot(spec, gate).await.err().unwrap().to_string();
            datapath.detach(spec.net).await.unwrap();
            assert!(!spec.dir.join("vmm.json").exists(), "after: {error}");
            error
        };
        let spec = subject.spec(&world, 12, Vec::new());
        let odd = VmSpec { vcpus: 3, ..spec.clone() };
        assert!(refused(&odd).await.contains("one virtual CPU or an even number"));
        let none = VmSpec { memory_mib: 0, ..spec.clone() };
        assert!(refused(&none).await.contains("mem_size_mib"), "the VMM's own words");
        let missing = Subject::given(ApiKind::Firecracker, "/nowhere/firecracker".into());
        let gate = common::gate(&datapath, &spec).await;
        let error = missing.driver().boot(&spec, gate).await.err().unwrap().to_string();
        assert!(error.starts_with("/nowhere/firecracker cannot be started"), "{error}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    });
}
