//! A control group (version 2) for each VMM: what one guest may use of the host's CPU, memory, processes and disks.
//!
//! Takes what the host offers: where a controller is not delegated, the group is still made (it is how all of a VMM's
//! processes are found) and the limits that are not in force are named aloud. What it offers and refuses is told apart from that.

use crate::block::Device;
use std::fs;
use std::io::{self, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

/// What a VMM may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// CPUs; one more half is for the VMM's own threads.
    pub cpus: u32,
    /// The guest's memory in MiB; what the VMM itself needs is added.
    pub memory_mib: u32,
    /// Threads and processes.
    pub pids: u32,
    /// Of each disk of the host that it uses.
    pub io: IoLimits,
}

/// What one VM may do with a disk of the host, reading and writing each. It holds for what reaches the disk: what the host has in
/// memory costs nothing, and what it writes later is counted when it does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct IoLimits {
    /// MiB a second; 0 for no limit.
    pub mib_per_second: u32,
    /// Operations a second; 0 for no limit.
    pub operations_per_second: u32,
}

impl Default for IoLimits {
    /// Less than one fast disk can do, more than a build notices.
    fn default() -> Self {
        Self { mib_per_second: 512, operations_per_second: 20_000 }
    }
}

impl IoLimits {
    /// A line of `io.max` (the kernel's Documentation/admin-guide/cgroup-v2.rst).
    fn line(self, device: Device) -> String {
        let number = |value: u64| if value == 0 { "max".to_owned() } else { value.to_string() };
        let octets = number(u64::from(self.mib_per_second) << 20);
        let operations = number(self.operations_per_second.into());
        format!("{device} rbps={octets} wbps={octets} riops={operations} wiops={operations}")
    }
}

/// When a VM may start without a limit of its CPU, memory or processes. Without a limit of its disks it may: not every disk takes one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Demand {
    /// Never.
    Required,
    /// Where the host does not offer it.
    #[default]
    Offered,
    /// Always.
    BestEffort,
}

/// A group that exists.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

/// A group that was made, and what is not in force there.
#[derive(Debug)]
pub struct Made {
    /// The group.
    pub group: Cgroup,
    /// The limits that could not be set.
    pub missing: Vec<String>,
    /// Those of them that a VM needs although the host offers them, and why.
    pub refused: Vec<String>,
    /// Those that it needs and the host does not offer.
    pub absent: Vec<String>,
}

/// What the VMM itself may use beyond the guest's memory: code, buffers, and under TCG the translated code.
const OVERHEAD_MIB: u64 = 512;
const PERIOD_US: u64 = 100_000;
const CONTROLLERS: [&str; 4] = ["cpu", "memory", "pids", "io"];
/// What keeps a VM from taking all of the host.
const NEEDED: [&str; 3] = ["cpu.max", "memory.max", "pids.max"];

/// What the tree does not offer of what VMs are limited by.
pub fn missing_controllers(root: &Path) -> Vec<&'static str> {
    let offered = fs::read_to_string(root.join("cgroup.controllers")).unwrap_or_default();
    let is_there = |name: &str| offered.split_whitespace().any(|word| word == name);
    CONTROLLERS.into_iter().filter(|name| !is_there(name)).collect()
}

impl Cgroup {
    /// Where the host's version-2 tree is, if it can be written.
    pub fn root() -> Option<PathBuf> {
        ["/sys/fs/cgroup", "/sys/fs/cgroup/unified"].map(PathBuf::from).into_iter().find(|path| {
            path.join("cgroup.controllers").exists()
                && nix::unistd::access(path, nix::unistd::AccessFlags::W_OK).is_ok()
        })
    }

    /// Makes `tapgate/<name>` under the root, for a VMM that uses these disks.
    pub fn create(root: &Path, name: &str, limits: Limits, disks: &[Device]) -> io::Result<Made> {
        let parent = root.join("tapgate");
        fs::create_dir_all(&parent)?;
        let mut not_on = Vec::new();
        for dir in [root, &parent] {
            for controller in CONTROLLERS {
                // Refused where it is not there; then the limit's file is not there either, and is named below.
                if let Err(error) = write(&dir.join("cgroup.subtree_control"), &format!("+{controller}")) {
                    not_on.push((controller, error));
                }
            }
        }
        let path = parent.join(name);
        match fs::create_dir(&path) {
            Err(e) if e.kind() != io::ErrorKind::AlreadyExists => return Err(e),
            _ => {}
        }
        let memory = (u64::from(limits.memory_mib) + OVERHEAD_MIB) << 20;
        let quota = u64::from(limits.cpus) * PERIOD_US + PERIOD_US / 2;
        let mut settings = vec![
            ("cpu.max", format!("{quota} {PERIOD_US}")),
            ("memory.max", memory.to_string()),
            ("memory.swap.max", "0".to_owned()),
            ("memory.oom.group", "1".to_owned()),
            ("pids.max", limits.pids.to_string()),
        ];
        settings.extend(disks.iter().map(|disk| ("io.max", limits.io.line(*disk))));
        let without = missing_controllers(root);
        let mut made =
            Made { group: Self { path }, missing: Vec::new(), refused: Vec::new(), absent: Vec::new() };
        for (file, value) in settings {
            let Err(error) = write(&made.group.path.join(file), &value) else { continue };
            let controller = file.split('.').next().unwrap_or_default();
            if NEEDED.contains(&file) && without.contains(&controller) {
                made.absent.push(file.to_owned());
            } else if NEEDED.contains(&file) {
                let first = not_on.iter().find(|(name, _)| *name == controller);
                let why = first.map_or(&error, |(_, why)| why);
                made.refused.push(format!("{file} ({why})"));
            }
            made.missing.push(file.to_owned());
        }
        if disks.is_empty() {
            made.missing.push("io.max (its files lie on no disk of this host)".to_owned());
        }
        made.missing.dedup();
        Ok(made)
    }

    /// The group of a VMM that runs already.
    pub fn open(root: &Path, name: &str) -> Option<Self> {
        let path = root.join("tapgate").join(name);
        path.is_dir().then_some(Self { path })
    }

    /// The group's folder, which a process may be born into.
    pub fn entrance(&self) -> io::Result<OwnedFd> {
        Ok(fs::File::open(&self.path)?.into())
    }

    /// Kills every member.
    pub fn kill(&self) {
        let _ = write(&self.path.join("cgroup.kill"), "1");
    }

    /// Removes the group once it is empty; one that is not stays until its last member is gone.
    pub fn remove(&self) -> io::Result<()> {
        match fs::remove_dir(&self.path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        }
    }
}

fn write(path: &Path, value: &str) -> io::Result<()> {
    // Not created: outside of the kernel's tree nothing of this may come into being.
    fs::OpenOptions::new().write(true).open(path)?.write_all(value.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_made_says_what_it_lacks_and_goes() {
        let Some(root) = Cgroup::root().filter(|_| nix::unistd::geteuid().is_root()) else { return };
        let name = format!("test-{}", std::process::id());
        let io = IoLimits { mib_per_second: 10, operations_per_second: 0 };
        let limits = Limits { cpus: 1, memory_mib: 128, pids: 64, io };
        let disk = crate::block::device_of(Path::new("/"));
        let Made { group, missing, refused, absent } =
            Cgroup::create(&root, &name, limits, disk.as_slice()).unwrap();
        assert_eq!(refused, Vec::<String>::new());
        assert!(absent.iter().all(|name| missing.contains(name)), "{absent:?}");
        let controllers = fs::read_to_string(root.join("tapgate/cgroup.controllers")).unwrap();
        assert_eq!(controllers.contains("memory"), !missing.contains(&"memory.max".to_owned()));
        match (disk, fs::read_to_string(group.path.join("io.max"))) {
            (Some(disk), Ok(read)) => {
                assert_eq!(read.trim(), format!("{disk} rbps=10485760 wbps=10485760 riops=max wiops=max"));
            }
            _ => assert!(missing.iter().any(|name| name.starts_with("io.max")), "{missing:?}"),
        }
        group.entrance().unwrap();
        assert!(Cgroup::open(&root, &name).is_some());
        group.remove().unwrap();
        assert!(Cgroup::open(&root, &name).is_none());
    }
}
