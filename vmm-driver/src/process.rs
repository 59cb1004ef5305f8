//! Processes that outlive the daemon: identified beyond their number, waited for without being their parent.
//!
//! A pid alone means nothing after a restart: it may be another process by then. A [`ProcessRef`] is pid, start time and
//! boot; signals go through a pidfd, so they never hit a stranger.

use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};
use tokio::io::unix::AsyncFd;

/// One process, for as long as it lives and never another.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessRef {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since the machine's boot.
    pub start_time: u64,
    /// Which boot of the machine.
    pub boot_id: String,
}

/// An open reference to a process: signals and waiting.
#[derive(Debug)]
pub struct Process {
    identity: ProcessRef,
    fd: AsyncFd<OwnedFd>,
}

/// How a process ended, as far as the kernel tells: its parent learns the status, others only that it is gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ended {
    /// Exited with this code.
    Code(i32),
    /// Killed by this signal.
    Signal(i32),
    /// Gone; nobody told us how.
    Unknown,
}

impl ProcessRef {
    /// The identity of a process that is alive now.
    pub fn of(pid: i32) -> io::Result<Self> {
        let start_time = start_time(pid)?;
        Ok(Self { pid, start_time, boot_id: boot_id()? })
    }

    /// Whether it is stopped by a signal (or a debugger).
    pub fn is_stopped(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        stat.rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with(['T', 't']))
    }
}

impl Process {
    /// Opens the process if it is still the same one and not a zombie.
    pub fn open(identity: &ProcessRef) -> io::Result<Option<Self>> {
        if identity.boot_id != boot_id()? {
            return Ok(None);
        }
        let fd = match pidfd_open(identity.pid) {
            Ok(fd) => fd,
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => return Ok(None),
            Err(e) => return Err(e),
        };
        // The number is held by the pidfd from here on, so this is about the process we opened.
        if start_time(identity.pid).ok() != Some(identity.start_time) {
            return Ok(None);
        }
        Ok(Some(Self { identity: identity.clone(), fd: register(fd)? }))
    }

    /// Its identity.
    pub fn identity(&self) -> &ProcessRef {
        &self.identity
    }

    /// Sends a signal; a process that is gone is no error.
    #[expect(unsafe_code, reason = "pidfd_send_signal has no safe wrapper")]
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let fd = self.fd.get_ref().as_raw_fd();
        // SAFETY: an open pidfd, a number and a null siginfo, which the call allows.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, fd, signal, std::ptr::null::<u8>(), 0) };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                e => Err(e),
            },
        }
    }

    /// Waits until it has ended; reaps it if it is our child.
    pub async fn wait(&self) -> io::Result<Ended> {
        let _ready = self.fd.readable().await?;
        Ok(self.reap())
    }

    /// Comes back when it has ended, and leaves how it did to whoever waits for that.
    pub async fn over(&self) {
        // Where the kernel cannot tell, whoever waits for its end learns it.
        if self.fd.readable().await.is_err() {
            std::future::pending().await
        }
    }

    #[expect(unsafe_code, reason = "waitid on a pidfd has no safe wrapper here")]
    fn reap(&self) -> Ended {
        // SAFETY: an all-zero siginfo is valid, and the kernel fills it.
        let mut info: libc::siginfo_t = unsafe { std::mem::zeroed() };
        let id = self.fd.get_ref().as_raw_fd() as libc::id_t;
        // SAFETY: the pidfd is open and `info` outlives the call.
        let result = unsafe { libc::waitid(libc::P_PIDFD, id, &mut info, libc::WEXITED | libc::WNOHANG) };
        // SAFETY: waitid filled the structure for a child.
        let (pid, status) = unsafe { (info.si_pid(), info.si_status()) };
        match (result, info.si_code) {
            (0, _) if pid == 0 => Ended::Unknown,
            (0, libc::CLD_EXITED) => Ended::Code(status),
            (0, libc::CLD_KILLED | libc::CLD_DUMPED) => Ended::Signal(status),
            _ => Ended::Unknown,
        }
    }
}

#[expect(unsafe_code, reason = "registering asks for a promise about the descriptor")]
fn register(fd: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` answers the same open descriptor for as long as it lives.
    unsafe { AsyncFd::register(fd) }.map_err(io::Error::from)
}

#[expect(unsafe_code, reason = "pidfd_open has no safe wrapper")]
fn pidfd_open(pid: i32) -> io::Result<OwnedFd> {
    // SAFETY: two numbers in, a new descriptor (close-on-exec) or -1 out.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, libc::PIDFD_NONBLOCK) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Field 22 of `/proc/<pid>/stat`; the name before it may hold spaces and parentheses. A zombie has none for us.
fn start_time(pid: i32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_start_time(&stat).ok_or_else(|| io::Error::other(format!("process {pid} has ended")))
}

fn parse_start_time(stat: &str) -> Option<u64> {
    let mut fields = stat.rsplit_once(')')?.1.split_ascii_whitespace();
    if matches!(fields.next()?, "Z" | "X") {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn names_with_parentheses_do_not_shift_the_fields() {
        let rest: Vec<String> = (4..30).map(|n| n.to_string()).collect();
        let stat = format!("7 (a) S (b)) R {}", rest.join(" "));
        assert_eq!(parse_start_time(&stat), Some(22));
        assert_eq!(parse_start_time("7 (x) Z 1 2 3"), None);
        assert_eq!(parse_start_time("rubbish"), None);
    }

    #[tokio::test]
    async fn a_process_is_found_again_waited_for_and_never_mistaken() {
        #[expect(clippy::zombie_processes, reason = "the pidfd reaps it")]
        let child = Command::new("sleep").arg("1000").spawn().unwrap();
        let identity = ProcessRef::of(child.id() as i32).unwrap();
        let process = Process::open(&identity).unwrap().expect("alive");
        let stranger = ProcessRef { start_time: identity.start_time + 1, ..identity.clone() };
        assert!(Process::open(&stranger).unwrap().is_none());
        let other_boot = ProcessRef { boot_id: "x".into(), ..identity.clone() };
        assert!(Process::open(&other_boot).unwrap().is_none());
        process.signal(libc::SIGKILL).unwrap();
        assert_eq!(process.wait().await.unwrap(), Ended::Signal(libc::SIGKILL));
        assert!(Process::open(&identity).unwrap().is_none());
        process.signal(libc::SIGKILL).unwrap();
    }
}
