//! Starts QEMU as a process of its own: a session of its own, no privileges, only the descriptors that it needs.
//!
//! Owns what happens between fork and exec. Must never leave the child a right or a descriptor that is not listed.

use crate::process::ProcessRef;
use crate::spec::VmmError;
use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

/// First of the user ids that VMMs run as: one for each slot, so that no VMM may touch another's process.
const UID_BASE: u32 = 1_730_000_000;
const UIDS: u32 = 16_000_000;

/// The user id of a VM's VMM.
pub fn uid_of(slot: u32) -> u32 {
    UID_BASE + slot % UIDS
}

/// What a process is started with.
pub struct Launch<'a> {
    /// The program.
    pub program: &'a Path,
    /// Its arguments.
    pub args: Vec<OsString>,
    /// Where its complaints go.
    pub log: &'a Path,
    /// Its user and group id; `None` where the daemon is not root and has nothing to give up.
    pub uid: Option<u32>,
    /// Groups that it is in besides.
    pub groups: Vec<nix::unistd::Gid>,
    /// Descriptors and the numbers they get.
    pub descriptors: Vec<(OwnedFd, RawFd)>,
    /// The entrance of its control group.
    pub cgroup: Option<OwnedFd>,
}

impl Launch<'_> {
    /// Starts it and answers its pid. The caller watches it by pidfd.
    pub fn spawn(self) -> Result<i32, VmmError> {
        let log = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.log)
            .map_err(VmmError::io(self.log.display().to_string()))?;
        let error = log.try_clone().map_err(VmmError::io("log"))?;
        let mut command = Command::new(self.program);
        command.args(&self.args).env_clear().current_dir("/").stdin(Stdio::null()).stdout(log).stderr(error);
        let descriptors = high(self.descriptors).map_err(VmmError::io("descriptors"))?;
        let cgroup = self.cgroup;
        let (uid, groups) = (self.uid, self.groups);
        let prepare = move || -> io::Result<()> {
            // A session of its own: no terminal's signal and no daemon's end reaches it.
            nix::unistd::setsid()?;
            if let Some(cgroup) = &cgroup {
                nix::unistd::write(cgroup, b"0")?;
            }
            for (from, to) in &descriptors {
                duplicate(from.as_raw_fd(), *to)?;
            }
            limit_core()?;
            if let Some(uid) = uid {
                nix::unistd::setgroups(&groups)?;
                let (user, group) = (nix::unistd::Uid::from_raw(uid), nix::unistd::Gid::from_raw(uid));
                nix::unistd::setresgid(group, group, group)?;
                // From root to another id: the kernel takes every capability away.
                nix::unistd::setresuid(user, user, user)?;
            }
            nix::sys::prctl::set_no_new_privs()?;
            Ok(())
        };
        before_exec(&mut command, prepare);
        let child = command.spawn().map_err(|source| VmmError::Missing {
            program: self.program.display().to_string(),
            package: "qemu-system-x86",
            source,
        })?;
        Ok(child.id() as i32)
    }
}

#[expect(unsafe_code, reason = "pre_exec has no safe form")]
fn before_exec(command: &mut Command, prepare: impl FnMut() -> io::Result<()> + Send + Sync + 'static) {
    // SAFETY: the closure only makes system calls, allocates nothing and takes no lock.
    unsafe { command.pre_exec(prepare) };
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
    descriptors.into_iter().map(|(from, to)| Ok((duplicate_above(&from, 64)?, to))).collect()
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

fn limit_core() -> io::Result<()> {
    // A core of a VMM is the guest's whole memory.
    Ok(nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_CORE, 0, 0)?)
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
        let (_folder, short) = crate::qmp::short_path(path)?;
        UnixListener::bind(short)
    };
    bind().map(OwnedFd::from).map_err(VmmError::io(format!("control socket {}", path.display())))
}
