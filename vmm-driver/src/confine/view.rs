//! A mount view of its own for each VMM: an empty file system in memory with only the files that this one VM needs, each
//! mounted read-only unless it is the VM's own disk. Nothing of the host is reachable by a path.
//!
//! Everything is prepared before the fork, as descriptors; what is left for the child are system calls alone.

use super::scratch::{self, Scratch};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, OpenTreeFlags, fsconfig_create,
    fsconfig_set_string, fsmount, fsopen, move_mount, open_tree,
};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

/// Where a dynamic program's libraries are, and what QEMU reads beside them.
const LIBRARIES: [&str; 8] = [
    "/lib",
    "/lib32",
    "/lib64",
    "/usr/lib",
    "/usr/lib32",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
];

/// A view being put together, and then entered once.
#[derive(Debug)]
pub struct View {
    root: OwnedFd,
    at: CString,
    mounts: Vec<Bind>,
    uid: u32,
}

#[derive(Debug)]
struct Bind {
    from: OwnedFd,
    to: CString,
    flags: Option<MsFlags>,
}

impl View {
    /// An empty view. `at` is a folder that is there: the child, and only it, sees the view on it for a moment.
    pub fn new(at: &Path, uid: u32) -> io::Result<Self> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        for (key, value) in [("size", "256k"), ("mode", "0755")] {
            fsconfig_set_string(&fs, key, value)?;
        }
        fsconfig_create(&fs)?;
        let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::MOUNT_ATTR_NOSUID)?;
        Ok(Self { root, at: c_string(at)?, mounts: Vec::new(), uid })
    }

    /// A file or folder of the host, read-only.
    pub fn read_only(&mut self, from: &Path, to: &str) -> io::Result<()> {
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        self.bind(from, Path::new(to), flags)
    }

    /// A file of the host for reading and writing: the VM's disk.
    pub fn writable(&mut self, from: &Path, to: &str) -> io::Result<()> {
        self.bind(from, Path::new(to), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC)
    }

    /// A character device, the VMM's own.
    pub fn device(&mut self, path: &str, major: u64, minor: u64) -> io::Result<()> {
        let node = self.inside(Path::new(path))?;
        mknod(&node, SFlag::S_IFCHR, Mode::S_IRUSR | Mode::S_IWUSR, makedev(major, minor))?;
        std::os::unix::fs::chown(&node, Some(self.uid), Some(self.uid))
    }

    /// The program at its own path, and its libraries if it has any.
    pub fn program(&mut self, program: &Path) -> io::Result<()> {
        if is_dynamic(program)? {
            for path in LIBRARIES.map(Path::new) {
                match path.symlink_metadata() {
                    Ok(data) if data.is_symlink() => symlink(fs::read_link(path)?, self.inside(path)?)?,
                    Ok(_) => self.library(path)?,
                    Err(_) => {}
                }
            }
        }
        // A program below a folder that is there already needs no mount of its own.
        let covered = self.mounts.iter().any(|bind| {
            let to = Path::new(std::ffi::OsStr::from_bytes(bind.to.as_bytes()));
            to.strip_prefix(self.mount_point()).is_ok_and(|to| program.starts_with(Path::new("/").join(to)))
        });
        if covered { Ok(()) } else { self.library(program) }
    }

    /// Something of the host at the same place, read-only, if it is there.
    pub fn same(&mut self, path: &Path) -> io::Result<()> {
        if path.exists() { self.library(path) } else { Ok(()) }
    }

    /// The place where the VMM may write.
    pub fn scratch(&mut self, scratch: &Scratch) -> io::Result<()> {
        fs::create_dir(self.inside(Path::new(scratch::AT))?)?;
        let to = self.target(Path::new(scratch::AT))?;
        self.mounts.push(Bind { from: scratch.descriptor().try_clone()?, to, flags: None });
        Ok(())
    }

    /// Goes there for good. For the child between fork and exec: system calls alone, no allocation.
    pub(super) fn enter(&self) -> io::Result<()> {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWIPC | CloneFlags::CLONE_NEWUTS)?;
        mount(None::<&str>, c"/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        attach(&self.root, &self.at)?;
        for bind in &self.mounts {
            attach(&bind.from, &bind.to)?;
            if let Some(flags) = bind.flags {
                let again = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | flags;
                mount(None::<&str>, bind.to.as_c_str(), None::<&str>, again, None::<&str>)?;
                mount(None::<&str>, bind.to.as_c_str(), None::<&str>, MsFlags::MS_PRIVATE, None::<&str>)?;
            }
        }
        let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOSUID;
        mount(None::<&str>, self.at.as_c_str(), None::<&str>, sealed, None::<&str>)?;
        nix::unistd::chdir(self.at.as_c_str())?;
        // The old root comes to lie on the new one, and goes from there.
        nix::unistd::pivot_root(c".", c".")?;
        umount2(c".", MntFlags::MNT_DETACH)?;
        Ok(nix::unistd::chdir(c"/")?)
    }

    fn library(&mut self, path: &Path) -> io::Result<()> {
        self.bind(path, path, MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV)
    }

    fn bind(&mut self, from: &Path, to: &Path, flags: MsFlags) -> io::Result<()> {
        let is_dir = fs::metadata(from)?.is_dir();
        let point = self.inside(to)?;
        if is_dir {
            fs::create_dir(&point)?
        } else {
            File::create_new(&point).map(drop)?
        }
        let clone = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let from = open_tree(rustix::fs::CWD, from, clone)?;
        let to = self.target(to)?;
        self.mounts.push(Bind { from, to, flags: Some(flags) });
        Ok(())
    }

    fn mount_point(&self) -> &Path {
        Path::new(std::ffi::OsStr::from_bytes(self.at.as_bytes()))
    }

    /// The place as the child will see it.
    fn target(&self, to: &Path) -> io::Result<CString> {
        c_string(&self.mount_point().join(relative(to)))
    }

    /// The place as this process sees it now, its parents made.
    fn inside(&self, to: &Path) -> io::Result<PathBuf> {
        let place = PathBuf::from(format!("/proc/self/fd/{}", self.root.as_raw_fd())).join(relative(to));
        if let Some(parent) = place.parent() {
            fs::create_dir_all(parent)?;
        }
        Ok(place)
    }
}

fn attach(from: &OwnedFd, to: &std::ffi::CStr) -> io::Result<()> {
    Ok(move_mount(from, c"", rustix::fs::CWD, to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn relative(path: &Path) -> &Path {
    path.strip_prefix("/").unwrap_or(path)
}

fn c_string(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Whether a program names an interpreter (the dynamic loader) in its ELF header. A script counts as dynamic.
fn is_dynamic(program: &Path) -> io::Result<bool> {
    const PT_INTERP: u32 = 3;
    let mut head = Vec::new();
    File::open(program)?.take(4096).read_to_end(&mut head)?;
    let word =
        |at: usize| -> Option<u16> { Some(u16::from_le_bytes(head.get(at..at + 2)?.try_into().ok()?)) };
    let headers = || -> Option<bool> {
        let start = u64::from_le_bytes(head.get(32..40)?.try_into().ok()?);
        let (size, count) = (usize::from(word(54)?), usize::from(word(56)?));
        let start = usize::try_from(start).ok()?;
        (0..count).map(|n| head.get(start + n * size..)?.get(..4)).try_fold(false, |found, kind| {
            Some(found || u32::from_le_bytes(kind?.try_into().ok()?) == PT_INTERP)
        })
    };
    // A 64-bit little-endian ELF file whose headers lie in its first page; anything else may need whatever it needs.
    if head.starts_with(b"\x7fELF\x02\x01") { Ok(headers().unwrap_or(true)) } else { Ok(true) }
}
