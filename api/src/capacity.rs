//! How much of the host VMs may have: what the operator allows of its memory and disk, and what is really free now.
//!
//! The sums are kept by the store, in the transaction that makes a VM; here are the limits and the look at the host.

use crate::http::{ApiError, Code};
use std::path::PathBuf;
use tapgate_store::{Capacity, Resources};

/// What a VMM takes beyond its guest's memory.
const OVERHEAD_MIB: u64 = 64;
/// What a kept memory may have beyond the guest's memory: its devices.
const STREAM_MIB: u64 = 256;

/// The operator's share for VMs.
#[derive(Clone, Debug)]
pub struct Share {
    /// Memory that is left to everything else, in MiB.
    pub memory_reserve_mib: u64,
    /// How often memory is given away.
    pub memory_overcommit: f64,
    /// Free disk below which no VM is made, in octets.
    pub disk_reserve: u64,
    /// How often disk is given away; disks are sparse.
    pub disk_overcommit: f64,
}

/// The limits and where to look.
#[derive(Clone, Debug)]
pub struct Room {
    share: Share,
    /// `None` where guests take no memory of their own.
    total_memory_mib: Option<u64>,
    data_dir: PathBuf,
}

impl Room {
    /// Reads how large the host is. `memory` is whether guests take memory of their own.
    pub fn of_host(share: Share, data_dir: PathBuf, memory: bool) -> Self {
        Self { share, total_memory_mib: memory.then(|| meminfo("MemTotal:")).flatten(), data_dir }
    }

    /// What all VMs together may have.
    pub fn capacity(&self) -> Capacity {
        let times = |amount: u64, factor: f64| (amount as f64 * factor) as u64;
        let (total_disk, _) = disk(&self.data_dir).unwrap_or((u64::MAX, u64::MAX));
        let memory_mib = self.total_memory_mib.map_or(u64::MAX, |total| {
            times(total.saturating_sub(self.share.memory_reserve_mib), self.share.memory_overcommit)
        });
        let disk_bytes =
            times(total_disk.saturating_sub(self.share.disk_reserve), self.share.disk_overcommit);
        let overhead_mib = if self.total_memory_mib.is_some() { OVERHEAD_MIB } else { 0 };
        Capacity { memory_mib, overhead_mib, disk_bytes }
    }

    /// Looks at what is free at this moment: others use the host too.
    ///
    /// # Errors
    /// It is not enough for a VM of this size to be made or started.
    pub fn check(&self, wanted: Resources, new_disk: bool) -> Result<(), ApiError> {
        if let (Some(_), Some(free)) = (self.total_memory_mib, meminfo("MemAvailable:"))
            && self.share.memory_overcommit <= 1.0
            && free < u64::from(wanted.memory_mib) + OVERHEAD_MIB
        {
            let message = format!(
                "The host has {free} MiB of memory free now; stop a VM, or ask for less (memory_mib)"
            );
            return Err(full(Code::HostMemoryFull, message));
        }
        match new_disk {
            true => self.check_file(0),
            false => Ok(()),
        }
    }

    /// Whether a file with a guest's memory may be written: what is kept of it is not known before.
    ///
    /// # Errors
    /// The host's reserve would be touched if none of it could be left out.
    pub fn check_memory_file(&self, memory_mib: u32) -> Result<(), ApiError> {
        self.check_file((u64::from(memory_mib) + STREAM_MIB) << 20)
    }

    /// Whether a file of so many octets leaves the host its reserve.
    ///
    /// # Errors
    /// It would not.
    pub fn check_file(&self, octets: u64) -> Result<(), ApiError> {
        match disk(&self.data_dir) {
            Some((_, free)) if free < self.share.disk_reserve.saturating_add(octets) => {
                let message = format!(
                    "The host has {} MiB of disk free and needs {} MiB; destroy a VM or delete a snapshot",
                    free >> 20,
                    self.share.disk_reserve.saturating_add(octets) >> 20
                );
                Err(full(Code::HostDiskFull, message))
            }
            _ => Ok(()),
        }
    }
}

fn full(code: Code, message: String) -> ApiError {
    ApiError { retry_after: Some(30), ..ApiError::new(code, message) }
}

impl Default for Room {
    /// Limits nothing.
    fn default() -> Self {
        let share =
            Share { memory_reserve_mib: 0, memory_overcommit: 1.0, disk_reserve: 0, disk_overcommit: 1e9 };
        Self { share, total_memory_mib: None, data_dir: "/".into() }
    }
}

/// A line of `/proc/meminfo` (proc_meminfo(5)), in MiB.
fn meminfo(name: &str) -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(name))?;
    line.split_ascii_whitespace().next()?.parse::<u64>().ok().map(|kib| kib / 1024)
}

/// Octets of the folder's file system: all, and free.
fn disk(folder: &std::path::Path) -> Option<(u64, u64)> {
    let stat = nix::sys::statvfs::statvfs(folder).ok()?;
    let size = stat.fragment_size();
    Some((stat.blocks().saturating_mul(size), stat.blocks_available().saturating_mul(size)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn room(share: Share) -> Room {
        Room::of_host(share, "/".into(), true)
    }

    const PLAIN: Share =
        Share { memory_reserve_mib: 0, memory_overcommit: 1.0, disk_reserve: 0, disk_overcommit: 1.0 };
    const SMALL: Resources = Resources { vcpus: 1, memory_mib: 1, disk_bytes: 1 };

    #[test]
    fn the_share_is_what_is_left_after_the_reserve_times_the_overcommit() {
        let all = room(PLAIN).capacity().memory_mib;
        assert!(all > 100);
        let half = room(Share { memory_reserve_mib: all / 2, ..PLAIN }).capacity().memory_mib;
        assert_eq!(half, all - all / 2);
        assert_eq!(room(Share { memory_overcommit: 2.0, ..PLAIN }).capacity().memory_mib, 2 * all);
        assert_eq!(room(Share { memory_reserve_mib: u64::MAX, ..PLAIN }).capacity().memory_mib, 0);
    }

    #[test]
    fn what_is_not_free_is_not_given() {
        assert!(room(PLAIN).check(SMALL, true).is_ok());
        let huge = Resources { memory_mib: u32::MAX, ..SMALL };
        assert_eq!(room(PLAIN).check(huge, true).unwrap_err().code, Code::HostMemoryFull);
        assert!(room(Share { memory_overcommit: 1.5, ..PLAIN }).check(huge, true).is_ok());
        let reserved = room(Share { disk_reserve: u64::MAX, ..PLAIN });
        assert_eq!(reserved.check(SMALL, true).unwrap_err().code, Code::HostDiskFull);
        assert!(reserved.check(SMALL, false).is_ok(), "a VM that has its disk may start");
        assert!(room(PLAIN).check_memory_file(1).is_ok());
        assert_eq!(room(PLAIN).check_memory_file(u32::MAX).unwrap_err().code, Code::HostDiskFull);
        assert_eq!(reserved.check_file(0).unwrap_err().code, Code::HostDiskFull);
        assert!(Room::default().check(huge, true).is_ok());
    }
}
