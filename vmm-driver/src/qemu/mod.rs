//! The QEMU driver: microvm machine, KVM or TCG, unprivileged, in a control group, with the tap as a descriptor.
//!
//! A VM's folder belongs to the daemon; the VMM gets open files and cannot go there itself.

mod agent;
mod args;
mod launch;
mod snapshot;
mod supervise;
mod tsc;

pub use launch::uid_of;
pub use supervise::file;

use crate::accel::{Accel, open_kvm};
use crate::cgroup::{Cgroup, Limits};
use crate::disk;
use crate::driver::{BoxFuture, Running, Vmm};
use crate::process::{Process, ProcessRef};
use crate::qmp::Qmp;
use crate::spec::{Exit, Handle, Observed, SnapshotInfo, TapFd, VmSpec, VmmError};
use args::{Plan, fd};
use serde_json::Value;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use supervise::{Command, Supervisor};
use tapgate_datapath::Gate;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// How long QEMU may take to open its control socket, and to end when it is told to.
const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(10);
/// Threads of a VMM beyond its virtual CPUs.
const THREADS: u32 = 64;

/// The driver.
#[derive(Clone, Debug)]
pub struct QemuDriver {
    /// The program.
    pub program: PathBuf,
    /// How CPUs are provided; see [`crate::accel::probe`].
    pub accel: Accel,
    /// The host's version-2 control group tree, where there is one.
    pub cgroups: Option<PathBuf>,
}

impl QemuDriver {
    /// The driver with the program from the usual place and the host's control groups.
    pub fn new(accel: Accel) -> Self {
        Self { program: default_program(), accel, cgroups: Cgroup::root() }
    }

    async fn start(&self, spec: &VmSpec, mut gate: Gate) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        let tap = gate.take_tap().ok_or_else(|| VmmError::Gate("it has no tap to hand over".into()))?;
        let launched = {
            let (driver, spec) = (self.clone(), spec.clone());
            // Files, qemu-img and fork: nothing for a thread that serves others.
            tokio::task::spawn_blocking(move || driver.launch(&spec, tap)).await
        };
        let launched = launched.map_err(|e| VmmError::Start(e.to_string())).and_then(std::convert::identity);
        let (handle, process) = launched.inspect_err(|_| self.clean(spec))?;
        match connect(&spec.dir, &process).await {
            Ok(qmp) => Ok(Box::new(QemuRunning::follow(self, spec, handle, process, Some(qmp), false, gate))),
            Err(error) => {
                let _ = process.signal(libc::SIGKILL);
                let _ = timeout(END, process.wait()).await;
                self.clean(spec);
                let words = supervise::tail(&spec.dir.join(file::VMM), 1024);
                let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                Err(VmmError::Start(format!("{error} {last}").trim().to_owned()))
            }
        }
    }

    fn launch(&self, spec: &VmSpec, tap: TapFd) -> Result<(Handle, Process), VmmError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.dir)
            .map_err(VmmError::io(spec.dir.display().to_string()))?;
        let image = spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
        let image = &disk::origin(&spec.dir, image)?;
        let disk = disk::prepare(&spec.dir, image, spec.snapshot.as_deref(), spec.disk_bytes)?;
        let seed = spec.dir.join(file::SEED);
        spec.seed.write(&seed)?;
        let _ = fs::remove_file(spec.dir.join(file::VMM));
        let control = spec.dir.join(file::CONTROL);
        let mut descriptors = vec![
            (tap, fd::TAP),
            (launch::control_socket(&control)?, fd::QMP),
            (launch::control_socket(&spec.dir.join(file::AGENT))?, fd::AGENT),
            (launch::open(&disk.path, true)?, fd::DISK),
            (launch::open(&image.disk(), false)?, fd::BASE),
            (launch::open(&seed, false)?, fd::SEED),
            (launch::open(&image.kernel(), false)?, fd::KERNEL),
            (launch::open(&image.initrd(), false)?, fd::INITRD),
        ];
        let kvm_descriptor = self.accel == Accel::Kvm && takes_kvm_descriptor(&self.program);
        let mut groups = Vec::new();
        if kvm_descriptor {
            descriptors.push((open_kvm().map_err(VmmError::io("/dev/kvm"))?, fd::KVM));
        } else if self.accel == Accel::Kvm {
            use std::os::unix::fs::MetadataExt as _;
            let owner = fs::metadata("/dev/kvm").map_err(VmmError::io("/dev/kvm"))?.gid();
            groups.push(nix::unistd::Gid::from_raw(owner));
        }
        let plan = Plan {
            id: &spec.id,
            accel: self.accel,
            kvm_descriptor,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk: disk.format,
            net: spec.net,
            cmdline: &image.manifest().cmdline,
            tsc_khz: tsc::khz(),
        };
        let mut notes = vec![format!("accel={:?}", self.accel).to_lowercase()];
        let cgroup = self.enclose(spec, &mut notes);
        let pid = launch::Launch {
            program: &self.program,
            args: args::build(&plan),
            log: &spec.dir.join(file::VMM),
            uid: nix::unistd::geteuid().is_root().then(|| uid_of(spec.net.slot)),
            groups,
            descriptors,
            cgroup: cgroup.and_then(|group| group.entrance().ok()),
        }
        .spawn()?;
        noted(spec, pid, control, notes).inspect_err(|_| {
            // Our own child, not waited for yet, so the number is still its own.
            let child = nix::unistd::Pid::from_raw(pid);
            let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(child, None);
        })
    }

    fn enclose(&self, spec: &VmSpec, notes: &mut Vec<String>) -> Option<Cgroup> {
        let limits = Limits { cpus: spec.vcpus, memory_mib: spec.memory_mib, pids: spec.vcpus + THREADS };
        match Cgroup::create(self.cgroups.as_deref()?, spec.id.as_str(), limits) {
            Ok((group, missing)) => {
                if !missing.is_empty() {
                    notes.push(format!("no limit for {}", missing.join(", ")));
                    tracing::warn!(vm = %spec.id, ?missing, "the host's control groups do not offer these limits");
                }
                Some(group)
            }
            Err(error) => {
                notes.push("no control group".into());
                tracing::warn!(vm = %spec.id, %error, "no control group for the VMM");
                None
            }
        }
    }

    async fn take_over(
        &self,
        spec: &VmSpec,
        handle: &Handle,
        gate: Gate,
    ) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        let process = Process::open(&handle.process).map_err(VmmError::io("pidfd"))?.ok_or(VmmError::Gone)?;
        let mut qmp = connect(&spec.dir, &process).await?;
        let status = qmp.command("query-status", Value::Null).await?;
        let shut_down = status.get("status").and_then(Value::as_str) == Some("shutdown");
        Ok(Box::new(QemuRunning::follow(self, spec, handle.clone(), process, Some(qmp), shut_down, gate)))
    }

    /// Removes what a VMM leaves outside of its folder.
    fn clean(&self, spec: &VmSpec) {
        if let Some(group) = self.cgroups.as_deref().and_then(|root| Cgroup::open(root, spec.id.as_str())) {
            group.kill();
            let _ = group.remove();
        }
        let _ = fs::remove_file(spec.dir.join(file::HANDLE));
        let _ = fs::remove_file(spec.dir.join(file::CONTROL));
        let _ = fs::remove_file(spec.dir.join(file::AGENT));
    }
}

/// Opens the new process and notes in the VM's folder how it is found again.
fn noted(
    spec: &VmSpec,
    pid: i32,
    control: PathBuf,
    notes: Vec<String>,
) -> Result<(Handle, Process), VmmError> {
    let process = ProcessRef::of(pid).map_err(|e| VmmError::Start(format!("it ended at once ({e})")))?;
    let handle = Handle { driver: "qemu".into(), process, control: Some(control), notes };
    remember(&spec.dir, &handle)?;
    let process = Process::open(&handle.process).map_err(VmmError::io("pidfd"))?.ok_or(VmmError::Gone)?;
    Ok((handle, process))
}

/// Whether this QEMU has the accelerator's property `device`, asked of it with a device that cannot be one. Debian 12's own
/// (7.2) has not.
fn takes_kvm_descriptor(program: &Path) -> bool {
    let asked = std::process::Command::new(program)
        .args(["-M", "none", "-nodefaults", "-display", "none", "-accel", "kvm,device=/dev/null"])
        .output();
    asked.is_ok_and(|answer| !String::from_utf8_lossy(&answer.stderr).contains("kvm-accel.device"))
}

/// Where Debian puts QEMU.
pub fn default_program() -> PathBuf {
    PathBuf::from(format!("/usr/bin/qemu-system-{}", std::env::consts::ARCH))
}

/// The handle that a driver noted in a VM's folder: what finds a VMM whose daemon died before it could note it itself.
pub fn noted_handle(dir: &Path) -> Option<Handle> {
    serde_json::from_slice(&fs::read(dir.join(file::HANDLE)).ok()?).ok()
}

pub(crate) fn remember(dir: &Path, handle: &Handle) -> Result<(), VmmError> {
    let text = serde_json::to_vec(handle).map_err(|e| VmmError::Start(e.to_string()))?;
    let path = dir.join(file::HANDLE);
    let new = path.with_extension("new");
    fs::write(&new, text)
        .and_then(|()| fs::rename(&new, &path))
        .map_err(VmmError::io(path.display().to_string()))
}

pub(crate) fn fits(spec: &VmSpec, gate: &Gate) -> Result<(), VmmError> {
    if *gate.vm() != spec.id || gate.net() != spec.net {
        return Err(VmmError::Gate(format!("it was attached for {}, not for {}", gate.vm(), spec.id)));
    }
    Ok(())
}

/// Connects as soon as QEMU listens; gives up when it has ended.
async fn connect(dir: &Path, process: &Process) -> Result<Qmp, VmmError> {
    let path = dir.join(file::CONTROL);
    tokio::select! {
        biased;
        _ = process.wait() => Err(VmmError::Start("it ended at once.".into())),
        result = timeout(START, Qmp::connect(&path)) => {
            result.map_err(|_| VmmError::Control("it does not answer on its control socket".into()))?
        }
    }
}

/// A VM that QEMU runs.
pub struct QemuRunning {
    driver: QemuDriver,
    spec: VmSpec,
    handle: Handle,
    process: Arc<Process>,
    gate: Gate,
    observed: watch::Receiver<Observed>,
    commands: mpsc::Sender<Command>,
    intent: watch::Sender<bool>,
}

impl QemuRunning {
    fn follow(
        driver: &QemuDriver,
        spec: &VmSpec,
        handle: Handle,
        process: Process,
        qmp: Option<Qmp>,
        shut_down: bool,
        gate: Gate,
    ) -> Self {
        let process = Arc::new(process);
        let (observe, observed) = watch::channel(Observed::default());
        let (commands, receiver) = mpsc::channel(8);
        let (intent, intended) = watch::channel(false);
        let supervisor = Supervisor {
            dir: spec.dir.clone(),
            process: process.clone(),
            qmp,
            commands: receiver,
            observed: observe,
            shut_down,
            intent: intended,
        };
        let cleaner = (driver.clone(), spec.clone());
        let task = supervisor.run();
        tokio::spawn(async move {
            task.await;
            cleaner.0.clean(&cleaner.1);
        });
        Self { driver: driver.clone(), spec: spec.clone(), handle, process, gate, observed, commands, intent }
    }

    /// Sends QEMU a command.
    pub async fn command(&self, name: &'static str, arguments: Value) -> Result<Value, VmmError> {
        self.command_with(name, arguments, None).await
    }

    async fn command_with(
        &self,
        name: &'static str,
        arguments: Value,
        descriptor: Option<OwnedFd>,
    ) -> Result<Value, VmmError> {
        let (answer, receiver) = oneshot::channel();
        let command = Command { name, arguments, descriptor, answer };
        self.commands.send(command).await.map_err(|_| VmmError::Gone)?;
        receiver.await.map_err(|_| VmmError::Gone)?
    }

    async fn end(&self) -> Result<Exit, VmmError> {
        self.intent.send_replace(true);
        self.process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
        let exit = timeout(END, self.wait())
            .await
            .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))?;
        self.driver.clean(&self.spec);
        Ok(exit)
    }

    async fn ask(&self, grace: Duration) -> Result<Exit, VmmError> {
        if self.command("system_powerdown", Value::Null).await.is_ok()
            && let Ok(exit) = timeout(grace, self.wait()).await
        {
            return Ok(exit);
        }
        self.end().await
    }
}

impl Vmm for QemuDriver {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn boot<'a>(&'a self, spec: &'a VmSpec, gate: Gate) -> BoxFuture<'a, Result<Box<dyn Running>, VmmError>> {
        Box::pin(self.start(spec, gate))
    }

    fn adopt<'a>(
        &'a self,
        spec: &'a VmSpec,
        handle: &'a Handle,
        gate: Gate,
    ) -> BoxFuture<'a, Result<Box<dyn Running>, VmmError>> {
        Box::pin(self.take_over(spec, handle, gate))
    }

    fn discard<'a>(&'a self, spec: &'a VmSpec, handle: &'a Handle) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(async move {
            if let Some(process) = Process::open(&handle.process).map_err(VmmError::io("pidfd"))? {
                process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
                timeout(END, process.wait())
                    .await
                    .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))?
                    .map_err(VmmError::io("pidfd"))?;
            }
            self.clean(spec);
            Ok(())
        })
    }

    fn sweep<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            let (wanted, uid) = (spec.id.to_string(), uid_of(spec.net.slot));
            let found = tokio::task::spawn_blocking(move || launch::orphans(&wanted, uid)).await;
            for process in found.unwrap_or_default() {
                tracing::warn!(vm = %spec.id, pid = process.pid, "a VMM that nobody noted is ended");
                if let Ok(Some(process)) = Process::open(&process) {
                    let _ = process.signal(libc::SIGKILL);
                    let _ = timeout(END, process.wait()).await;
                }
            }
            self.clean(spec);
        })
    }
}

impl Running for QemuRunning {
    fn handle(&self) -> &Handle {
        &self.handle
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn observed(&self) -> watch::Receiver<Observed> {
        self.observed.clone()
    }

    fn shutdown(&self, grace: Duration) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.ask(grace))
    }

    fn snapshot<'a>(&'a self, to: &'a Path) -> BoxFuture<'a, Result<SnapshotInfo, VmmError>> {
        Box::pin(snapshot::take(self, to))
    }

    fn check(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async {
            if self.handle.process.is_stopped() {
                return Err(VmmError::Control("its process was stopped by a signal".into()));
            }
            self.command("query-status", Value::Null).await.map(drop)
        })
    }

    fn kill(&self) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.end())
    }
}
