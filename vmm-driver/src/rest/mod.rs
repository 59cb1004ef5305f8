//! The drivers for Firecracker and Cloud Hypervisor: VMMs that are spoken to by HTTP over a Unix socket. KVM only.
//!
//! Like QEMU's they run unprivileged in a view of their own; see [`crate::confine`]. Cloud Hypervisor is handed its tap as a
//! descriptor. Firecracker opens its tap by name: the tap is lent to the VMM's user, and the process starts inside the tap's
//! network namespace, without capabilities and with a filter that lets it make no socket but Unix ones.

mod client;
mod cloud_hypervisor;
mod firecracker;
mod hold;
mod judge;
mod launch;
mod running;
mod snapshot;
mod supervise;

pub use running::ApiRunning;
pub use snapshot::ASIDE;

use crate::cgroup::{Cgroup, Demand, IoLimits};
use crate::confine::scratch::Scratch;
use crate::confine::uid_of;
use crate::disk;
use crate::driver::{BoxFuture, Running, Vmm};
use crate::process::Process;
use crate::qemu::{clean, file, fits, noted_handle};
use crate::spec::{Handle, Place, VmSpec, VmmError};
use crate::turn;
use client::Request;
use launch::Tap;
use serde_json::Value;
use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tapgate_datapath::Gate;
use tapgate_model::{GuestNet, VmId};
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
    /// Whether a VM may start without its limits.
    pub demand: Demand,
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
    /// Why it was ended here although nobody wanted that.
    broken: OnceLock<String>,
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

impl ApiDriver {
    /// The driver for a program.
    pub fn new(kind: Kind, program: PathBuf) -> Self {
        Self { kind, program, cgroups: Cgroup::root(), demand: Demand::default(), io: IoLimits::default() }
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
        let live = Live { process: Arc::new(process), scratch, network, broken: OnceLock::new() };
        // A daemon that was lost during a snapshot left the guest held.
        hold::look(self, spec, &live, &tokio::sync::Mutex::default()).await?;
        Ok(Box::new(ApiRunning::follow(self, spec, handle, live, gate)))
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
