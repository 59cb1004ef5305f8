//! Named network namespaces under `/run/netns`, as `ip netns` keeps them: they outlive the process that made them.

use crate::NetnsError;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, setns, unshare},
};
use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
};

/// Where named namespaces are mounted.
const DIR: &str = "/run/netns";
const MAX_NAME: usize = 64;

/// A handle of a network namespace. Cloning shares it; dropping it never removes the namespace.
#[derive(Clone, Debug)]
pub struct Netns {
    name: Arc<str>,
    fd: Arc<OwnedFd>,
}

impl Netns {
    /// Makes a new namespace of this name. Fails if there is one.
    pub fn create(name: &str) -> Result<Self, NetnsError> {
        let path = path_of(name)?;
        let failed = |what| move |source| NetnsError::Namespace { what, name: name.to_owned(), source };
        share_directory().map_err(failed("prepare /run/netns for"))?;
        match OpenOptions::new().write(true).create_new(true).open(&path) {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                return Err(NetnsError::Exists(name.to_owned()));
            }
            Err(error) => return Err(failed("create")(error)),
        }
        // The new namespace belongs to a thread that ends at once; the bind mount keeps it.
        let made = on_fresh_thread(|| -> io::Result<()> {
            unshare(CloneFlags::CLONE_NEWNET)?;
            let source = Path::new("/proc/thread-self/ns/net");
            mount(Some(source), &path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        });
        if let Err(error) = made {
            let _ = std::fs::remove_file(&path);
            return Err(failed("create")(error));
        }
        Self::open(name)
    }

    /// Opens an existing namespace.
    pub fn open(name: &str) -> Result<Self, NetnsError> {
        let path = path_of(name)?;
        let file = File::open(&path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => NetnsError::Missing(name.to_owned()),
            _ => NetnsError::Namespace { what: "open", name: name.to_owned(), source },
        })?;
        let netns = Self { name: name.into(), fd: Arc::new(file.into()) };
        // A file that a crash left without its mount is no namespace: entering it says so.
        netns.try_run(|| ()).map_err(|source| NetnsError::Namespace {
            what: "enter",
            name: name.to_owned(),
            source,
        })?;
        Ok(netns)
    }

    /// The namespace that this process runs in.
    pub fn current() -> Result<Self, NetnsError> {
        let file = File::open("/proc/thread-self/ns/net").map_err(|source| NetnsError::Namespace {
            what: "open",
            name: "(own)".into(),
            source,
        })?;
        Ok(Self { name: "(own)".into(), fd: Arc::new(file.into()) })
    }

    /// Removes the name. The namespace itself goes with its last process, socket and descriptor. Removing what is
    /// not there is no error.
    pub fn delete(name: &str) -> Result<(), NetnsError> {
        let path = path_of(name)?;
        let failed = |source| NetnsError::Namespace { what: "remove", name: name.to_owned(), source };
        match umount2(&path, MntFlags::MNT_DETACH) {
            // EINVAL: a file without a mount, left by a crash.
            Ok(()) | Err(nix::errno::Errno::EINVAL | nix::errno::Errno::ENOENT) => {}
            Err(errno) => return Err(failed(errno.into())),
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Whether a namespace of this name is there.
    pub fn exists(name: &str) -> bool {
        path_of(name).is_ok_and(|path| path.exists())
    }

    /// The name it was made or opened by.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs the closure on a fresh thread inside the namespace and waits for it. Sockets made inside stay inside;
    /// the calling thread never leaves its own namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        self.try_run(work).map_err(|source| NetnsError::Namespace {
            what: "enter",
            name: self.name.to_string(),
            source,
        })
    }

    fn try_run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> io::Result<T> {
        on_fresh_thread(|| {
            setns(self.fd.as_fd(), CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        })
    }

    /// Writes a setting below `/proc/sys/net` of this namespace; `key` is the path below it.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<(), NetnsError> {
        let path = Path::new("/proc/sys/net").join(key);
        self.run(|| std::fs::write(&path, value))?.map_err(|source| NetnsError::Sysctl {
            path,
            value: value.to_owned(),
            source,
        })
    }

    /// Reads a setting below `/proc/sys/net` of this namespace.
    pub fn read_sysctl(&self, key: &str) -> Result<String, NetnsError> {
        let path = Path::new("/proc/sys/net").join(key);
        match self.run(|| std::fs::read_to_string(&path))? {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(source) => Err(NetnsError::Sysctl { path, value: "(read)".into(), source }),
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Runs on a thread that ends afterwards, so that no namespace change can leak into another task. A panic inside
/// goes on in the caller.
fn on_fresh_thread<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("netns".into()).spawn_scoped(scope, work)?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Makes `/run/netns` a shared mount, so that namespaces made here are seen in every mount namespace, as
/// `ip netns add` does.
fn share_directory() -> io::Result<()> {
    std::fs::create_dir_all(DIR)?;
    let lock = Flock::lock(File::open(DIR)?, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    let share = || mount(None::<&str>, DIR, None::<&str>, MsFlags::MS_SHARED | MsFlags::MS_REC, None::<&str>);
    if share().is_err() {
        mount(Some(DIR), DIR, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)?;
        share()?;
    }
    drop(lock);
    Ok(())
}

fn path_of(name: &str) -> Result<PathBuf, NetnsError> {
    let ok = (1..=MAX_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if ok { Ok(Path::new(DIR).join(name)) } else { Err(NetnsError::Name(name.to_owned(), MAX_NAME)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for name in ["", ".", "..", "a/b", "../x", "a b", "a\0", &"x".repeat(65)] {
            assert!(path_of(name).is_err(), "{name:?}");
        }
        assert!(path_of("tapgate-main.1_x").is_ok());
    }
}
