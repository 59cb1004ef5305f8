//! A child process that is born in its control group (`clone3` with `CLONE_INTO_CGROUP`): moving one there later waits for a
//! grace period of the kernel, 10 ms and more. Until `exec` it uses the daemon's memory, as after `vfork`: a copy of the page
//! tables would cost 70 µs for each MiB that the daemon holds.
//!
//! Owns everything up to `exec`. The C library does not know of such a child, so the child makes system calls alone: it must
//! never keep a lock, write to what others read, or let the C library tell other threads of a change of user.

use std::cell::Cell;
use std::convert::Infallible;
use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::ptr;

/// Handlers of signals are the parent's code (linux/sched.h; the libc crate has it as an `int`, which cannot hold it).
const CLEAR_SIGHAND: u64 = 0x1_0000_0000;
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// What is executed, made ready before the child is.
pub(super) struct Program {
    path: CString,
    words: Vec<CString>,
    stdin: File,
    stdout: File,
    stderr: File,
}

impl Program {
    /// The program, its arguments after its own name, and where its output goes.
    pub(super) fn new(path: &Path, args: Vec<OsString>, stdout: File, stderr: File) -> io::Result<Self> {
        let path = CString::new(path.as_os_str().as_bytes())?;
        let args = args.into_iter().map(|arg| CString::new(arg.into_vec()));
        let words = std::iter::once(Ok(path.clone())).chain(args).collect::<Result<_, _>>()?;
        Ok(Self { path, words, stdin: File::open("/dev/null")?, stdout, stderr })
    }

    /// Starts it with no environment, in the group if there is one, after the child has prepared itself. Answers its pid when it
    /// executes the program, or why it does not.
    pub(super) fn start(
        self,
        group: Option<BorrowedFd<'_>>,
        prepare: impl FnOnce() -> io::Result<()>,
    ) -> io::Result<i32> {
        let mut words: Vec<_> = self.words.iter().map(|word| word.as_ptr()).collect();
        words.push(ptr::null());
        let (failure, told) = io::pipe()?;
        // Away from the numbers that the child gives to what it is handed.
        let told = super::duplicate_above(&OwnedFd::from(told), super::HANDED)?;
        let prepare = Cell::new(Some(prepare));
        let mut job = || {
            let become_it = || prepare.take().map(|prepare| self.become_it(&words, prepare));
            // Whatever happens, the child never goes on as a second daemon.
            let error = std::panic::catch_unwind(AssertUnwindSafe(become_it)).ok().flatten();
            tell(told.as_raw_fd(), error.and_then(|error| error.raw_os_error()).unwrap_or(libc::EINVAL))
        };
        let pid = {
            let _masked = Masked::all()?;
            clone_into(group, &mut job)?
        };
        drop(told);
        let mut why = Vec::new();
        let read = File::from(OwnedFd::from(failure)).take(4).read_to_end(&mut why);
        match (read, why.first_chunk()) {
            (Ok(0), _) => Ok(pid),
            (Ok(_), Some(code)) => {
                super::end_child(pid);
                Err(io::Error::from_raw_os_error(i32::from_ne_bytes(*code)))
            }
            (Ok(_), None) => {
                super::end_child(pid);
                Err(io::ErrorKind::UnexpectedEof.into())
            }
            (Err(error), _) => {
                super::end_child(pid);
                Err(error)
            }
        }
    }

    /// In the child: comes back only if it cannot.
    #[expect(unsafe_code, reason = "exec has no safe form that allocates nothing")]
    fn become_it(
        &self,
        words: &[*const libc::c_char],
        prepare: impl FnOnce() -> io::Result<()>,
    ) -> io::Error {
        let prepared = || -> io::Result<()> {
            for (file, number) in [(&self.stdin, 0), (&self.stdout, 1), (&self.stderr, 2)] {
                super::duplicate(file.as_fd().as_raw_fd(), number)?;
            }
            nix::unistd::chdir(c"/")?;
            prepare()?;
            reset_signals();
            Ok(())
        };
        if let Err(error) = prepared() {
            return error;
        }
        let environment = [ptr::null()];
        // SAFETY: strings that end in NUL, in lists that end in null, made before the fork.
        unsafe { libc::execve(self.path.as_ptr(), words.as_ptr(), environment.as_ptr()) };
        io::Error::last_os_error()
    }
}

/// All signals blocked for the thread: none may find the child with the parent's mask and none of its threads.
struct Masked(libc::sigset_t);

impl Masked {
    #[expect(
        unsafe_code,
        reason = "nix's form of it answers the old mask in a type that cannot name them all"
    )]
    fn all() -> io::Result<Self> {
        // SAFETY: both sets are this function's own.
        unsafe {
            let (mut all, mut before) = (std::mem::zeroed(), std::mem::zeroed());
            libc::sigfillset(&mut all);
            match libc::pthread_sigmask(libc::SIG_BLOCK, &all, &mut before) {
                0 => Ok(Self(before)),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }
}

impl Drop for Masked {
    #[expect(unsafe_code, reason = "see `all`")]
    fn drop(&mut self) {
        // SAFETY: the mask that the thread had.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &self.0, ptr::null_mut()) };
    }
}

/// Tells the parent why there is no program, and ends.
#[expect(unsafe_code, reason = "the pipe's number in the child, and an end without the parent's clean-up")]
fn tell(to: RawFd, why: i32) -> Infallible {
    let why = why.to_ne_bytes();
    // SAFETY: four octets that are there; the process ends.
    unsafe {
        libc::write(to, why.as_ptr().cast(), why.len());
        libc::_exit(127)
    }
}

/// Room for the child's frames, the message of a panic included.
const STACK: usize = 256 * 1024;

type Job<'a> = &'a mut dyn FnMut() -> Infallible;

extern "C" fn begin(job: *mut Job<'_>) {
    // SAFETY: given by `clone_into`, which waits; the job does not come back.
    #[expect(unsafe_code, reason = "a pointer is what the kernel's interface leaves")]
    unsafe {
        (*job)();
    }
}

/// A child that does the job, with this process's memory and a stack of its own; comes back when it executes a program or ends.
#[expect(unsafe_code, reason = "clone3 has no safe form")]
fn clone_into(group: Option<BorrowedFd<'_>>, mut job: Job<'_>) -> io::Result<i32> {
    let mut stack: Vec<MaybeUninit<u128>> = Vec::with_capacity(STACK / size_of::<u128>());
    // SAFETY: all zero is what the kernel takes for "not given".
    let mut wanted: libc::clone_args = unsafe { std::mem::zeroed() };
    wanted.flags = CLEAR_SIGHAND | (libc::CLONE_VM | libc::CLONE_VFORK) as u64;
    wanted.exit_signal = libc::SIGCHLD as u64;
    wanted.stack = stack.as_mut_ptr() as u64;
    wanted.stack_size = STACK as u64;
    if let Some(group) = group {
        wanted.flags |= INTO_CGROUP;
        wanted.cgroup = group.as_raw_fd() as u64;
    }
    let result: isize;
    let (wanted, job) = (&raw const wanted, &raw mut job);
    // SAFETY: the child begins on its own stack, whose top is aligned as the ABI wants it, and calls `begin`, which does not come
    // back. This thread stands still until then, so all that the child is lent stays; the registers named are all that the
    // kernel changes (x86-64: syscall(2), "Architecture calling conventions"; arm64: the same).
    #[cfg(target_arch = "x86_64")]
    unsafe {
        std::arch::asm!(
            "syscall",
            "test rax, rax",
            "jnz 2f",
            "xor ebp, ebp",
            "mov rdi, r8",
            "call r9",
            "ud2",
            "2:",
            inlateout("rax") libc::SYS_clone3 as isize => result,
            in("rdi") wanted,
            in("rsi") size_of::<libc::clone_args>(),
            in("r8") job,
            in("r9") begin as extern "C" fn(*mut Job<'_>),
            lateout("rcx") _,
            lateout("r11") _,
        );
    }
    // SAFETY: as above.
    #[cfg(target_arch = "aarch64")]
    unsafe {
        std::arch::asm!(
            "svc #0",
            "cbnz x0, 2f",
            "mov x29, xzr",
            "mov x0, x3",
            "blr x4",
            "brk #1",
            "2:",
            inlateout("x0") wanted => result,
            in("x1") size_of::<libc::clone_args>(),
            in("x8") libc::SYS_clone3,
            in("x3") job,
            in("x4") begin as extern "C" fn(*mut Job<'_>),
        );
    }
    match i32::try_from(result) {
        Ok(pid @ 1..) => Ok(pid),
        Ok(error) => Err(io::Error::from_raw_os_error(-error)),
        Err(_) => Err(io::ErrorKind::Other.into()),
    }
}

/// No signal is ignored, as the daemon does with one and whoever started it with others, and none is blocked. As system calls,
/// for the C library keeps some signals to itself.
#[expect(unsafe_code, reason = "see the file's head")]
fn reset_signals() {
    /// Larger than the kernel's `struct sigaction`, of which all zero is the default action.
    const DEFAULT: [u64; 8] = [0; 8];
    const SIGNALS: i32 = 64;
    let none = 0u64;
    let (set, length) = (libc::SIG_SETMASK, size_of::<u64>());
    // SAFETY: only reads what is given. Two signals have no other action, and are refused.
    unsafe {
        for signal in 1..=SIGNALS {
            libc::syscall(libc::SYS_rt_sigaction, signal, DEFAULT.as_ptr(), ptr::null::<u64>(), length);
        }
        libc::syscall(libc::SYS_rt_sigprocmask, set, &raw const none, ptr::null::<u64>(), length);
    }
}

/// Gives up being root for good, in every id and group. System calls as they are: the C library would tell other threads.
#[expect(unsafe_code, reason = "see the file's head")]
pub(super) fn become_user(uid: u32) -> io::Result<()> {
    let id = libc::c_long::from(uid);
    let done = |result: libc::c_long| if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) };
    // SAFETY: numbers, and a list without entries.
    unsafe {
        done(libc::syscall(libc::SYS_setgroups, 0, ptr::null::<libc::gid_t>()))?;
        done(libc::syscall(libc::SYS_setresgid, id, id, id))?;
        // From root to another id: the kernel takes every capability away.
        done(libc::syscall(libc::SYS_setresuid, id, id, id))?;
        // The memory is still the daemon's: nobody of that id may look into it, whatever fs.suid_dumpable says.
        done(libc::syscall(libc::SYS_prctl, libc::PR_SET_DUMPABLE, 0, 0, 0, 0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cgroup::{Cgroup, IoLimits, Limits};

    fn cat(files: &[&str]) -> (Program, std::io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let out = || File::from(OwnedFd::from(writer.try_clone().unwrap()));
        let words = files.iter().map(Into::into).collect();
        (Program::new(Path::new("/bin/cat"), words, out(), out()).unwrap(), reader)
    }

    fn said(mut reader: std::io::PipeReader, pid: i32) -> String {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        nix::sys::wait::waitpid(nix::unistd::Pid::from_raw(pid), None).unwrap();
        text
    }

    /// What the kernel says of it: no signal of the daemon's, no right, no environment, and its group.
    #[test]
    fn a_child_has_nothing_of_its_parent() {
        let Some(root) = Cgroup::root().filter(|_| nix::unistd::geteuid().is_root()) else { return };
        let name = format!("test-child-{}", std::process::id());
        let io = IoLimits { mib_per_second: 0, operations_per_second: 0 };
        let limits = Limits { cpus: 1, memory_mib: 128, pids: 64, io };
        let group = Cgroup::create(&root, &name, limits, &[]).unwrap().group;
        let entrance = group.entrance().unwrap();
        let (program, reader) = cat(&["/proc/self/status", "/proc/self/cgroup", "/proc/self/environ"]);
        let pid = program.start(Some(entrance.as_fd()), || become_user(1_729_999_000)).unwrap();
        let text = said(reader, pid);
        group.remove().unwrap();
        let field = |name: &str| text.lines().find_map(|line| line.strip_prefix(name)).unwrap().trim();
        for (name, value) in [
            ("Uid:", "1729999000\t1729999000\t1729999000\t1729999000"),
            ("Gid:", "1729999000\t1729999000\t1729999000\t1729999000"),
            ("Groups:", ""),
            ("CapEff:", "0000000000000000"),
            ("CapPrm:", "0000000000000000"),
            ("SigBlk:", "0000000000000000"),
            ("SigIgn:", "0000000000000000"),
            ("SigCgt:", "0000000000000000"),
        ] {
            assert_eq!(field(name), value, "{name}");
        }
        assert!(text.trim_end().ends_with(&format!("/tapgate/{name}")), "{text}");
    }

    #[test]
    fn what_keeps_a_child_from_its_program_is_told() {
        let refused = || Err(io::Error::from_raw_os_error(libc::EXDEV));
        let error = cat(&[]).0.start(None, refused).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EXDEV));
        let (_, writer) = io::pipe().unwrap();
        let out = || File::from(OwnedFd::from(writer.try_clone().unwrap()));
        let absent = Program::new(Path::new("/nowhere/at-all"), Vec::new(), out(), out()).unwrap();
        assert_eq!(absent.start(None, || Ok(())).unwrap_err().kind(), io::ErrorKind::NotFound);
        let error = cat(&[]).0.start(None, || panic!("in the child")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EINVAL));
    }
}
