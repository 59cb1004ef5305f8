//! The QEMU driver: microvm machine, KVM or TCG, unprivileged, in a control group, with the tap as a descriptor.
//!
//! A VM's folder belongs to the daemon; the VMM gets open files and cannot go there itself.

mod args;
mod memory;
mod snapshot;
mod supervise;
mod transfer;
mod tsc;

pub use memory::{DATA as MEMORY, keeps_memory, place_memory};
pub(crate) use supervise::{append, file, words};

use crate::accel::Accel;
use crate::cgroup::{Cgroup, Demand, IoLimits};
use crate::confine::scratch::Scratch;
use crate::confine::tool::Work;
use crate::confine::view::View;
use crate::confine::{self, Confined, Launch, Network, uid_of};
use crate::disk;
use crate::driver::{BoxFuture, Running, Vmm};
use crate::image::Image;
use crate::process::{Process, ProcessRef};
use crate::qmp::Qmp;
use crate::spec::{
    Exit, Handle, MemorySnapshot, Observed, Place, SnapshotInfo, Suspended, TapFd, VmSpec, VmmError,
};
use crate::turn::{self, Wanted};
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
use tapgate_fault::point;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;

/// How long QEMU may take to open its control socket, and to end when it is told to.
const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(10);
/// Kernel and initramfs in the VMM's view.
const KERNEL: &str = "/vm/kernel";
const INITRD: &str = "/vm/initrd";
/// What QEMU reads of its own: firmware.
pub(crate) const DATA: [&str; 3] = ["/usr/share/qemu", "/usr/share/seabios", "/usr/local/share/qemu"];

/// The driver.
#[derive(Clone, Debug)]
pub struct QemuDriver {
    /// The program.
    pub program: PathBuf,
    /// How CPUs are provided; see [`crate::accel::probe`].
    pub accel: Accel,
    /// The host's version-2 control group tree, where there is one.
    pub cgroups: Option<PathBuf>,
    /// Whether a VM may start without its limits.
    pub demand: Demand,
    /// What each VM may do with the host's disks.
    pub io: IoLimits,
}

impl QemuDriver {
    /// The driver with the program from the usual place and the host's control groups.
    pub fn new(accel: Accel) -> Self {
        if accel == Accel::Tcg {
            tsc::begin();
        }
        Self {
            program: default_program(),
            accel,
            cgroups: Cgroup::root(),
            demand: Demand::default(),
            io: IoLimits::default(),
        }
    }

    async fn start(&self, spec: &VmSpec, mut gate: Gate) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        let tap = gate.take_tap().ok_or_else(|| VmmError::Gate("it has no tap to hand over".into()))?;
        let (driver, owned) = (self.clone(), spec.clone());
        // Files, qemu-img and fork: nothing for a thread that serves others.
        let launched = turn::run(&spec.dir, move |wanted| {
            let memory = memory::take(&owned.dir, &driver, &owned)?;
            driver.launch(&owned, tap, memory.is_some(), wanted).map(|launched| (launched, memory))
        })
        .await;
        let ((handle, process, scratch), memory) =
            launched.inspect_err(|_| clean(self.cgroups.as_deref(), &spec.place()))?;
        match filled(spec, &process, memory).await {
            Ok(qmp) => {
                let seen = Seen { process, scratch, qmp, shut_down: false };
                Ok(Box::new(QemuRunning::follow(self, spec, handle, seen, gate)))
            }
            Err(error) => {
                let _ = process.signal(libc::SIGKILL);
                let _ = timeout(END, process.wait()).await;
                clean(self.cgroups.as_deref(), &spec.place());
                let words = supervise::words(&spec.dir, scratch.as_ref());
                let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
                Err(VmmError::Start(format!("{error} {last}").trim().to_owned()))
            }
        }
    }

    fn launch(
        &self,
        spec: &VmSpec,
        tap: TapFd,
        incoming: bool,
        wanted: &Wanted,
    ) -> Result<(Handle, Process, Option<Scratch>), VmmError> {
        confine::present(&self.program, "qemu-system-x86")?;
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.dir)
            .map_err(VmmError::io(spec.dir.display().to_string()))?;
        let image = spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
        let image = &disk::origin(&spec.dir, image)?;
        let uid = uid_of(spec.net.slot);
        let work = Work { uid, wanted };
        let disk = disk::prepare(&spec.dir, image, spec.snapshot.as_deref(), spec.disk_bytes, work)?;
        let seed = spec.dir.join(file::SEED);
        point("vmm.disk");
        spec.seed.write(&seed)?;
        let _ = fs::remove_file(spec.dir.join(file::VMM));
        let control = spec.dir.join(file::CONTROL);
        let descriptors = vec![
            (tap, fd::TAP),
            (confine::control_socket(&control)?, fd::QMP),
            (confine::control_socket(&spec.dir.join(file::AGENT))?, fd::AGENT),
            (confine::open(&disk.path, true)?, fd::DISK),
            (confine::open(&image.disk(), false)?, fd::BASE),
            (confine::open(&seed, false)?, fd::SEED),
        ];
        let scratch = match nix::unistd::geteuid().is_root() {
            true => Some(Scratch::create(uid).map_err(VmmError::io("the VMM's scratch space"))?),
            false => None,
        };
        let view = |scratch| self.view(spec, image, uid, scratch);
        let confined =
            scratch.as_ref().map(view).transpose().map_err(VmmError::io("the VMM's own view of files"))?;
        let (kernel, initrd) = match &confined {
            Some(_) => (PathBuf::from(KERNEL), PathBuf::from(INITRD)),
            None => (image.kernel(), image.initrd()),
        };
        let plan = Plan {
            id: &spec.id,
            accel: self.accel,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            disk: disk.format,
            net: spec.net,
            kernel: &kernel,
            initrd: &initrd,
            cmdline: &image.manifest().cmdline,
            tsc_khz: (self.accel == Accel::Tcg).then(tsc::khz).flatten(),
            incoming,
        };
        let mut notes = vec![format!("accel={:?}", self.accel).to_lowercase()];
        let cgroup = confine::enclose(self.cgroups.as_deref(), self.demand, spec, self.io, &mut notes)?;
        point("vmm.enclosed");
        let log = match &scratch {
            Some(scratch) => scratch.append("log").map_err(VmmError::io("the VMM's log"))?,
            None => confine::log(&spec.dir.join(file::VMM))?,
        };
        let pid = Launch {
            program: &self.program,
            args: args::build(&plan),
            stdout: log.try_clone().map_err(VmmError::io("log"))?,
            stderr: log,
            confined,
            descriptors,
            cgroup,
            data: None,
            ends_with_us: false,
        }
        .spawn()?;
        point("vmm.spawned");
        let (handle, process) = noted(spec, pid, control, notes).inspect_err(|_| confine::end_child(pid))?;
        point("vmm.noted");
        Ok((handle, process, scratch))
    }

    /// The view with what QEMU opens by name; all else it is handed.
    fn view(&self, spec: &VmSpec, image: &Image, uid: u32, scratch: &Scratch) -> std::io::Result<Confined> {
        let mut view = View::new(&spec.dir, uid)?;
        view.program(&self.program)?;
        for folder in DATA {
            view.same(Path::new(folder))?;
        }
        view.read_only(&image.kernel(), KERNEL)?;
        view.read_only(&image.initrd(), INITRD)?;
        view.scratch(scratch)?;
        if self.accel == Accel::Kvm {
            view.device("/dev/kvm", 10, 232)?;
        }
        Ok(Confined { uid, view, network: Network::None })
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
        let status = status.get("status").and_then(Value::as_str).unwrap_or_default();
        let shut_down = status == "shutdown";
        if keeps_memory(&spec.dir) {
            // A daemon was lost when this memory counted already: it must have no second user.
            return Err(VmmError::Gone);
        }
        if matches!(status, "paused" | "finish-migrate" | "postmigrate") {
            // A daemon was lost while it held this VM.
            transfer::go_on(&mut qmp).await?;
        }
        let scratch = Scratch::of(handle.process.pid, uid_of(spec.net.slot)).ok();
        let seen = Seen { process, scratch, qmp, shut_down };
        Ok(Box::new(QemuRunning::follow(self, spec, handle.clone(), seen, gate)))
    }
}

/// Removes what a VMM leaves outside of its folder.
pub(crate) fn clean(cgroups: Option<&Path>, place: &Place) {
    if let Some(group) = cgroups.and_then(|root| Cgroup::open(root, place.id.as_str())) {
        group.kill();
        let _ = group.remove();
    }
    for name in [file::HANDLE, file::CONTROL, file::AGENT] {
        let _ = fs::remove_file(place.dir.join(name));
    }
}

/// Ends the VMM of the handle if it is there, after a start that was given up.
pub(crate) async fn discard(cgroups: Option<&Path>, place: &Place, handle: &Handle) -> Result<(), VmmError> {
    turn::rest(&place.dir).await;
    end(&handle.process).await?;
    clean(cgroups, place);
    Ok(())
}

/// Kills the process if it is there, and comes back when it has ended.
pub(crate) async fn end(process: &ProcessRef) -> Result<(), VmmError> {
    let Some(process) = Process::open(process).map_err(VmmError::io("pidfd"))? else { return Ok(()) };
    process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
    timeout(END, process.wait())
        .await
        .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))?
        .map_err(VmmError::io("pidfd"))?;
    Ok(())
}

/// Ends VMMs of this VM that nobody holds: the noted one, and those of its user with these words among their arguments.
pub(crate) async fn sweep(cgroups: Option<&Path>, place: &Place, wanted: String) -> Result<(), VmmError> {
    // A start that was given up may have been just about to make one, and has noted it since.
    turn::rest(&place.dir).await;
    if let Some(noted) = noted_handle(&place.dir) {
        discard(cgroups, place, &noted).await?;
    }
    let uid = uid_of(place.slot);
    let found = tokio::task::spawn_blocking(move || confine::orphans(&wanted, uid)).await;
    for process in found.map_err(|error| VmmError::Control(error.to_string()))? {
        tracing::warn!(vm = %place.id, pid = process.pid, "a VMM that nobody noted is ended");
        end(&process).await?;
    }
    clean(cgroups, place);
    Ok(())
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

/// Connects, and fills the VMM with the memory that it is to go on with.
async fn filled(spec: &VmSpec, process: &Process, memory: Option<memory::Taken>) -> Result<Qmp, VmmError> {
    let mut qmp = connect(&spec.dir, process).await?;
    if let Some(memory) = memory {
        transfer::load(&mut qmp, memory, spec).await?;
    }
    Ok(qmp)
}

/// A QEMU that was started or found.
struct Seen {
    process: Process,
    scratch: Option<Scratch>,
    qmp: Qmp,
    shut_down: bool,
}

/// A VM that QEMU runs.
pub struct QemuRunning {
    spec: VmSpec,
    accel: Accel,
    handle: Handle,
    process: Arc<Process>,
    gate: Gate,
    observed: watch::Receiver<Observed>,
    commands: mpsc::Sender<Command>,
    intent: watch::Sender<bool>,
    /// Held by what needs the disk and the guest for itself: a snapshot's copy, a suspension.
    turn: tokio::sync::Mutex<()>,
}

impl QemuRunning {
    fn follow(driver: &QemuDriver, spec: &VmSpec, handle: Handle, seen: Seen, gate: Gate) -> Self {
        let Seen { process, scratch, qmp, shut_down } = seen;
        let process = Arc::new(process);
        let (observe, observed) = watch::channel(Observed::default());
        let (commands, receiver) = mpsc::channel(8);
        let (intent, intended) = watch::channel(false);
        let supervisor = Supervisor {
            dir: spec.dir.clone(),
            process: process.clone(),
            scratch,
            qmp: Some(qmp),
            commands: receiver,
            observed: observe,
            shut_down,
            silent: 0,
            hung: false,
            starved: false,
            retries: 0,
            broken: None,
            intent: intended,
        };
        let (cgroups, of) = (driver.cgroups.clone(), spec.place());
        tokio::spawn(supervisor.run(move || clean(cgroups.as_deref(), &of)));
        Self {
            spec: spec.clone(),
            accel: driver.accel,
            handle,
            process,
            gate,
            observed,
            commands,
            intent,
            turn: tokio::sync::Mutex::default(),
        }
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
        timeout(END, self.wait())
            .await
            .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))
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

    fn discard<'a>(&'a self, place: &'a Place, handle: &'a Handle) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(discard(self.cgroups.as_deref(), place, handle))
    }

    fn sweep<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(sweep(self.cgroups.as_deref(), place, place.id.to_string()))
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

    fn suspend(&self) -> BoxFuture<'_, Result<Suspended, VmmError>> {
        Box::pin(transfer::save(self))
    }

    fn snapshot_memory<'a>(
        &'a self,
        disk: &'a Path,
        memory: &'a Path,
    ) -> BoxFuture<'a, Result<MemorySnapshot, VmmError>> {
        Box::pin(transfer::snapshot(self, disk, memory))
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
