//! VM records: what was asked for, what the engine made of it, and the one place where a state changes.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Page, PageRequest};
use crate::snapshots::SnapshotKind;
use crate::store::{Store, next_generation, quota};
use crate::suspension::Suspension;
use crate::time::now_us;
use crate::users::id;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use std::ops::RangeInclusive;
use tapgate_model::lifecycle::{Answer, Call, decide, may_follow};
use tapgate_model::{SnapshotId, Status, StatusDetail, UserId, VmId};
use zeroize::Zeroizing;

/// What a VM is given of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resources {
    /// Virtual processors.
    pub vcpus: u32,
    /// Memory.
    pub memory_mib: u32,
    /// Size of the disk.
    pub disk_bytes: u64,
}

/// Where a VM should end up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Desired {
    /// Gone.
    Destroyed,
    /// Up.
    Running,
    /// Down, with its disk kept.
    Stopped,
}

impl Desired {
    const fn word(self) -> &'static str {
        match self {
            Self::Destroyed => "destroyed",
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        [Self::Destroyed, Self::Running, Self::Stopped].into_iter().find(|desired| desired.word() == word)
    }
}

/// A VM's certificate authority, in PEM. The key is wiped on drop and never printed.
#[derive(Clone)]
pub struct CaPem {
    /// The certificate, for the guest's trust store.
    pub cert: String,
    /// The key, for the proxy alone.
    pub key: Zeroizing<String>,
}

impl std::fmt::Debug for CaPem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CaPem(..)")
    }
}

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
    pub ssh_ports: RangeInclusive<u16>,
    /// How many guest addresses the host has.
    pub slots: u32,
    /// How many VMs the account may have.
    pub quota: u32,
    /// What the host has for VMs.
    pub capacity: Capacity,
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

impl Default for Capacity {
    fn default() -> Self {
        Self { memory_mib: u64::MAX, overhead_mib: 0, disk_bytes: u64::MAX }
    }
}

impl Capacity {
    /// Refuses a VM whose memory would be more than is there.
    fn check_memory(&self, tx: &Transaction<'_>, vm: Resources) -> Result<()> {
        let (count, sum): (i64, i64) = tx.query_row(
            "SELECT count(*), coalesce(sum(memory_mib), 0) FROM vms
             WHERE detail IN ('queued', 'creating', 'starting', 'running', 'ready', 'stopping')
                OR (detail = 'destroying' AND handle IS NOT NULL)",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )?;
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
        let query = "SELECT coalesce(sum(disk_bytes), 0) FROM vms WHERE detail <> 'destroyed'";
        let sum: i64 = tx.query_row(query, [], |row| row.get(0))?;
        let free = self.disk_bytes.saturating_sub(u64::try_from(sum).unwrap_or(0));
        if vm.disk_bytes <= free { Ok(()) } else { Err(Conflict::HostDisk { free_gib: free >> 30 }.into()) }
    }
}

/// A VM.
#[derive(Clone, Debug)]
pub struct VmRecord {
    /// Id.
    pub id: VmId,
    /// The owner.
    pub user: UserId,
    /// Name.
    pub name: String,
    /// OpenSSH form.
    pub public_key: String,
    /// State.
    pub detail: StatusDetail,
    /// Where it should end up.
    pub desired: Desired,
    /// Why it failed.
    pub failure: Option<String>,
    /// Whether its memory is kept.
    pub suspension: Suspension,
    /// Why it could not be suspended, the last time that it was asked for.
    pub suspend_failure: Option<String>,
    /// Position in the guest ranges (`GuestNet::new`).
    pub slot: u32,
    /// The host's port that is forwarded to the guest's port 22.
    pub ssh_port: u16,
    /// Its share of the host.
    pub resources: Resources,
    /// What its disk began as, if not the base image.
    pub snapshot: Option<SnapshotId>,
    /// The driver's handle of the running VMM, as JSON.
    pub handle: Option<String>,
    /// Microseconds since the epoch.
    pub created_at: i64,
    /// Microseconds since the epoch.
    pub updated_at: i64,
}

impl VmRecord {
    /// The name as a host name: lower-case letters, digits and hyphens, `vm` if nothing remains.
    pub fn hostname(&self) -> String {
        let mut out = String::new();
        for c in self.name.chars() {
            match c.to_ascii_lowercase() {
                c if c.is_ascii_alphanumeric() => out.push(c),
                _ if !out.is_empty() && !out.ends_with('-') => out.push('-'),
                _ => {}
            }
        }
        out.truncate(63);
        let out = out.trim_end_matches('-');
        if out.is_empty() { "vm".to_owned() } else { out.to_owned() }
    }
}

/// Which VMs to list.
#[derive(Clone, Debug, Default)]
pub struct VmFilter {
    /// Of this status.
    pub status: Option<Status>,
    /// In this state.
    pub detail: Option<StatusDetail>,
    /// Of exactly this name.
    pub name: Option<String>,
}

/// What VMs are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmSort {
    /// Creation.
    #[default]
    Created,
    /// Last change.
    Updated,
    /// Name.
    Name,
}

const SELECT: &str = "SELECT seq, id, user, name, public_key, detail, desired, failure, suspension, \
     suspend_failure, clone, slot, ssh_port, vcpus, memory_mib, disk_bytes, snapshot, handle, created_at, updated_at FROM vms";

fn read(row: &Row<'_>) -> rusqlite::Result<VmRecord> {
    let detail: String = row.get("detail")?;
    let desired: String = row.get("desired")?;
    let bad = |column: &str| rusqlite::Error::InvalidColumnName(column.to_owned());
    let snapshot: Option<String> = row.get("snapshot")?;
    Ok(VmRecord {
        id: id(row, "id")?,
        user: id(row, "user")?,
        name: row.get("name")?,
        public_key: row.get("public_key")?,
        detail: StatusDetail::from_word(&detail).ok_or_else(|| bad("detail"))?,
        desired: Desired::from_word(&desired).ok_or_else(|| bad("desired"))?,
        failure: row.get("failure")?,
        suspension: Suspension::from_columns(
            row.get::<_, Option<String>>("suspension")?.as_deref(),
            row.get("clone")?,
        ),
        suspend_failure: row.get("suspend_failure")?,
        slot: row.get("slot")?,
        ssh_port: row.get("ssh_port")?,
        resources: Resources {
            vcpus: row.get("vcpus")?,
            memory_mib: row.get("memory_mib")?,
            disk_bytes: u64::try_from(row.get::<_, i64>("disk_bytes")?).unwrap_or(0),
        },
        snapshot: snapshot.and_then(|text| text.parse().ok()),
        handle: row.get("handle")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

fn find(db: &Connection, vm: &VmId) -> Result<VmRecord> {
    db.prepare_cached(&format!("{SELECT} WHERE id = ?1"))?
        .query_row([vm.as_str()], read)
        .optional()?
        .ok_or(StoreError::NotFound(Kind::Vm))
}

/// The VM if it is the user's; else the answer for one that never was.
pub(crate) fn owned(db: &Connection, user: &UserId, vm: &VmId) -> Result<VmRecord> {
    find(db, vm).and_then(
        |record| {
            if record.user == *user { Ok(record) } else { Err(StoreError::NotFound(Kind::Vm)) }
        },
    )
}

/// The smallest number of the range that no living VM has.
fn free(tx: &Transaction<'_>, column: &str, range: RangeInclusive<u32>) -> Result<u32> {
    let sql =
        format!("SELECT {column} FROM vms WHERE detail <> 'destroyed' AND {column} >= ?1 ORDER BY {column}");
    let mut statement = tx.prepare_cached(&sql)?;
    let mut candidate = *range.start();
    for taken in statement.query_map([candidate], |row| row.get::<_, u32>(0))? {
        match taken? {
            taken if taken == candidate => candidate = candidate.saturating_add(1),
            _ => break,
        }
    }
    if range.contains(&candidate) { Ok(candidate) } else { Err(Conflict::HostFull.into()) }
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
    let living = "SELECT count(*) FROM vms WHERE user = ?1 AND detail <> 'destroyed'
                  AND (detail <> 'destroying' OR handle IS NOT NULL)";
    quota(tx, "VMs", living, user, new.quota)?;
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
        Some(last) => free(tx, "slot", 0..=last)?,
        None => return Err(Conflict::HostFull.into()),
    };
    let ports = u32::from(*new.ssh_ports.start())..=u32::from(*new.ssh_ports.end());
    let ssh_port = free(tx, "ssh_port", ports)?;
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

/// Acts on a user's call inside a transaction. Answers whether the state changed.
pub(crate) fn call(tx: &Transaction<'_>, vm: &VmRecord, call: Call) -> Result<bool> {
    let next = match decide(call, vm.detail) {
        Err(refusal) => return Err(Conflict::State(refusal).into()),
        Ok(Answer::Stay) => return Ok(false),
        Ok(Answer::Enter(next)) => next,
    };
    let desired = match call {
        Call::Destroy => Desired::Destroyed,
        Call::Stop | Call::Suspend => Desired::Stopped,
        Call::Start | Call::Snapshot => Desired::Running,
    };
    tx.execute(
        "UPDATE vms SET detail = ?2, desired = ?3, failure = NULL, updated_at = ?4 WHERE id = ?1",
        params![vm.id.as_str(), next.word(), desired.word(), now_us().max(vm.created_at)],
    )?;
    if call != Call::Start {
        // A start needs to know whether there is a memory; the engine notes when it was used.
        let wanted = if call == Call::Suspend { Suspension::Wanted } else { Suspension::None };
        tx.execute(
            "UPDATE vms SET suspension = ?2, suspend_failure = NULL, clone = 0 WHERE id = ?1",
            params![vm.id.as_str(), wanted.word()],
        )?;
    }
    crate::agents::follow(tx, &vm.id, next, None)?;
    if call == Call::Destroy {
        // Its rules' names are free at once; without them it may reach less, never more.
        tx.execute("DELETE FROM rules WHERE vm = ?1", [vm.id.as_str()])?;
        let generation = next_generation(tx)?;
        tx.execute(
            "UPDATE vms SET mode = NULL, generation = ?2 WHERE id = ?1",
            params![vm.id.as_str(), generation],
        )?;
    }
    Ok(true)
}

impl Store {
    /// Makes a VM's record in `creating`, with an address and an SSH port of its own.
    pub async fn vm_create(&self, new: NewVm) -> Result<VmRecord> {
        let store = self.clone();
        self.db.write(move |tx| insert(&store, tx, &new)).await
    }

    /// One VM of a user.
    pub async fn vm(&self, user: &UserId, vm: &VmId) -> Result<VmRecord> {
        let (user, vm) = (user.clone(), vm.clone());
        self.db.read(move |db| owned(db, &user, &vm)).await
    }

    /// One VM, whoever owns it: for the engine.
    pub async fn vm_any(&self, vm: &VmId) -> Result<VmRecord> {
        let vm = vm.clone();
        self.db.read(move |db| find(db, &vm)).await
    }

    /// Every VM that is not destroyed, and its state: for counting them.
    pub async fn vms_living_states(&self) -> Result<Vec<(VmId, StatusDetail)>> {
        self.db
            .read(|db| {
                let mut statement =
                    db.prepare_cached("SELECT id, detail FROM vms WHERE detail <> 'destroyed'")?;
                let rows = statement.query_map([], |row| {
                    let detail: String = row.get("detail")?;
                    let detail = StatusDetail::from_word(&detail);
                    let bad = || rusqlite::Error::InvalidColumnName("detail".to_owned());
                    Ok((id(row, "id")?, detail.ok_or_else(bad)?))
                })?;
                Ok(rows.collect::<rusqlite::Result<_>>()?)
            })
            .await
    }

    /// Every VM that is not destroyed, whoever owns it: for the engine at start.
    pub async fn vms_living(&self) -> Result<Vec<VmRecord>> {
        self.db
            .read(|db| {
                let mut statement =
                    db.prepare_cached(&format!("{SELECT} WHERE detail <> 'destroyed' ORDER BY seq"))?;
                let vms = statement.query_map([], read)?.collect::<rusqlite::Result<_>>()?;
                Ok(vms)
            })
            .await
    }

    /// A user's VMs.
    pub async fn vms(
        &self,
        user: &UserId,
        filter: VmFilter,
        sort: VmSort,
        page: PageRequest,
    ) -> Result<Page<VmRecord>> {
        let (user, cursors) = (user.clone(), self.cursors.clone());
        self.db
            .read(move |db| {
                let scope = format!("vms\0{user}\0{filter:?}");
                let mut filters = vec![("user = ?", Value::Text(user.into()))];
                if let Some(status) = filter.status {
                    filters.push((states(status), Value::Null));
                }
                if let Some(detail) = filter.detail {
                    filters.push(("detail = ?", Value::Text(detail.word().into())));
                }
                if let Some(name) = filter.name {
                    filters.push(("name = ?", Value::Text(name)));
                }
                let sort = match sort {
                    VmSort::Created => "created_at",
                    VmSort::Updated => "updated_at",
                    VmSort::Name => "name",
                };
                Listing { select: SELECT, filters, sort, scope }.run(db, &cursors, &page, read)
            })
            .await
    }

    /// A user's call: checks that it is legal now and enters the next state, in one transaction. Answers the VM as it
    /// is afterwards and whether the engine has something to do.
    pub async fn vm_call(&self, user: &UserId, vm: &VmId, asked: Call) -> Result<(VmRecord, bool)> {
        self.vm_call_within(user, vm, asked, Capacity::default()).await
    }

    /// The same for a call that needs room on the host.
    pub async fn vm_call_within(
        &self,
        user: &UserId,
        vm: &VmId,
        asked: Call,
        capacity: Capacity,
    ) -> Result<(VmRecord, bool)> {
        let (user, vm) = (user.clone(), vm.clone());
        self.db
            .write(move |tx| {
                let record = owned(tx, &user, &vm)?;
                if asked == Call::Start && decide(asked, record.detail).is_ok() {
                    capacity.check_memory(tx, record.resources)?;
                }
                let changed = call(tx, &record, asked)?;
                Ok((find(tx, &vm)?, changed))
            })
            .await
    }

    /// The engine's report that a VM reached a state. Refused if it cannot follow the recorded one, as when a user's
    /// stop came in between. `failure` is kept with `failed` only.
    pub async fn vm_advance(&self, vm: &VmId, to: StatusDetail, failure: Option<String>) -> Result<VmRecord> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                let now = find(tx, &vm)?;
                if !may_follow(now.detail, to) {
                    return Err(StoreError::Illegal { from: now.detail.word(), to: to.word() });
                }
                let failure = failure.filter(|_| to == StatusDetail::Failed);
                if now.detail != to || failure.is_some() {
                    tx.execute(
                        "UPDATE vms SET detail = ?2, failure = ?3, updated_at = ?4 WHERE id = ?1",
                        params![vm.as_str(), to.word(), failure, now_us().max(now.created_at)],
                    )?;
                    crate::agents::follow(tx, &vm, to, failure.as_deref())?;
                    crate::snapshots::follow(tx, &vm, to)?;
                }
                if to == StatusDetail::Destroyed {
                    // Nothing needs its key any more.
                    tx.execute("UPDATE vms SET handle = NULL, ca_key = x'' WHERE id = ?1", [vm.as_str()])?;
                }
                find(tx, &vm)
            })
            .await
    }

    /// Keeps (or forgets) the driver's handle of the running VMM.
    pub async fn vm_set_handle(&self, vm: &VmId, handle: Option<String>) -> Result<()> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                tx.execute("UPDATE vms SET handle = ?2 WHERE id = ?1", params![vm.as_str(), handle])?;
                Ok(())
            })
            .await
    }

    /// A VM's CA, its key opened.
    pub async fn vm_ca(&self, vm: &VmId) -> Result<CaPem> {
        let (vm, key) = (vm.clone(), self.key.clone());
        self.db
            .read(move |db| {
                let (cert, blob): (String, Vec<u8>) = db
                    .prepare_cached("SELECT ca_cert, ca_key FROM vms WHERE id = ?1")?
                    .query_row([vm.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::Vm))?;
                let opened = key.open("vms.ca_key", vm.as_str(), &blob)?;
                let text = std::str::from_utf8(&opened)
                    .map_err(|_| StoreError::Internal("a CA key is not PEM".into()))?;
                Ok(CaPem { cert, key: Zeroizing::new(text.to_owned()) })
            })
            .await
    }
}

/// The states of a simplified status, as a condition.
const fn states(status: Status) -> &'static str {
    match status {
        Status::Pending => "detail IN ('queued', 'creating', 'starting')",
        Status::Running => "detail IN ('running', 'ready')",
        Status::Stopped => "detail IN ('stopping', 'stopped')",
        Status::Destroyed => "detail IN ('destroying', 'destroyed')",
        Status::Failed => "detail = 'failed'",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_of_a_status_lists_its_states() {
        for state in StatusDetail::ALL {
            let word = format!("'{}'", state.word());
            for status in
                [Status::Pending, Status::Running, Status::Stopped, Status::Destroyed, Status::Failed]
            {
                assert_eq!(states(status).contains(&word), state.status() == status, "{state:?} {status:?}");
            }
        }
    }
}
