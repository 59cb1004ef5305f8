//! A small file system in memory for what a VMM itself writes: its socket, its log, its guest's console.
//!
//! It is mounted in the VMM's view alone; the daemon holds a descriptor of it, which also reads the last words of one that
//! has ended. Of bounded size. What lies in it is the VMM's doing: nothing is followed, nothing is believed.

use nix::fcntl::{FallocateFlags, OFlag, fallocate, openat};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::unistd::{Whence, lseek};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt as _, fchown};
use std::os::unix::net::UnixStream;
use std::path::Path;

/// All that a VMM may write there.
const SIZE: &str = "2m";
const INODES: &str = "32";
/// Where it is in the view.
pub const AT: &str = "/run";

/// The file system's root folder.
#[derive(Debug)]
pub struct Scratch {
    root: OwnedFd,
    uid: u32,
}

impl Scratch {
    /// A new one, not mounted anywhere yet, whose owner is the VMM's user.
    pub fn create(uid: u32) -> io::Result<Self> {
        let fs = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let owner = uid.to_string();
        let options =
            [("size", SIZE), ("nr_inodes", INODES), ("mode", "0700"), ("uid", &owner), ("gid", &owner)];
        for (key, value) in options {
            fsconfig_set_string(&fs, key, value)?;
        }
        fsconfig_create(&fs)?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self { root, uid })
    }

    /// That of a VMM that runs already.
    pub fn of(pid: i32, uid: u32) -> io::Result<Self> {
        let flags = libc::O_PATH | libc::O_DIRECTORY | libc::O_NOFOLLOW;
        let path = format!("/proc/{pid}/root{AT}");
        let root = std::fs::OpenOptions::new().read(true).custom_flags(flags).open(path)?;
        Ok(Self { root: root.into(), uid })
    }

    /// The descriptor to be mounted.
    pub(super) fn descriptor(&self) -> &OwnedFd {
        &self.root
    }

    /// A file that the VMM appends to.
    pub fn append(&self, name: &str) -> io::Result<File> {
        let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_APPEND | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW;
        let file = openat(&self.root, name, flags, Mode::from_bits_truncate(0o600))?;
        fchown(&file, Some(self.uid), Some(self.uid))?;
        Ok(file.into())
    }

    /// Connects to a socket that the VMM made there.
    pub async fn connect(&self, name: &str) -> io::Result<UnixStream> {
        // A link in the socket's place could lead to any socket of the host.
        let flags = OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let socket = openat(&self.root, name, flags, Mode::empty())?;
        if SFlag::from_bits_truncate(fstat(&socket)?.st_mode) & SFlag::S_IFMT != SFlag::S_IFSOCK {
            return Err(io::Error::other(format!("{name} is not a socket")));
        }
        crate::unix::connect(Path::new(&format!("/proc/self/fd/{}", socket.as_raw_fd()))).await
    }

    /// Takes what was written to a file since the last time, at most `limit` octets, and frees its memory.
    pub fn drain(&self, name: &str, limit: u64) -> io::Result<Vec<u8>> {
        let mut file = self.open(name, OFlag::O_RDWR)?;
        let start = match lseek(&file, 0, Whence::SeekData) {
            Ok(start) => start,
            // No data after this place.
            Err(nix::errno::Errno::ENXIO) => return Ok(Vec::new()),
            Err(error) => return Err(error.into()),
        };
        let mut bytes = Vec::new();
        (&mut file).take(limit).read_to_end(&mut bytes)?;
        let length = i64::try_from(bytes.len()).map_err(io::Error::other)?;
        if length > 0 {
            let punch = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            fallocate(&file, punch, start, length)?;
        }
        // Of a page that was only partly taken the taken part reads as zeroes.
        let zeroes = bytes.iter().take_while(|byte| **byte == 0).count();
        bytes.drain(..zeroes);
        Ok(bytes)
    }

    /// The end of a text file, for people.
    pub fn tail(&self, name: &str, limit: u64) -> String {
        let read = || -> io::Result<Vec<u8>> {
            let mut file = self.open(name, OFlag::O_RDONLY)?;
            let length = file.metadata()?.len();
            io::Seek::seek(&mut file, io::SeekFrom::Start(length.saturating_sub(limit)))?;
            let mut bytes = Vec::new();
            file.take(limit).read_to_end(&mut bytes)?;
            Ok(bytes)
        };
        let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
        text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
    }

    fn open(&self, name: &str, access: OFlag) -> io::Result<File> {
        let flags = access | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
        let file = File::from(openat(&self.root, name, flags, Mode::empty())?);
        if file.metadata()?.is_file() {
            Ok(file)
        } else {
            Err(io::Error::other(format!("{name} is not a file")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    fn scratch() -> Option<Scratch> {
        nix::unistd::geteuid().is_root().then(|| Scratch::create(0).unwrap())
    }

    #[test]
    fn what_is_written_is_taken_once_and_never_fills_the_memory() {
        let Some(scratch) = scratch() else { return };
        let mut file = scratch.append("console").unwrap();
        let mut expected = Vec::new();
        let mut taken = Vec::new();
        // Five times what fits, in pieces that end anywhere in a page.
        for n in 0u32..5000 {
            let line = format!("line {n} {}\n", "x".repeat((n % 4000) as usize));
            file.write_all(line.as_bytes()).unwrap();
            expected.extend_from_slice(line.as_bytes());
            if n % 50 == 0 {
                taken.extend(scratch.drain("console", 1 << 20).unwrap());
            }
        }
        taken.extend(scratch.drain("console", 1 << 20).unwrap());
        assert!(expected.len() > 4 << 20 && taken == expected);
        assert!(scratch.drain("console", 1 << 20).unwrap().is_empty());
        assert!(file.write_all(&vec![b'x'; 4 << 20]).is_err(), "it is bounded");
    }

    #[tokio::test]
    async fn links_and_pipes_lead_nowhere() {
        let Some(scratch) = scratch() else { return };
        let inside = |name: &str| format!("/proc/self/fd/{}/{name}", scratch.root.as_raw_fd());
        std::os::unix::fs::symlink("/etc/passwd", inside("link")).unwrap();
        nix::unistd::mkfifo(inside("pipe").as_str(), Mode::S_IRWXU).unwrap();
        for name in ["link", "pipe", "nothing"] {
            assert!(scratch.drain(name, 10).is_err() && scratch.connect(name).await.is_err(), "{name}");
            assert_eq!(scratch.tail(name, 10), "");
        }
        assert!(scratch.append("link").is_err());
    }
}
