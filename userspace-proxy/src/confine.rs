//! What the proxy's threads may ask of the kernel: sockets, memory, time, and nothing else. Owns the confinement of the
//! calling thread and of all that it starts afterwards.
//!
//! Threads share memory with the rest of the daemon, so this is no boundary against code that runs at will in them: it
//! takes away what a bug could use at once. Must never serve where it could not be put in place.

use caps::{CapSet, Capability, CapsHashSet};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
};
use std::{collections::BTreeMap, io};

/// Pipes beyond an unprivileged user's share: without it, one VM's many transfers would make all others' pipes small.
const KEPT: Capability = Capability::CAP_SYS_RESOURCE;

/// Calls that are allowed whatever their arguments.
const ALLOWED: &[i64] = &[
    // Sockets.
    libc::SYS_accept4,
    libc::SYS_bind,
    libc::SYS_connect,
    libc::SYS_getpeername,
    libc::SYS_getsockname,
    libc::SYS_getsockopt,
    libc::SYS_recvfrom,
    libc::SYS_recvmmsg,
    libc::SYS_recvmsg,
    libc::SYS_sendmmsg,
    libc::SYS_sendmsg,
    libc::SYS_sendto,
    libc::SYS_setsockopt,
    libc::SYS_shutdown,
    // Descriptors that are open.
    libc::SYS_close,
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_eventfd2,
    libc::SYS_fcntl,
    libc::SYS_pipe2,
    libc::SYS_ppoll,
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_splice,
    libc::SYS_write,
    libc::SYS_writev,
    // Memory.
    libc::SYS_brk,
    libc::SYS_madvise,
    libc::SYS_mremap,
    libc::SYS_munmap,
    // Threads, time, chance.
    libc::SYS_clock_getres,
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_futex,
    libc::SYS_getpid,
    libc::SYS_getrandom,
    libc::SYS_gettid,
    libc::SYS_gettimeofday,
    libc::SYS_membarrier,
    libc::SYS_nanosleep,
    libc::SYS_restart_syscall,
    libc::SYS_rseq,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigreturn,
    libc::SYS_sched_getaffinity,
    libc::SYS_sched_yield,
    libc::SYS_set_robust_list,
    libc::SYS_sigaltstack,
    // An abort says so to its own thread.
    libc::SYS_tgkill,
];

/// Older forms of the same, which only this architecture has.
#[cfg(target_arch = "x86_64")]
const OLDER: &[i64] = &[libc::SYS_epoll_wait, libc::SYS_poll, libc::SYS_time];
#[cfg(not(target_arch = "x86_64"))]
const OLDER: &[i64] = &[];

/// Takes from this thread, and from those that it starts, all that the proxy does not need.
pub(crate) fn confine() -> io::Result<()> {
    let filter = filter()?;
    let held = caps::read(None, CapSet::Permitted).map_err(io::Error::other)?;
    let kept: CapsHashSet = held.into_iter().filter(|held| *held == KEPT).collect();
    caps::clear(None, CapSet::Ambient).map_err(io::Error::other)?;
    caps::clear(None, CapSet::Inheritable).map_err(io::Error::other)?;
    caps::set(None, CapSet::Effective, &kept).map_err(io::Error::other)?;
    caps::set(None, CapSet::Permitted, &kept).map_err(io::Error::other)?;
    nix::sys::prctl::set_no_new_privs()?;
    seccompiler::apply_filter(&filter).map_err(io::Error::other)
}

fn filter() -> io::Result<BpfProgram> {
    use SeccompCmpOp::{Eq, MaskedEq};
    let when = |argument, operator, value| -> io::Result<SeccompRule> {
        SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(io::Error::other)
    };
    let bits = |bits: libc::c_int| u64::from(bits.unsigned_abs());
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().chain(OLDER).map(|call| (*call, Vec::new())).collect();
    let inet = [libc::AF_INET, libc::AF_INET6].map(|family| when(0, Eq, bits(family)));
    rules.insert(libc::SYS_socket, inet.into_iter().collect::<io::Result<_>>()?);
    // Nothing but "does not block", which the standard library sets by it.
    rules.insert(libc::SYS_ioctl, vec![when(1, Eq, 0x5421)?]);
    let writable = || when(2, MaskedEq(bits(libc::PROT_EXEC)), 0);
    rules.insert(libc::SYS_mmap, vec![writable()?]);
    rules.insert(libc::SYS_mprotect, vec![writable()?]);
    let thread = bits(libc::CLONE_THREAD);
    rules.insert(libc::SYS_clone, vec![when(0, MaskedEq(thread), thread)?]);
    let architecture = std::env::consts::ARCH.try_into().map_err(io::Error::other)?;
    // As if the kernel had no such call: from `clone3`, whose flags no filter sees, the C library then turns to `clone`.
    let refuse = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    SeccompFilter::new(rules, refuse, SeccompAction::Allow, architecture)
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        fs::File,
        net::{TcpListener, TcpStream},
        process::Command,
        thread,
    };

    fn status(field: &str) -> String {
        let text = std::fs::read_to_string("/proc/thread-self/status").unwrap();
        text.lines().find_map(|line| line.strip_prefix(field)).unwrap().trim().to_owned()
    }

    #[test]
    fn a_confined_thread_has_sockets_and_nothing_else() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let at = listener.local_addr().unwrap();
        let confined = thread::spawn(move || {
            confine().unwrap();
            let refused = || {
                let none: Option<&str> = None;
                let refused = |what: &str, done: io::Result<()>| {
                    assert_eq!(done.unwrap_err().raw_os_error(), Some(libc::ENOSYS), "{what}");
                };
                refused("open", File::open("/etc/hostname").map(drop));
                refused("create", File::create("/tmp/tapgate-confined").map(drop));
                refused("unlink", std::fs::remove_file("/tmp/tapgate-confined"));
                refused("unix", std::os::unix::net::UnixStream::pair().map(drop));
                refused(
                    "unshare",
                    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).map_err(Into::into),
                );
                refused("chroot", nix::unistd::chroot("/").map_err(Into::into));
                refused(
                    "execve",
                    nix::unistd::execve(c"/bin/true", &[c""; 0], &[c""; 0]).map(drop).map_err(Into::into),
                );
                let kill = nix::sys::signal::kill(nix::unistd::Pid::this(), None);
                refused("kill", kill.map_err(Into::into));
                let mount = nix::mount::mount(none, "/", none, nix::mount::MsFlags::MS_PRIVATE, none);
                refused("mount", mount.map_err(Into::into));
                assert!(Command::new("/bin/true").spawn().is_err());
            };
            refused();
            // What it starts is no freer.
            thread::spawn(refused).join().unwrap();
            let stream = TcpStream::connect(at).unwrap();
            stream.set_nonblocking(true).unwrap();
            assert!(caps::read(None, CapSet::Effective).is_err(), "no call about capabilities is left");
        });
        confined.join().unwrap();
        // Who started it is as free as before.
        assert_eq!(status("Seccomp:"), "0");
        assert_eq!(status("NoNewPrivs:"), "0");
    }
}
