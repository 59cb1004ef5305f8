//! The drivers for Firecracker and Cloud Hypervisor: VMMs that are spoken to by HTTP over a Unix socket. KVM only.
//!
//! Like QEMU's they run unprivileged in a view of their own; see [`crate::confine`]. Cloud Hypervisor is handed its tap as a
//! descriptor. Firecracker opens its tap by name: the tap is lent to the VMM's user, and the process starts inside the tap's
//! network namespace, without capabilities and with a filter that lets it make no socket but Unix ones.

mod client;
mod cloud_hypervisor;
mod firecracker;
mod judge;
mod snapshot;
mod supervise;

use crate::cgroup::{Cgroup, IoLimits};
use crate::confine::scratch::Scratch;
use crate::confine::view::View;
use crate::confine::{self, Confined, Launch, Network, uid_of};
use crate::disk;
use crate::driver::{BoxFuture, Running, Vmm};
use crate::image::{Image, unpacked};
use crate::process::{Process, ProcessRef};
use crate::qemu::{clean, file, fits, noted_handle, remember};
use crate::spec::{Exit, Handle, Observed, Place, SnapshotInfo, TapFd, VmSpec, VmmError};
use crate::turn::{self, Wanted};
use client::Request;
use serde_json::Value;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tapgate_datapath::Gate;
use tapgate_model::{GuestNet, VmId};
use tapgate_netns::tap;
use tokio::sync::watch;
use tokio::time::timeout;

/// Names in the VMM's view.
const KERNEL: &str = "/vm/kernel";
const INITRD: &str = "/vm/initrd";
const DISK: &str = "/vm/disk";
const SEED: &str = "/vm/seed";
const API: &str = "/run/api.sock";
const AGENT: &str = "/run/agent.sock";
const CONSOLE: &str = "/run/console";
const EVENTS: &str = "/run/events";
const LOG: &str = "/run/log";

/// How long a VMM may take to answer, and to end when it is killed.
const START: Duration = Duration::from_secs(20);
const END: Duration = Duration::from_secs(10);

/// Which VMM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// Firecracker.
    Firecracker,
}

/// What goes into a VMM's arguments and requests.
#[derive(Clone, Debug)]
struct Plan<'a> {
    id: &'a VmId,
    vcpus: u32,
    memory_mib: u32,
    net: GuestNet,
    cmdline: &'a str,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::CloudHypervisor => "cloud-hypervisor",
            Self::Firecracker => "firecracker",
        }
    }

    fn args(self, plan: &Plan<'_>) -> Vec<std::ffi::OsString> {
        match self {
            Self::CloudHypervisor => cloud_hypervisor::args(plan),
            Self::Firecracker => firecracker::args(plan),
        }
    }

    fn configure(self, plan: &Plan<'_>) -> Vec<Request> {
        match self {
            Self::CloudHypervisor => Vec::new(),
            Self::Firecracker => firecracker::configure(plan),
        }
    }

    fn hold(self, held: bool) -> Request {
        match self {
            Self::CloudHypervisor => cloud_hypervisor::hold(held),
            Self::Firecracker => firecracker::hold(held),
        }
    }

    fn state(self) -> Request {
        match self {
            Self::CloudHypervisor => cloud_hypervisor::state(),
            Self::Firecracker => firecracker::state(),
        }
    }

    fn end(self) -> Request {
        match self {
            Self::CloudHypervisor => cloud_hypervisor::end(),
            Self::Firecracker => firecracker::end(),
        }
    }

    fn check(self, spec: &VmSpec) -> Result<(), VmmError> {
        match self {
            Self::CloudHypervisor => Ok(()),
            Self::Firecracker => firecracker::check(spec.vcpus).map_err(VmmError::Start),
        }
    }
}

/// The driver.
#[derive(Clone, Debug)]
pub struct ApiDriver {
    /// Which VMM.
    pub kind: Kind,
    /// The program.
    pub program: PathBuf,
    /// The host's version-2 control group tree, where there is one.
    pub cgroups: Option<PathBuf>,
    /// What each VM may do with the host's disks.
    pub io: IoLimits,
}

/// What belongs to one process of a VMM.
#[derive(Debug)]
struct Live {
    process: Arc<Process>,
    scratch: Scratch,
    /// The network namespace that it started in, for its successor after a guest's restart.
    network: Option<OwnedFd>,
}

impl Live {
    /// A connection to its API.
    async fn connect(&self, kind: Kind, dir: &Path) -> std::io::Result<UnixStream> {
        match kind {
            Kind::CloudHypervisor => crate::unix::connect_any_length(&dir.join(file::CONTROL)).await,
            Kind::Firecracker => self.scratch.connect("api.sock").await,
        }
    }
}

/// A tap's network namespace, and descriptors with the numbers they get.
type Wiring = (Option<OwnedFd>, Vec<(OwnedFd, i32)>);

/// How a new process comes to its tap.
enum Tap {
    /// The gate's descriptor.
    New(TapFd),
    /// It is lent already; here is its network namespace.
    Lent(OwnedFd),
}

impl ApiDriver {
    /// The driver for a program.
    pub fn new(kind: Kind, program: PathBuf) -> Self {
        Self { kind, program, cgroups: Cgroup::root(), io: IoLimits::default() }
    }

    async fn start(&self, spec: &VmSpec, mut gate: Gate) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        self.kind.check(spec)?;
        if !nix::unistd::geteuid().is_root() {
            return Err(VmmError::Start(format!("{} needs a daemon that runs as root", self.kind.name())));
        }
        let tap = gate.take_tap().ok_or_else(|| VmmError::Gate("it has no tap to hand over".into()))?;
        let (handle, live) = self.run(spec, Tap::New(tap)).await?;
        Ok(Box::new(ApiRunning::follow(self, spec, handle, live, gate)))
    }

    /// A new process with the VM running in it; what fails leaves none.
    async fn run(&self, spec: &VmSpec, tap: Tap) -> Result<(Handle, Live), VmmError> {
        let (driver, owned) = (self.clone(), spec.clone());
        // Files, copies and fork: nothing for a thread that serves others.
        let launched = turn::run(&spec.dir, move |wanted| driver.launch(&owned, tap, wanted)).await;
        let (handle, live) = launched.inspect_err(|_| clean(self.cgroups.as_deref(), &spec.place()))?;
        if let Err(error) = self.configure(spec, &live).await {
            let _ = live.process.signal(libc::SIGKILL);
            let _ = timeout(END, live.process.wait()).await;
            clean(self.cgroups.as_deref(), &spec.place());
            let words = live.scratch.tail("log", 1024);
            let last = words.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default();
            return Err(VmmError::Start(format!("{error} {last}").trim().to_owned()));
        }
        Ok((handle, live))
    }

    /// The VM's disk, made if it is not there, and the image that it was made with.
    fn provide(spec: &VmSpec, wanted: &Wanted) -> Result<(Image, PathBuf), VmmError> {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.dir)
            .map_err(VmmError::io(spec.dir.display().to_string()))?;
        let image = spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
        let image = disk::origin(&spec.dir, image)?;
        let (snapshot, uid) = (spec.snapshot.as_deref(), uid_of(spec.net.slot));
        let disk = disk::prepare_raw(&spec.dir, &image, snapshot, spec.disk_bytes, uid, wanted)?;
        Ok((image, disk))
    }

    fn launch(&self, spec: &VmSpec, tap: Tap, wanted: &Wanted) -> Result<(Handle, Live), VmmError> {
        let missing = |source| VmmError::NoProgram { program: self.program.display().to_string(), source };
        self.program.metadata().map_err(missing)?;
        let (image, disk) = &Self::provide(spec, wanted)?;
        let uid = uid_of(spec.net.slot);
        let seed = spec.dir.join(file::SEED);
        spec.seed.write(&seed)?;
        for file in [disk, &seed] {
            std::os::unix::fs::chown(file, Some(uid), Some(uid)).map_err(VmmError::io("a disk's owner"))?;
        }
        let kernel = unpacked(image).map_err(|e| VmmError::Start(e.to_string()))?;
        let scratch = Scratch::create(uid).map_err(VmmError::io("the VMM's scratch space"))?;
        let view = || -> std::io::Result<View> {
            let mut view = View::new(&spec.dir, uid)?;
            view.program(&self.program)?;
            view.read_only(&kernel, KERNEL)?;
            view.read_only(&image.initrd(), INITRD)?;
            view.writable(disk, DISK)?;
            view.read_only(&seed, SEED)?;
            view.scratch(&scratch)?;
            view.device("/dev/kvm", 10, 232)?;
            view.device("/dev/urandom", 1, 9)?;
            view.device("/dev/null", 1, 3)?;
            if self.kind == Kind::Firecracker {
                view.device("/dev/net/tun", 10, 200)?;
            }
            Ok(view)
        };
        let view = view().map_err(VmmError::io("the VMM's own view of files"))?;
        let (network, descriptors) = self.wire(spec, tap, uid)?;
        let duplicate = |fd: &OwnedFd| fd.try_clone().map_err(VmmError::io("the tap's network namespace"));
        let plan = Plan {
            id: &spec.id,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            net: spec.net,
            cmdline: &image.manifest().cmdline,
        };
        let mut notes = Vec::new();
        let cgroup = confine::enclose(self.cgroups.as_deref(), spec, self.io, &mut notes);
        let output = |name: &str| scratch.append(name).map_err(VmmError::io("the VMM's scratch space"));
        let stdout = if self.kind == Kind::Firecracker { "console" } else { "log" };
        let inside = match &network {
            Some(fd) => Network::Inside(duplicate(fd)?),
            None => Network::None,
        };
        let pid = Launch {
            program: &self.program,
            args: self.kind.args(&plan),
            stdout: output(stdout)?,
            stderr: output("log")?,
            confined: Some(Confined { uid, view, network: inside }),
            descriptors,
            cgroup: cgroup.and_then(|group| group.entrance().ok()),
            ends_with_us: false,
        }
        .spawn()?;
        self.noted(spec, pid, notes, scratch, network).inspect_err(|_| confine::end_child(pid))
    }

    /// The way to the tap, and the descriptors to be inherited.
    fn wire(&self, spec: &VmSpec, tap: Tap, uid: u32) -> Result<Wiring, VmmError> {
        match (self.kind, tap) {
            (Kind::Firecracker, Tap::New(fd)) => {
                let network =
                    tap::lend(fd, uid).map_err(|e| VmmError::Gate(format!("its tap cannot be lent: {e}")))?;
                Ok((Some(network), Vec::new()))
            }
            (Kind::Firecracker, Tap::Lent(network)) => Ok((Some(network), Vec::new())),
            (Kind::CloudHypervisor, Tap::New(fd)) => {
                let api = confine::control_socket(&spec.dir.join(file::CONTROL))?;
                Ok((None, vec![(fd, cloud_hypervisor::fd::TAP), (api, cloud_hypervisor::fd::API)]))
            }
            (Kind::CloudHypervisor, Tap::Lent(_)) => {
                Err(VmmError::Gate("Cloud Hypervisor takes its tap as a descriptor".into()))
            }
        }
    }

    fn noted(
        &self,
        spec: &VmSpec,
        pid: i32,
        notes: Vec<String>,
        scratch: Scratch,
        network: Option<OwnedFd>,
    ) -> Result<(Handle, Live), VmmError> {
        let process = ProcessRef::of(pid).map_err(|e| {
            VmmError::Start(format!("it ended at once ({e}): {}", scratch.tail("log", 500).trim()))
        })?;
        let control = (self.kind == Kind::CloudHypervisor).then(|| spec.dir.join(file::CONTROL));
        let handle = Handle { driver: self.kind.name().into(), process, control, notes };
        remember(&spec.dir, &handle)?;
        let process = Process::open(&handle.process).map_err(VmmError::io("pidfd"))?.ok_or(VmmError::Gone)?;
        Ok((handle, Live { process: Arc::new(process), scratch, network }))
    }

    /// Waits for the API, says everything that has to be said, and comes back when the VM runs.
    async fn configure(&self, spec: &VmSpec, live: &Live) -> Result<(), VmmError> {
        let image = spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
        let image = disk::origin(&spec.dir, image)?;
        let plan = Plan {
            id: &spec.id,
            vcpus: spec.vcpus,
            memory_mib: spec.memory_mib,
            net: spec.net,
            cmdline: &image.manifest().cmdline,
        };
        let talk = async {
            while live.connect(self.kind, &spec.dir).await.is_err() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            for request in self.kind.configure(&plan) {
                self.ask(spec, live, &request).await?;
            }
            loop {
                match self.state(spec, live).await {
                    Ok(state) if state == "Running" => return Ok(()),
                    // Cloud Hypervisor answers before it has the VM.
                    Ok(_) | Err(VmmError::Control(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
                    Err(error) => return Err(error),
                }
            }
        };
        tokio::select! {
            biased;
            _ = live.process.wait() => Err(VmmError::Start("it ended at once.".into())),
            result = timeout(START, talk) => {
                result.map_err(|_| VmmError::Control("its VM does not start".into()))?
            }
        }
    }

    async fn ask(&self, spec: &VmSpec, live: &Live, request: &Request) -> Result<Value, VmmError> {
        let stream = live.connect(self.kind, &spec.dir).await.map_err(|error| match error.kind() {
            std::io::ErrorKind::TimedOut => VmmError::Silent("it accepts no connection to its API".into()),
            _ => VmmError::Control(format!("its API's socket: {error}")),
        })?;
        client::send(stream, request).await
    }

    async fn state(&self, spec: &VmSpec, live: &Live) -> Result<String, VmmError> {
        let answer = self.ask(spec, live, &self.kind.state()).await?;
        match answer.get("state").and_then(Value::as_str) {
            Some(state) => Ok(state.to_owned()),
            None => Err(VmmError::Control("its answer has no state".into())),
        }
    }

    async fn take_over(
        &self,
        spec: &VmSpec,
        handle: &Handle,
        gate: Gate,
    ) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        // After a guest's restart Firecracker is another process than the caller's handle says; the folder knows.
        let noted = noted_handle(&spec.dir);
        let open = |handle: &Handle| Process::open(&handle.process).map_err(VmmError::io("pidfd"));
        let (process, handle) = match (open(handle)?, noted) {
            (Some(process), _) => (process, handle.clone()),
            (None, Some(noted)) => (open(&noted)?.ok_or(VmmError::Gone)?, noted),
            (None, None) => return Err(VmmError::Gone),
        };
        let pid = handle.process.pid;
        let scratch =
            Scratch::of(pid, uid_of(spec.net.slot)).map_err(VmmError::io("the VMM's scratch space"))?;
        let network = match self.kind {
            Kind::CloudHypervisor => None,
            Kind::Firecracker => Some(
                fs::File::open(format!("/proc/{pid}/ns/net")).map_err(VmmError::io("its namespace"))?.into(),
            ),
        };
        let live = Live { process: Arc::new(process), scratch, network };
        // A daemon that was lost during a snapshot left the guest held.
        if self.state(spec, &live).await? == "Paused" {
            self.ask(spec, &live, &self.kind.hold(false)).await?;
        }
        Ok(Box::new(ApiRunning::follow(self, spec, handle, live, gate)))
    }
}

/// A VM that one of them runs.
pub struct ApiRunning {
    driver: ApiDriver,
    spec: VmSpec,
    handle: Handle,
    gate: Gate,
    observed: watch::Receiver<Observed>,
    live: Arc<Mutex<Arc<Live>>>,
    intent: watch::Sender<supervise::Intent>,
    /// One snapshot at a time: it holds and releases the guest.
    snapshots: tokio::sync::Mutex<()>,
}

impl ApiRunning {
    fn follow(driver: &ApiDriver, spec: &VmSpec, handle: Handle, live: Live, gate: Gate) -> Self {
        let live = Arc::new(Mutex::new(Arc::new(live)));
        let (observe, observed) = watch::channel(Observed::default());
        let (intent, intended) = watch::channel(supervise::Intent::Run);
        let supervisor = supervise::Supervisor {
            driver: driver.clone(),
            spec: spec.clone(),
            live: live.clone(),
            observed: observe,
            intent: intended,
        };
        tokio::spawn(supervisor.run());
        let snapshots = tokio::sync::Mutex::default();
        Self { driver: driver.clone(), spec: spec.clone(), handle, gate, observed, live, intent, snapshots }
    }

    fn live(&self) -> Arc<Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn ask(&self, request: &Request) -> Result<Value, VmmError> {
        self.driver.ask(&self.spec, &self.live(), request).await
    }

    async fn end(&self) -> Result<Exit, VmmError> {
        self.intent.send_replace(supervise::Intent::Kill);
        self.live().process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
        timeout(END, self.wait())
            .await
            .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))
    }

    async fn shut_down(&self, grace: Duration) -> Result<Exit, VmmError> {
        self.intent.send_replace(supervise::Intent::ShutDown);
        let asked = match snapshot::agent(&self.live()).await {
            Ok(mut agent) => agent.power_off().await.is_ok(),
            Err(_) => false,
        };
        let asked = asked || self.ask(&self.driver.kind.end()).await.is_ok();
        if asked && let Ok(exit) = timeout(grace, self.wait()).await {
            return Ok(exit);
        }
        self.end().await
    }
}

impl Vmm for ApiDriver {
    fn name(&self) -> &'static str {
        self.kind.name()
    }

    fn prepare<'a>(&'a self, spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmmError>> {
        let of = spec.clone();
        Box::pin(turn::run(&spec.dir, move |wanted| Self::provide(&of, wanted).map(drop)))
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
        Box::pin(crate::qemu::discard(self.cgroups.as_deref(), place, handle))
    }

    fn sweep<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(crate::qemu::sweep(self.cgroups.as_deref(), place, place.id.to_string().replace('_', "-")))
    }
}

impl Running for ApiRunning {
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
        Box::pin(self.shut_down(grace))
    }

    fn snapshot<'a>(&'a self, to: &'a Path) -> BoxFuture<'a, Result<SnapshotInfo, VmmError>> {
        Box::pin(snapshot::take(self, to))
    }

    fn check(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        Box::pin(async {
            let live = self.live();
            if live.process.identity().is_stopped() {
                return Err(VmmError::Control("its process was stopped by a signal".into()));
            }
            self.driver.state(&self.spec, &live).await.map(drop)
        })
    }

    fn kill(&self) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.end())
    }
}
