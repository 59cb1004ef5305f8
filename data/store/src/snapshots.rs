//! Snapshot records. The bytes are elsewhere; a deleted record stays until they are collected.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Order, Page, PageRequest};
use crate::store::{Store, quota};
use crate::time::now_us;
use crate::users::id;
use crate::vms;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use serde_json::json;
use tapgate_model::lifecycle::{Call, decide};
use tapgate_model::{SnapshotId, StatusDetail, UserId, VmId};

/// How far a snapshot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotStatus {
    /// It could not be made; the record says why.
    Failed,
    /// Asked for.
    Pending,
    /// Stored whole.
    Ready,
    /// Being stored.
    Uploading,
}

impl SnapshotStatus {
    /// The word of the API and the database.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Failed => "failed",
            Self::Pending => "pending",
            Self::Ready => "ready",
            Self::Uploading => "uploading",
        }
    }

    fn from_word(word: &str) -> Option<Self> {
        [Self::Failed, Self::Pending, Self::Ready, Self::Uploading].into_iter().find(|s| s.word() == word)
    }
}

/// What a snapshot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SnapshotKind {
    /// The disk.
    #[default]
    Disk,
    /// The disk, and the memory of the same moment.
    Memory,
}

impl SnapshotKind {
    /// The word of the API and the database.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Disk => "disk",
            Self::Memory => "memory",
        }
    }

    /// The kind of a word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Disk, Self::Memory].into_iter().find(|kind| kind.word() == word)
    }
}

/// A stored memory: what it is checked against when it comes back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MemoryObject {
    /// SHA-256 of its octets as they are stored, in hexadecimal.
    pub sha256: String,
    /// How many those are.
    pub stored_bytes: u64,
    /// How many they unpack to.
    pub file_bytes: u64,
    /// What the driver wants to know of it.
    pub note: String,
}

impl MemoryObject {
    fn to_json(&self) -> String {
        let Self { sha256, stored_bytes, file_bytes, note } = self;
        json!({"sha256": sha256, "stored_bytes": stored_bytes, "file_bytes": file_bytes, "note": note})
            .to_string()
    }

    fn from_json(text: &str) -> Option<Self> {
        let object: serde_json::Value = serde_json::from_str(text).ok()?;
        Some(Self {
            sha256: object["sha256"].as_str()?.to_owned(),
            stored_bytes: object["stored_bytes"].as_u64()?,
            file_bytes: object["file_bytes"].as_u64()?,
            note: object["note"].as_str()?.to_owned(),
        })
    }
}

/// A snapshot.
#[derive(Clone, Debug)]
pub struct SnapshotRecord {
    /// Id.
    pub id: SnapshotId,
    /// The owner.
    pub user: UserId,
    /// The VM it was taken from.
    pub vm: VmId,
    /// The base image that the VM ran, if it came from none.
    pub base_image: Option<String>,
    /// The snapshot that the VM came from, if it came from one.
    pub source_snapshot: Option<SnapshotId>,
    /// What it holds.
    pub kind: SnapshotKind,
    /// Its memory, if it holds one and is stored.
    pub memory: Option<MemoryObject>,
    /// What the user calls it.
    pub label: Option<String>,
    /// How far it is.
    pub status: SnapshotStatus,
    /// Why it failed.
    pub failure: Option<String>,
    /// Where its bytes are.
    pub r2_key: Option<String>,
    /// How many there are.
    pub size_bytes: Option<u64>,
    /// Their SHA-256, in hexadecimal.
    pub sha256: Option<String>,
    /// How many octets the disk's file has that they are unpacked to.
    pub file_bytes: Option<u64>,
    /// Microseconds since the epoch.
    pub created_at: i64,
}

/// What is noted of a snapshot when it is stored whole.
#[derive(Clone, Debug)]
pub struct StoredSnapshot {
    /// Where its bytes are.
    pub key: String,
    /// How many there are.
    pub size_bytes: u64,
    /// Their SHA-256, in hexadecimal.
    pub sha256: String,
    /// How many octets they unpack to.
    pub file_bytes: u64,
    /// Its memory, if it holds one.
    pub memory: Option<MemoryObject>,
}

const SELECT: &str = "SELECT seq, id, user, vm, base_image, source_snapshot, label, status, failure, r2_key, \
     size_bytes, sha256, file_bytes, kind, memory, created_at FROM snapshots";

fn read(row: &Row<'_>) -> rusqlite::Result<SnapshotRecord> {
    let status: String = row.get("status")?;
    let source: Option<String> = row.get("source_snapshot")?;
    Ok(SnapshotRecord {
        id: id(row, "id")?,
        user: id(row, "user")?,
        vm: id(row, "vm")?,
        base_image: row.get("base_image")?,
        source_snapshot: source.and_then(|text| text.parse().ok()),
        kind: SnapshotKind::from_word(&row.get::<_, String>("kind")?)
            .ok_or_else(|| rusqlite::Error::InvalidColumnName("kind".into()))?,
        memory: row.get::<_, Option<String>>("memory")?.as_deref().and_then(MemoryObject::from_json),
        label: row.get("label")?,
        status: SnapshotStatus::from_word(&status)
            .ok_or_else(|| rusqlite::Error::InvalidColumnName("status".into()))?,
        failure: row.get("failure")?,
        r2_key: row.get("r2_key")?,
        size_bytes: row.get::<_, Option<i64>>("size_bytes")?.and_then(|n| u64::try_from(n).ok()),
        sha256: row.get("sha256")?,
        file_bytes: row.get::<_, Option<i64>>("file_bytes")?.and_then(|n| u64::try_from(n).ok()),
        created_at: row.get("created_at")?,
    })
}

fn find(db: &Connection, snapshot: &SnapshotId) -> Result<SnapshotRecord> {
    db.prepare_cached(&format!("{SELECT} WHERE id = ?1 AND deleted_at IS NULL"))?
        .query_row([snapshot.as_str()], read)
        .optional()?
        .ok_or(StoreError::NotFound(Kind::Snapshot))
}

impl Store {
    /// Records that a snapshot of a running VM is asked for.
    pub async fn snapshot_create(
        &self,
        user: &UserId,
        vm: &VmId,
        kind: SnapshotKind,
        label: Option<String>,
        base_image: &str,
        limit: u32,
    ) -> Result<SnapshotRecord> {
        let (user, vm, base_image) = (user.clone(), vm.clone(), base_image.to_owned());
        self.db
            .write(move |tx| {
                let machine = vms::owned(tx, &user, &vm)?;
                decide(Call::Snapshot, machine.detail).map_err(Conflict::State)?;
                let count = "SELECT count(*) FROM snapshots WHERE user = ?1 AND deleted_at IS NULL";
                quota(tx, "snapshots", count, user.as_str(), limit)?;
                let snapshot = SnapshotId::generate();
                let base = machine.snapshot.is_none().then_some(base_image);
                tx.execute(
                    "INSERT INTO snapshots (id, user, vm, base_image, source_snapshot, label, status, created_at, kind)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, 'pending', ?7, ?8)",
                    params![
                        snapshot.as_str(),
                        user.as_str(),
                        vm.as_str(),
                        base,
                        machine.snapshot.as_ref().map(SnapshotId::as_str),
                        label,
                        now_us(),
                        kind.word()
                    ],
                )?;
                find(tx, &snapshot)
            })
            .await
    }

    /// A user's snapshots, or those of one VM, newest first.
    pub async fn snapshots(
        &self,
        user: &UserId,
        vm: Option<&VmId>,
        limit: u32,
        cursor: Option<String>,
    ) -> Result<Page<SnapshotRecord>> {
        let (user, vm, cursors) = (user.clone(), vm.cloned(), self.cursors.clone());
        self.db
            .read(move |db| {
                if let Some(vm) = &vm {
                    vms::owned(db, &user, vm)?;
                }
                let scope = format!("snapshots\0{user}\0{vm:?}");
                let owner = user.clone();
                let mut filters =
                    vec![("user = ?", Value::Text(user.into())), ("deleted_at IS NULL", Value::Null)];
                if let Some(vm) = vm {
                    filters.push(("vm = ?", Value::Text(vm.into())));
                }
                let listing = Listing { select: SELECT, filters, sort: "created_at", scope };
                // The contract lets the ID of a snapshot stand for a cursor; one that was deleted since will do.
                let cursor = match cursor.as_deref().map(str::parse::<SnapshotId>) {
                    Some(Ok(after)) => {
                        let sql = "SELECT created_at, seq FROM snapshots WHERE id = ?1 AND user = ?2";
                        let place = db
                            .prepare_cached(sql)?
                            .query_row([after.as_str(), owner.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
                            .optional()?;
                        let (created_at, seq): (i64, i64) = place.ok_or(StoreError::Cursor)?;
                        Some(listing.cursor_after(&cursors, Order::Desc, &created_at.into(), seq)?)
                    }
                    _ => cursor,
                };
                listing.run(db, &cursors, &PageRequest { limit, cursor, order: Order::Desc }, read)
            })
            .await
    }

    /// One snapshot of a user.
    pub async fn snapshot(&self, user: &UserId, snapshot: &SnapshotId) -> Result<SnapshotRecord> {
        let (user, snapshot) = (user.clone(), snapshot.clone());
        self.db
            .read(move |db| {
                find(db, &snapshot).and_then(|found| {
                    if found.user == user { Ok(found) } else { Err(StoreError::NotFound(Kind::Snapshot)) }
                })
            })
            .await
    }

    /// Hides a snapshot; its bytes are collected later.
    pub async fn snapshot_delete(&self, user: &UserId, snapshot: &SnapshotId) -> Result<()> {
        let (user, snapshot) = (user.clone(), snapshot.clone());
        self.db
            .write(move |tx| {
                let gone = tx.execute(
                    "UPDATE snapshots SET deleted_at = ?3,
                            status = CASE status WHEN 'pending' THEN 'failed' ELSE status END
                     WHERE id = ?1 AND user = ?2 AND deleted_at IS NULL",
                    params![snapshot.as_str(), user.as_str(), now_us()],
                )?;
                if gone == 0 { Err(StoreError::NotFound(Kind::Snapshot)) } else { Ok(()) }
            })
            .await
    }

    /// The engine's report that a snapshot is being stored, or that it failed and why. Answers whether that still holds: what
    /// was deleted or failed meanwhile stays so, and nothing is stored of it.
    pub async fn snapshot_advance(
        &self,
        snapshot: &SnapshotId,
        status: SnapshotStatus,
        failure: Option<String>,
    ) -> Result<bool> {
        let snapshot = snapshot.clone();
        let before = match status {
            SnapshotStatus::Uploading => "status = 'pending' AND deleted_at IS NULL",
            // A deleted one too: only then are its bytes collected.
            SnapshotStatus::Failed => "status IN ('pending', 'uploading')",
            SnapshotStatus::Pending | SnapshotStatus::Ready => {
                return Err(StoreError::Internal(format!("no report makes a snapshot {}", status.word())));
            }
        };
        self.db
            .write(move |tx| {
                let changed = tx.execute(
                    &format!("UPDATE snapshots SET status = ?2, failure = ?3 WHERE id = ?1 AND {before}"),
                    params![snapshot.as_str(), status.word(), failure],
                )?;
                Ok(changed > 0)
            })
            .await
    }

    /// The engine's report that a snapshot is stored whole. Its bytes are there now, whatever was collected before.
    pub async fn snapshot_stored(&self, snapshot: &SnapshotId, stored: StoredSnapshot) -> Result<()> {
        let snapshot = snapshot.clone();
        self.db
            .write(move |tx| {
                let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
                tx.execute(
                    "UPDATE snapshots SET status = 'ready', r2_key = ?2, size_bytes = ?3, sha256 = ?4, file_bytes = ?5,
                            memory = ?6, failure = NULL, collected_at = NULL WHERE id = ?1",
                    params![
                        snapshot.as_str(),
                        stored.key,
                        number(stored.size_bytes),
                        stored.sha256,
                        number(stored.file_bytes),
                        stored.memory.as_ref().map(MemoryObject::to_json)
                    ],
                )?;
                Ok(())
            })
            .await
    }

    /// A snapshot, whoever owns it and whether it is deleted or not: for the engine, which holds it for a VM.
    pub async fn snapshot_any(&self, snapshot: &SnapshotId) -> Result<SnapshotRecord> {
        let snapshot = snapshot.clone();
        self.db
            .read(move |db| {
                db.prepare_cached(&format!("{SELECT} WHERE id = ?1"))?
                    .query_row([snapshot.as_str()], read)
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::Snapshot))
            })
            .await
    }

    /// How large the disk of a VM from this snapshot is: as large as that of any VM that it comes from by way of others.
    pub async fn snapshot_disk_bytes(&self, snapshot: &SnapshotId) -> Result<u64> {
        let snapshot = snapshot.clone();
        self.db
            .read(move |db| {
                let bytes: i64 = db
                    .prepare_cached(
                        "WITH RECURSIVE line (vm) AS (
                             SELECT vm FROM snapshots WHERE id = ?1
                             UNION
                             SELECT s.vm FROM line JOIN vms v ON v.id = line.vm JOIN snapshots s ON s.id = v.snapshot)
                         SELECT coalesce(max(disk_bytes), 0) FROM vms WHERE id IN line",
                    )?
                    .query_row([snapshot.as_str()], |row| row.get(0))?;
                Ok(u64::try_from(bytes).unwrap_or(0))
            })
            .await
    }

    /// Snapshots that were asked for and are neither ready nor failed, deleted ones too: for the engine.
    pub async fn snapshots_unfinished(&self) -> Result<Vec<SnapshotRecord>> {
        self.db
            .read(|db| {
                let mut statement = db.prepare_cached(&format!(
                    "{SELECT} WHERE status IN ('pending', 'uploading') ORDER BY seq"
                ))?;
                let found = statement.query_map([], read)?.collect::<rusqlite::Result<_>>()?;
                Ok(found)
            })
            .await
    }
}

/// What a VM's end means for snapshots of it that are not begun: there is nothing to take them of.
pub(crate) fn follow(tx: &Transaction<'_>, vm: &VmId, to: StatusDetail) -> Result<()> {
    if matches!(to, StatusDetail::Stopped | StatusDetail::Failed | StatusDetail::Destroyed) {
        tx.execute(
            "UPDATE snapshots SET status = 'failed', failure = 'the VM ended before the snapshot was taken'
             WHERE vm = ?1 AND status = 'pending'",
            [vm.as_str()],
        )?;
    }
    Ok(())
}
