//! What a VM's record holds, and how it is read. Writes nothing.

use crate::error::{Kind, Result, StoreError};
use crate::suspension::Suspension;
use crate::users::id;
use rusqlite::{Connection, OptionalExtension as _, Row};
use tapgate_model::{SnapshotId, StatusDetail, UserId, VmId};
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
    pub(super) const fn word(self) -> &'static str {
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

pub(super) const SELECT: &str = "SELECT seq, id, user, name, public_key, detail, desired, failure, suspension, \
     suspend_failure, clone, slot, ssh_port, vcpus, memory_mib, disk_bytes, snapshot, handle, created_at, updated_at FROM vms";

pub(super) fn read(row: &Row<'_>) -> rusqlite::Result<VmRecord> {
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

pub(super) fn find(db: &Connection, vm: &VmId) -> Result<VmRecord> {
    db.prepare_cached(&format!("{SELECT} WHERE id = ?1"))?
        .query_row([vm.as_str()], read)
        .optional()?
        .ok_or(StoreError::NotFound(Kind::Vm))
}
