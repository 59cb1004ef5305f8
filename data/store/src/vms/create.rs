//! A VM's record is made: the name is free, the account and the host have room, address and port are its own. Changes no record
//! that is there.

use super::record::{CaPem, Resources, VmRecord, find};
use crate::error::{Conflict, Kind, Result, StoreError};
use crate::snapshots::SnapshotKind;
use crate::store::{Store, next_generation, quota};
use crate::suspension::Suspension;
use crate::time::now_us;
use rusqlite::{OptionalExtension as _, Transaction, params};
use std::ops::RangeInclusive;
use std::sync::Arc;
use tapgate_model::{SnapshotId, UserId, VmId};

/// A VM to be made; every field was checked.
#[derive(Clone, Debug)]
pub struct NewVm {
    /// Its id, made before so that its CA can carry it.
    pub id: VmId,
    /// The owner.
    pub user: UserId,
    /// Unique among the owner's VMs that are not destroyed.
    pub name: String,
    /// OpenSSH form.
    pub public_key: String,
    /// Boot from this rather than from the base image.
    pub snapshot: Option<SnapshotId>,
    /// Its share of the host.
    pub resources: Resources,
    /// Its CA.
    pub ca: CaPem,
    /// The host's ports for SSH.
    pub ssh_ports: SshPorts,
    /// How many guest addresses the host has.
    pub slots: u32,
    /// How many VMs the account may have.
    pub quota: u32,
    /// What the host has for VMs.
    pub capacity: Capacity,
}

/// The host's ports for SSH, and whether somebody else has one of them now.
#[derive(Clone)]
pub struct SshPorts {
    /// They.
    pub range: RangeInclusive<u16>,
    /// Asked in the transaction: it has to be quick.
    pub is_free: Arc<dyn Fn(u16) -> bool + Send + Sync>,
}

impl std::fmt::Debug for SshPorts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.range.fmt(f)
    }
}

/// What the host has for all of its VMs together; `u64::MAX` where nothing is limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Memory of VMs that run, are about to, or have not ended yet.
    pub memory_mib: u64,
    /// What each of those takes beyond its own memory.
    pub overhead_mib: u64,
    /// Disks of all VMs.
    pub disk_bytes: u64,
}

// Destroyed VMs stay for good: none of these goes through them.
pub(crate) const MEMORY_TAKEN: &str = "SELECT count(*), coalesce(sum(memory_mib), 0) FROM vms
     WHERE detail <> 'destroyed'
       AND (detail IN ('queued', 'creating', 'starting', 'running', 'ready', 'stopping')
            OR (detail = 'destroying' AND handle IS NOT NULL))";
pub(crate) const DISK_TAKEN: &str =
    "SELECT coalesce(sum(disk_bytes), 0) FROM vms WHERE detail <> 'destroyed'";
pub(crate) const LIVING: &str = "SELECT count(*) FROM vms WHERE user = ?1 AND detail <> 'destroyed'
     AND (detail <> 'destroying' OR handle IS NOT NULL)";
pub(crate) const HELD: &str = "SELECT count(*) FROM vms WHERE user = ?1 AND detail <> 'destroyed'";

impl Default for Capacity {
    fn default() -> Self {
        Self { memory_mib: u64::MAX, overhead_mib: 0, disk_bytes: u64::MAX }
    }
}

impl Capacity {
    /// Refuses a VM whose memory would be more than is there.
    pub(super) fn check_memory(&self, tx: &Transaction<'_>, vm: Resources) -> Result<()> {
        let (count, sum): (i64, i64) =
            tx.query_row(MEMORY_TAKEN, [], |row| Ok((row.get(0)?, row.get(1)?)))?;
        let number = |n: i64| u64::try_from(n).unwrap_or(0);
        let taken = number(sum).saturating_add(number(count).saturating_mul(self.overhead_mib));
        let free_mib = self.memory_mib.saturating_sub(taken);
        match u64::from(vm.memory_mib).saturating_add(self.overhead_mib) <= free_mib {
            true => Ok(()),
            false => {
                Err(Conflict::HostMemory { free_mib: free_mib.saturating_sub(self.overhead_mib) }.into())
            }
        }
    }

    fn check_disk(&self, tx: &Transaction<'_>, vm: Resources) -> Result<()> {
        let sum: i64 = tx.query_row(DISK_TAKEN, [], |row| row.get(0))?;
        let free = self.disk_bytes.saturating_sub(u64::try_from(sum).unwrap_or(0));
        if vm.disk_bytes <= free { Ok(()) } else { Err(Conflict::HostDisk { free_gib: free >> 30 }.into()) }
    }
}

/// The smallest number of the range that no living VM has and that fits.
fn free(
    tx: &Transaction<'_>,
    column: &str,
    range: RangeInclusive<u32>,
    fits: impl Fn(u32) -> bool,
) -> Result<u32> {
    let sql =
        format!("SELECT {column} FROM vms WHERE detail <> 'destroyed' AND {column} >= ?1 ORDER BY {column}");
    let mut statement = tx.prepare_cached(&sql)?;
    let mut taken = statement.query_map([range.start()], |row| row.get::<_, u32>(0))?;
    let mut next = taken.next().transpose()?;
    for candidate in range {
        if next == Some(candidate) {
            next = taken.next().transpose()?;
        } else if fits(candidate) {
            return Ok(candidate);
        }
    }
    Err(Conflict::HostFull.into())
}

/// Makes the record inside a transaction (agents make theirs together with the VM's).
pub(crate) fn insert(store: &Store, tx: &Transaction<'_>, new: &NewVm) -> Result<VmRecord> {
    let user = new.user.as_str();
    let taken: bool = tx.query_row(
        "SELECT EXISTS (SELECT 1 FROM vms WHERE user = ?1 AND name = ?2 AND detail NOT IN ('destroying', 'destroyed'))",
        params![user, new.name],
        |row| row.get(0),
    )?;
    if taken {
        return Err(Conflict::VmName.into());
    }
    // One that is being destroyed counts as long as it may still run.
    quota(tx, "VMs", LIVING, user, new.quota)?;
    // What is being destroyed holds its address and its disk until that is done: nobody has any number of these either.
    quota(tx, "VMs, with those that are being destroyed", HELD, user, new.quota.saturating_mul(2))?;
    let mut clone = false;
    if let Some(snapshot) = &new.snapshot {
        let found: Option<(String, String)> = tx
            .query_row(
                "SELECT status, kind FROM snapshots WHERE id = ?1 AND user = ?2 AND deleted_at IS NULL",
                params![snapshot.as_str(), user],
                |row| Ok((row.get(0)?, row.get(1)?)),
            )
            .optional()?;
        let (status, kind) = found.ok_or(StoreError::NotFound(Kind::Snapshot))?;
        if status != "ready" {
            return Err(Conflict::SnapshotNotReady.into());
        }
        clone = kind == SnapshotKind::Memory.word();
    }
    new.capacity.check_memory(tx, new.resources)?;
    new.capacity.check_disk(tx, new.resources)?;
    let slot = match new.slots.checked_sub(1) {
        Some(last) => free(tx, "slot", 0..=last, |_| true)?,
        None => return Err(Conflict::HostFull.into()),
    };
    let SshPorts { range, is_free } = &new.ssh_ports;
    let ports = u32::from(*range.start())..=u32::from(*range.end());
    let ssh_port = free(tx, "ssh_port", ports, |port| u16::try_from(port).is_ok_and(|port| is_free(port)))?;
    let ca_key = store.key.seal("vms.ca_key", new.id.as_str(), new.ca.key.as_bytes())?;
    let now = now_us();
    tx.execute(
        "INSERT INTO vms (id, user, name, public_key, detail, desired, slot, ssh_port, vcpus, memory_mib, disk_bytes,
                          snapshot, ca_cert, ca_key, generation, created_at, updated_at, suspension, clone)
         VALUES (?1, ?2, ?3, ?4, 'creating', 'running', ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?14, ?15, ?16)",
        params![
            new.id.as_str(),
            user,
            new.name,
            new.public_key,
            slot,
            ssh_port,
            new.resources.vcpus,
            new.resources.memory_mib,
            i64::try_from(new.resources.disk_bytes).unwrap_or(i64::MAX),
            new.snapshot.as_ref().map(SnapshotId::as_str),
            new.ca.cert,
            ca_key,
            next_generation(tx)?,
            now,
            Suspension::Cloned.word().filter(|_| clone),
            clone
        ],
    )?;
    find(tx, &new.id)
}
