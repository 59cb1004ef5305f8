//! What a VM is to a driver: the specification it boots from, the handle by which it is found again, how it ended.

use crate::image::Image;
use crate::process::ProcessRef;
use crate::seed::Seed;
use serde::{Deserialize, Serialize};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use tapgate_model::{GuestNet, VmId};
use tapgate_netns::Netns;

/// Everything a driver needs to boot a VM.
#[derive(Clone, Debug)]
pub struct VmSpec {
    /// The VM.
    pub id: VmId,
    /// Its own folder, which the driver makes if it is not there: disk, seed, logs, control socket.
    pub dir: PathBuf,
    /// What it boots; the namespace driver needs none.
    pub image: Option<Image>,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Size of its disk in octets; at least the image's. A disk that is there already only grows.
    pub disk_bytes: u64,
    /// Its place in the network: what the gate was attached for.
    pub net: GuestNet,
    /// What the guest is told.
    pub seed: Seed,
    /// The file of a snapshot that its disk is made from, if it has none yet; not needed any more afterwards. A VM that names
    /// one is made from nothing else: where it is missing there is no disk.
    pub snapshot: Option<PathBuf>,
    /// Whether it goes on with the memory that its folder holds.
    pub resume: Resume,
    /// For the namespace driver: where the guest's processes run. Other drivers ignore it.
    pub guest_ns: Option<Netns>,
}

impl VmSpec {
    /// Where what is left of it is found.
    pub fn place(&self) -> Place {
        let Self { id, dir, net, guest_ns, .. } = self;
        Place { id: id.clone(), dir: dir.clone(), slot: net.slot, guest_ns: guest_ns.clone() }
    }
}

/// Where a VM's own things are: enough to end it by, whatever else of it can be read.
#[derive(Clone, Debug)]
pub struct Place {
    /// The VM.
    pub id: VmId,
    /// Its own folder.
    pub dir: PathBuf,
    /// Its position in the guest ranges, which says its processes' user.
    pub slot: u32,
    /// For the namespace driver: where the guest's processes run, if it is there.
    pub guest_ns: Option<Netns>,
}

/// What becomes of the memory in a VM's folder at its start; without one it boots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Resume {
    /// It is removed unread.
    #[default]
    Never,
    /// It is the VM's own, of its suspension: the VM goes on.
    Own,
    /// It is another VM's, which runs too: the VM goes on as someone else.
    Another,
}

/// What finds a running VM again after the daemon was restarted. Persisted by the caller.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Handle {
    /// The driver that booted it.
    pub driver: String,
    /// The VMM's process, told apart from a later one of the same number.
    pub process: ProcessRef,
    /// The VMM's control socket, if it has one.
    pub control: Option<PathBuf>,
    /// What the driver wants to remember: accelerator, limits that are in force.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// How a VM ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// The guest shut itself down, by itself or because it was asked to.
    GuestShutdown,
    /// The VMM was told to end.
    Stopped,
    /// The VMM ended by itself: an error or a signal; its last words.
    Crashed(String),
}

/// Why a driver could not do what it was asked.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// A gate that belongs to another VM or has no tap to give.
    #[error("the gate does not fit the VM: {0}")]
    Gate(String),
    /// A program is missing.
    #[error("{program} cannot be started; on Debian: apt-get install {package}")]
    Missing {
        /// The program.
        program: String,
        /// The package that brings it.
        package: &'static str,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// A program that no package brings is missing.
    #[error(
        "{program} cannot be started; take it from its project's releases and set its path in the configuration"
    )]
    NoProgram {
        /// The program.
        program: String,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// The VMM did not come up.
    #[error("the VMM did not start: {0}")]
    Start(String),
    /// The VMM does not answer on its control socket, or refuses.
    #[error("the VMM does not obey: {0}")]
    Control(String),
    /// The VMM does not answer at all.
    #[error("the VMM does not answer: {0}")]
    Silent(String),
    /// The process of the handle is gone.
    #[error("the VM is not running any more")]
    Gone,
    /// A VM's memory could not be written, or is not to be used. The next boot is from its disk.
    #[error("the VM's memory: {0}")]
    Memory(String),
    /// A disk could not be made.
    #[error("the disk cannot be prepared: {0}")]
    Disk(String),
    /// The seed could not be written.
    #[error(transparent)]
    Seed(#[from] crate::seed::SeedError),
    /// This driver cannot do that.
    #[error("this driver cannot {what}")]
    Unsupported {
        /// What it was asked.
        what: &'static str,
    },
    /// A file of the VM could not be read or written.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
}

impl VmmError {
    pub(crate) fn io(what: impl Into<String>) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what: what.into(), source }
    }
}

/// A snapshot that was taken.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotInfo {
    /// Size of the disk in octets.
    pub disk_bytes: u64,
    /// Whether the guest's file systems were held still for it. Otherwise it is what a power cut would have left.
    pub frozen: bool,
    /// How long the guest was held, in microseconds.
    pub held_us: u64,
    /// The recipe of the image whose kernel the disk belongs to.
    pub image_recipe: String,
}

/// A snapshot that was taken with the guest's memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemorySnapshot {
    /// Its disk's part.
    pub disk: SnapshotInfo,
    /// What [`crate::place_memory`] wants to know of the memory.
    pub note: String,
    /// Its memory and devices.
    pub memory_bytes: u64,
    /// The same as packed.
    pub stored_bytes: u64,
}

/// A VM that was suspended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Suspended {
    /// Its memory and devices.
    pub memory_bytes: u64,
    /// The same as packed in its folder.
    pub stored_bytes: u64,
    /// How long it took, in microseconds.
    pub took_us: u64,
}

/// A tap that a VMM is handed.
pub(crate) type TapFd = OwnedFd;

/// What is seen of a VM while it runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Observed {
    /// How often the guest restarted itself since it was booted or adopted.
    pub reboots: u32,
    /// Set once, when it ended.
    pub exit: Option<Arc<Exit>>,
}
