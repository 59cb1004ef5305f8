//! Starts a VMM as a process that can do nothing but run its VM: a user, a session, a mount view, a network namespace and a
//! control group of its own, no capabilities, a system call filter, only the descriptors that it needs.
//!
//! Owns what happens between fork and exec. Must never leave the child a right or a descriptor that is not listed.

mod child;
mod filter;
pub mod scratch;
pub mod tool;
pub mod uids;
pub mod view;

use crate::block;
use crate::cgroup::{Cgroup, Demand, IoLimits, Limits, Made};
use crate::process::ProcessRef;
use crate::spec::{VmSpec, VmmError};
use nix::sched::{CloneFlags, setns, unshare};
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;
use std::path::Path;
pub use uids::uid_of;
use view::View;

/// Threads of a VMM beyond its virtual CPUs. QEMU starts up to 64 for disk I/O alone, beside its own few, and ends when it gets none.
const THREADS: u32 = 128;

/// Above every number that a descriptor is handed on as.
const HANDED: RawFd = 64;

/// Which network a VMM's process is in.
#[derive(Debug)]
pub enum Network {
    /// An empty one of its own: it holds its tap as a descriptor.
    None,
    /// This one, where it has to open its tap by name. The filter keeps it from opening any socket there.
    Inside(OwnedFd),
}

/// What a process is started with.
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Where its output goes.
    pub stdout: File,
    /// Where its complaints go.
    pub stderr: File,
    /// Its user and group id, its view and its network; `None` where the daemon is not root and has nothing to give up.
    pub confined: Option<Confined>,
    /// Descriptors and the numbers they get.
    pub descriptors: Vec<(OwnedFd, RawFd)>,
    /// Its control group.
    pub cgroup: Option<OwnedFd>,
    /// All the octets that it may have in memory of its own, where no control group says so.
    pub data: Option<u64>,
    /// Whether it ends with the thread that started it, and so with the daemon. A VMM outlives both.
    pub ends_with_us: bool,
}

/// What only root can put around a process.
pub struct Confined {
    /// User and group id.
    pub uid: u32,
    /// What it sees of the file system.
    pub view: View,
    /// What it sees of the network.
    pub network: Network,
}

impl Launch<'_> {
    /// Starts it and answers its pid. The caller watches it by pidfd.
    pub fn spawn(self) -> Result<i32, VmmError> {
        let started = |error: io::Error| {
            VmmError::Start(format!("{} cannot be started in its own view: {error}", self.program.display()))
        };
        let program =
            child::Program::new(self.program, self.args, self.stdout, self.stderr).map_err(started)?;
        let descriptors = high(self.descriptors).map_err(VmmError::io("descriptors"))?;
        let filter = filter::build().map_err(VmmError::io("the system call filter"))?;
        let us = nix::unistd::getpid();
        let prepare = || -> io::Result<()> {
            // A session of its own: no terminal's signal and no daemon's end reaches it.
            nix::unistd::setsid()?;
            inherit_nothing()?;
            limit_core()?;
            if let Some(data) = self.data {
                nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_DATA, data, data)?;
            }
            if let Some(Confined { uid, view, network }) = &self.confined {
                match network {
                    Network::None => unshare(CloneFlags::CLONE_NEWNET)?,
                    Network::Inside(netns) => setns(netns, CloneFlags::CLONE_NEWNET)?,
                }
                view.enter()?;
                child::become_user(*uid)?;
            }
            if self.ends_with_us {
                // A change of user takes this away, so not before.
                nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL)?;
                if nix::unistd::getppid() != us {
                    return Err(io::Error::from_raw_os_error(libc::ESRCH));
                }
            }
            // Their numbers may be those of what was needed until here.
            for (from, to) in &descriptors {
                duplicate(from.as_raw_fd(), *to)?;
            }
            nix::sys::prctl::set_no_new_privs()?;
            seccompiler::apply_filter(&filter).map_err(|_| io::Error::from_raw_os_error(libc::ENOSYS))
        };
        program.start(self.cgroup.as_ref().map(AsFd::as_fd), prepare).map_err(started)
    }
}

/// Whether a program is there at all.
pub fn present(program: &Path, package: &'static str) -> Result<(), VmmError> {
    let missing = |source| VmmError::Missing { program: program.display().to_string(), package, source };
    program.metadata().map(drop).map_err(missing)
}

/// The way into the VM's control group, whose limits are in force as far as that is demanded. What the host does not offer is noted and
/// said aloud.
pub fn enclose(
    root: Option<&Path>,
    demand: Demand,
    spec: &VmSpec,
    io: IoLimits,
    notes: &mut Vec<String>,
) -> Result<Option<OwnedFd>, VmmError> {
    let refused = |what: &str| {
        VmmError::Start(format!(
            "it would have no limits of CPU, memory and processes: {what}; under systemd set Delegate=yes in the unit, elsewhere mount \
             cgroup2 where it can be written, or set cgroup_limits = \"best-effort\""
        ))
    };
    let Some(root) = root else {
        if demand == Demand::Required {
            return Err(refused("this host delegates no control groups of version 2"));
        }
        notes.push("no control group".into());
        tracing::warn!(vm = %spec.id, "this host delegates no control groups of version 2: the VM has no CPU, memory, process and disk \
            limits of the host's; under systemd set Delegate=yes in the unit, elsewhere mount cgroup2 at /sys/fs/cgroup");
        return Ok(None);
    };
    let limits = Limits { cpus: spec.vcpus, memory_mib: spec.memory_mib, pids: spec.vcpus + THREADS, io };
    // Its own disk and the image's, which may lie elsewhere.
    let folders = [Some(spec.dir.as_path()), spec.image.as_ref().map(|image| image.dir())];
    let mut disks: Vec<_> = folders.into_iter().flatten().filter_map(block::device_of).collect();
    disks.sort();
    disks.dedup();
    let made = Cgroup::create(root, spec.id.as_str(), limits, &disks);
    match made.and_then(|made| Ok((made.group.entrance()?, made))) {
        Ok((entrance, Made { missing, refused: unset, absent, .. })) => {
            let unset = match demand {
                Demand::Required => [unset, absent].concat(),
                Demand::Offered => unset,
                Demand::BestEffort => Vec::new(),
            };
            if !unset.is_empty() {
                return Err(refused(&format!(
                    "not in force below {} are {}",
                    root.display(),
                    unset.join(", ")
                )));
            }
            if !missing.is_empty() {
                notes.push(format!("no limit for {}", missing.join(", ")));
                tracing::warn!(vm = %spec.id, ?missing, "the host's control groups do not offer these limits");
            }
            Ok(Some(entrance))
        }
        Err(error) if demand != Demand::BestEffort => {
            Err(refused(&format!("its control group below {} cannot be made ({error})", root.display())))
        }
        Err(error) => {
            notes.push("no control group".into());
            tracing::warn!(vm = %spec.id, %error, "no control group for the VMM");
            Ok(None)
        }
    }
}

/// Processes that run as the VM's own user with its id among their words: its VMMs.
pub fn orphans(vm: &str, uid: u32) -> Vec<ProcessRef> {
    use std::os::unix::fs::MetadataExt as _;
    let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.filter(|pid| std::fs::metadata(format!("/proc/{pid}")).is_ok_and(|meta| meta.uid() == uid))
        .filter(|pid| {
            let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            words.split(|byte| *byte == 0).any(|word| String::from_utf8_lossy(word).contains(vm))
        })
        .filter_map(|pid| ProcessRef::of(pid).ok())
        .collect()
}

/// Moves descriptors out of the way of the numbers that they will get, so that none overwrites another.
fn high(descriptors: Vec<(OwnedFd, RawFd)>) -> io::Result<Vec<(OwnedFd, RawFd)>> {
    descriptors.into_iter().map(|(from, to)| Ok((duplicate_above(&from, HANDED)?, to))).collect()
}

#[expect(unsafe_code, reason = "fcntl's result has to be taken as a descriptor")]
fn duplicate_above(fd: &OwnedFd, least: RawFd) -> io::Result<OwnedFd> {
    let new = nix::fcntl::fcntl(fd, nix::fcntl::FcntlArg::F_DUPFD_CLOEXEC(least))?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(new) })
}

#[expect(unsafe_code, reason = "the target is a number that nobody owns yet")]
fn duplicate(from: RawFd, to: RawFd) -> io::Result<()> {
    // SAFETY: only in the child, before exec; nothing there owns the target number.
    match unsafe { libc::dup2(from, to) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

/// No descriptor that the daemon itself was started with goes on to a VMM: a lock, a log, a socket of whoever started it. Those that
/// are given numbers after this lose the mark again.
#[expect(unsafe_code, reason = "close_range has no safe form")]
pub fn inherit_nothing() -> io::Result<()> {
    // SAFETY: only marks descriptors; none is closed before exec.
    let done =
        unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_CLOEXEC) };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

fn limit_core() -> io::Result<()> {
    // A core of a VMM is the guest's whole memory.
    Ok(nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?)
}

/// A VMM's log, appended to.
pub fn log(path: &Path) -> Result<File, VmmError> {
    File::options()
        .append(true)
        .create(true)
        .mode(0o600)
        .open(path)
        .map_err(VmmError::io(path.display().to_string()))
}

/// Ends a child that nobody waits for yet, so that its number is still its own.
pub fn end_child(pid: i32) {
    let child = nix::unistd::Pid::from_raw(pid);
    let _ = nix::sys::signal::kill(child, nix::sys::signal::Signal::SIGKILL);
    let _ = nix::sys::wait::waitpid(child, None);
}

/// Opens a file for reading, or reading and writing, as a descriptor to be handed on.
pub fn open(path: &Path, write: bool) -> Result<OwnedFd, VmmError> {
    File::options()
        .read(true)
        .write(write)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .map(OwnedFd::from)
        .map_err(VmmError::io(path.display().to_string()))
}

/// The listening control socket: made by the daemon in the VM's folder, where the VMM itself cannot go.
pub fn control_socket(path: &Path) -> Result<OwnedFd, VmmError> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(VmmError::io("old control socket")(e)),
        _ => {}
    }
    let bind = || -> io::Result<UnixListener> {
        let (_folder, short) = crate::unix::short_path(path)?;
        UnixListener::bind(short)
    };
    bind().map(OwnedFd::from).map_err(VmmError::io(format!("control socket {}", path.display())))
}
