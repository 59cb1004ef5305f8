//! Which block device a file lies on, as `io.max` of the control groups names it: the whole disk, by number.
//!
//! Only reads. Where no device stands behind a file system (a network's, one in memory) the answer is that there is none.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

/// A disk's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Device {
    major: u64,
    minor: u64,
}

impl Device {
    fn of(number: u64) -> Self {
        Self { major: nix::sys::stat::major(number), minor: nix::sys::stat::minor(number) }
    }

    fn entry(self) -> PathBuf {
        PathBuf::from(format!("/sys/dev/block/{self}"))
    }

    /// The disk that a partition is on; the kernel limits whole disks alone (`ENODEV` for a partition).
    fn whole(self) -> Option<Self> {
        let entry = self.entry();
        if !entry.exists() {
            return None;
        }
        if !entry.join("partition").exists() {
            return Some(self);
        }
        let parent = fs::canonicalize(&entry).ok()?.parent()?.join("dev");
        fs::read_to_string(parent).ok()?.trim().parse().ok()
    }
}

impl std::fmt::Display for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

impl std::str::FromStr for Device {
    type Err = io::Error;

    fn from_str(text: &str) -> io::Result<Self> {
        let numbers = text.split_once(':').and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
        let (major, minor) = numbers.ok_or_else(|| io::Error::other("not a device's number"))?;
        Ok(Self { major, minor })
    }
}

/// The disk that the file or folder lies on.
pub fn device_of(path: &Path) -> Option<Device> {
    let number = fs::metadata(path).ok()?.dev();
    // File systems of several disks (btrfs) have numbers of their own; what is mounted has a name.
    Device::of(number).whole().or_else(|| mounted(&fs::read_to_string("/proc/self/mountinfo").ok()?, number))
}

/// The device that was mounted as the file system of this number (proc_pid_mountinfo(5)).
fn mounted(mounts: &str, number: u64) -> Option<Device> {
    let wanted = Device::of(number).to_string();
    let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some(&wanted))?;
    let source = line.split_once(" - ")?.1.split(' ').nth(1)?;
    let data = fs::metadata(source).ok().filter(|_| source.starts_with("/dev/"))?;
    Device::of(data.rdev()).whole()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_its_disk_and_memory_is_none() {
        assert_eq!(device_of(Path::new("/proc")), None);
        assert_eq!(device_of(Path::new("/nowhere")), None);
        for entry in fs::read_dir("/sys/class/block").into_iter().flatten().flatten() {
            let number = fs::read_to_string(entry.path().join("dev")).unwrap();
            let whole = number.trim().parse::<Device>().unwrap().whole().unwrap();
            assert!(!whole.entry().join("partition").exists(), "{whole}");
        }
    }

    #[test]
    fn a_file_system_with_a_number_of_its_own_is_found_by_what_is_mounted() {
        let Some(disk) = fs::read_dir("/sys/class/block").into_iter().flatten().flatten().next() else {
            return;
        };
        let name = disk.file_name().into_string().unwrap();
        let Ok(node) = fs::metadata(format!("/dev/{name}")) else { return };
        let number = nix::sys::stat::makedev(0, 47);
        let text = format!(
            "30 1 0:47 /sub /data rw shared:1 - btrfs /dev/{name} rw\n31 1 0:48 / /x rw - tmpfs tmpfs rw\n"
        );
        assert_eq!(mounted(&text, number), Device::of(node.rdev()).whole());
        assert_eq!(mounted(&text, nix::sys::stat::makedev(0, 48)), None);
    }
}
