//! How much of the host VMs may have: what the operator allows of its memory and disk, and what is really free now.
//!
//! The sums are kept by the store, in the transaction that makes a VM; here are the limits and the look at the host.

use crate::{
    http::{ApiError, Code},
    promised::{Lack, Need, Promise, Promised},
};
use std::{path::PathBuf, sync::Arc};
use tapgate_model::VmId;
use tapgate_store::{Capacity, Resources, SnapshotRecord};

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

/// What is written beside a disk that is copied or made.
#[derive(Clone, Copy, Debug)]
pub struct Copying {
    /// The driver wants raw disks: it copies one before it is packed for a snapshot, and unpacks what was fetched.
    pub raw: bool,
    /// Octets that a disk made of the image takes at once.
    pub image: u64,
    /// Snapshots are stored on this host too: what is stored is there beside the copy that it is made of.
    pub stored_here: bool,
}

/// The limits and where to look. Clones look at the same promises.
#[derive(Clone, Debug)]
pub struct Room {
    share: Share,
    /// `None` where guests take no memory of their own.
    total_memory_mib: Option<u64>,
    data_dir: PathBuf,
    copying: Copying,
    promised: Arc<Promised>,
}

impl Room {
    /// Reads how large the host is. `memory` is whether guests take memory of their own.
    pub fn of_host(share: Share, data_dir: PathBuf, memory: bool) -> Self {
        let total_memory_mib = memory.then(|| meminfo("MemTotal:")).flatten();
        let copying = Copying { raw: false, image: 0, stored_here: true };
        Self { share, total_memory_mib, data_dir, copying, promised: Arc::default() }
    }

    /// The same for a host that copies so.
    pub fn with_copying(self, copying: Copying) -> Self {
        Self { copying, ..self }
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

    /// Looks at what is free at this moment: others use the host too. `new_disk` is what a disk that is to be made takes at once.
    ///
    /// # Errors
    /// It is not enough for a VM of this size to be made or started.
    pub fn check(&self, wanted: Resources, new_disk: Option<u64>) -> Result<(), ApiError> {
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
            Some(octets) => self.check_file(octets),
            None => Ok(()),
        }
    }

    /// What a new disk takes at once: one from a snapshot is fetched whole, packed and unpacked.
    pub fn new_disk(&self, snapshot: Option<&SnapshotRecord>) -> u64 {
        let Some(snapshot) = snapshot else { return self.copying.image };
        let memory = snapshot.memory.as_ref();
        let memory = memory.map_or(0, |memory| memory.stored_bytes.saturating_add(memory.file_bytes));
        let packed = snapshot.size_bytes.unwrap_or(0);
        self.fetched_disk(snapshot).saturating_add(packed).saturating_add(memory)
    }

    /// The same once it is fetched, with what is fetched.
    pub fn fetched_disk(&self, snapshot: &SnapshotRecord) -> u64 {
        let disk = snapshot.file_bytes.unwrap_or(0);
        if self.copying.raw { disk.saturating_mul(2) } else { disk }
    }

    /// What a snapshot of the VM as it is now takes until it is stored. Reads the disk's layout: not for a task that others wait for.
    ///
    /// # Errors
    /// The disk cannot be looked at.
    pub fn snapshot_of(&self, vm: &VmId, memory_mib: Option<u32>) -> Result<u64, String> {
        let dir = self.data_dir.join("vms").join(vm.as_str());
        let disk = tapgate_vmm::octets::of_copy(&dir).map_err(|error| error.to_string())?;
        // First the raw copy and the packed one, then the packed one and what is stored.
        let times = if self.copying.raw || self.copying.stored_here { 2 } else { 1 };
        let memory = memory_mib.map_or(0, memory_file);
        Ok(disk.saturating_mul(times).saturating_add(self.until_stored(memory)))
    }

    /// What a copy of this size takes until it is stored. It is packed: what is stored of it is no larger, but for some octets.
    pub fn until_stored(&self, copied: u64) -> u64 {
        if self.copying.stored_here { copied.saturating_mul(2).saturating_add(copied >> 7) } else { copied }
    }

    /// Room on the disk, once it is there; see [`Promised::wait`].
    ///
    /// # Errors
    /// There would be none if all others gave back what they have.
    pub async fn promise(&self, need: Need) -> Result<Promise, Lack> {
        self.promised.wait(need, || self.above()).await
    }

    /// The same for a kept memory, of which nobody is to wait for others.
    ///
    /// # Errors
    /// There is no room at this moment.
    pub fn promise_now(&self, need: Need) -> Result<Promise, Lack> {
        self.promised.now(need, || self.above())
    }

    /// The same for what a former daemon wrote.
    pub fn promise_again(&self, need: Need) -> Promise {
        self.promised.again(need)
    }

    /// Whether what is promised can still be written without touching the reserve.
    ///
    /// # Errors
    /// It cannot.
    pub fn holds(&self, promise: &Promise) -> Result<(), Lack> {
        promise.holds(|| self.above())
    }

    /// Free octets above the reserve; none where the disk cannot be looked at.
    fn above(&self) -> u64 {
        disk(&self.data_dir).map_or(0, |(_, free)| free.saturating_sub(self.share.disk_reserve))
    }

    /// Whether a file with a guest's memory may be written: what is kept of it is not known before.
    ///
    /// # Errors
    /// The host's reserve would be touched if none of it could be left out.
    pub fn check_memory_file(&self, memory_mib: u32) -> Result<(), ApiError> {
        self.check_file(memory_file(memory_mib))
    }

    /// Whether a file of so many octets leaves the host its reserve and the others what they were promised.
    ///
    /// # Errors
    /// It would not.
    pub fn check_file(&self, octets: u64) -> Result<(), ApiError> {
        let reserve = self.share.disk_reserve;
        let free = || disk(&self.data_dir).map_or(u64::MAX, |(_, free)| free);
        let left = self.promised.left(free);
        match left < reserve.saturating_add(octets) {
            true => Err(no_room(left, reserve.saturating_add(octets))),
            false => Ok(()),
        }
    }

    /// Whether a snapshot that takes so much can be had, now or when those that are staged are stored.
    ///
    /// # Errors
    /// Not even then.
    pub fn check_snapshot(&self, octets: u64) -> Result<(), ApiError> {
        let reserve = self.share.disk_reserve;
        let free = || disk(&self.data_dir).map_or(u64::MAX, |(_, free)| free);
        let had = self.promised.could_have(reserve.saturating_add(octets), free);
        had.map_err(|lack| no_room(lack.free, lack.needs))
    }
}

fn no_room(free: u64, needs: u64) -> ApiError {
    let message = format!(
        "The host has {} MiB of disk free and needs {} MiB; destroy a VM or delete a snapshot",
        free >> 20,
        needs >> 20
    );
    full(Code::HostDiskFull, message)
}

/// How large a kept memory may be.
pub(crate) fn memory_file(memory_mib: u32) -> u64 {
    (u64::from(memory_mib) + STREAM_MIB) << 20
}

fn full(code: Code, message: String) -> ApiError {
    ApiError { retry_after: Some(30), ..ApiError::new(code, message) }
}

impl Default for Room {
    /// Limits nothing.
    fn default() -> Self {
        let share =
            Share { memory_reserve_mib: 0, memory_overcommit: 1.0, disk_reserve: 0, disk_overcommit: 1e9 };
        Self::of_host(share, "/".into(), false)
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
    use tapgate_model::UserId;

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
        assert!(room(PLAIN).check(SMALL, Some(0)).is_ok());
        let huge = Resources { memory_mib: u32::MAX, ..SMALL };
        assert_eq!(room(PLAIN).check(huge, Some(0)).unwrap_err().code, Code::HostMemoryFull);
        assert!(room(Share { memory_overcommit: 1.5, ..PLAIN }).check(huge, Some(0)).is_ok());
        let reserved = room(Share { disk_reserve: u64::MAX, ..PLAIN });
        assert_eq!(reserved.check(SMALL, Some(0)).unwrap_err().code, Code::HostDiskFull);
        assert!(reserved.check(SMALL, None).is_ok(), "a VM that has its disk may start");
        assert!(room(PLAIN).check_memory_file(1).is_ok());
        assert_eq!(room(PLAIN).check_memory_file(u32::MAX).unwrap_err().code, Code::HostDiskFull);
        assert_eq!(reserved.check_file(0).unwrap_err().code, Code::HostDiskFull);
        assert!(Room::default().check(huge, Some(0)).is_ok());
    }

    #[test]
    fn what_is_promised_is_not_given_again() {
        let (_, free) = disk("/".as_ref()).unwrap();
        let room = room(Share { disk_reserve: free / 2, ..PLAIN });
        let need = |octets| Need { user: UserId::generate(), octets, places: Vec::new(), passes: true };
        assert!(room.check(SMALL, Some(free / 4)).is_ok());
        let clone = room.clone();
        let promise = clone.promise_now(need(free / 3)).unwrap();
        assert!(room.check(SMALL, Some(0)).is_ok());
        assert_eq!(room.check(SMALL, Some(free / 4)).unwrap_err().code, Code::HostDiskFull);
        assert_eq!(room.check_file(free / 4).unwrap_err().code, Code::HostDiskFull);
        assert!(room.promise_now(need(free / 4)).is_err());
        assert!(room.check_snapshot(free / 4).is_ok(), "it may wait for the others");
        assert_eq!(room.check_snapshot(free).unwrap_err().code, Code::HostDiskFull);
        drop(promise);
        assert!(room.check(SMALL, Some(free / 4)).is_ok());
    }
}
