//! Takes the snapshots that the records ask for, beside a VM's life, and keeps the store of them tidy.
//!
//! ```text
//! pending ── the disk is copied to the staging folder ──▶ uploading ── packed and stored ──▶ ready
//!    └────────────── failed, with a reason ◀──────────────────┘
//! ```
//!
//! A staged file has its name only once it is whole, so after a crash a copy is taken again and an upload is made again.
//! One copy at a time for each VM, one upload at a time. Must never hold up the VM's own task.

use super::{Shared, backoff::Backoff, files};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tapgate_fault::point;
use tapgate_model::{SnapshotId, VmId};
use tapgate_store::{
    MemoryObject, SnapshotKind, SnapshotRecord, SnapshotStatus, StoreError, StoredSnapshot, Suspension,
    VmRecord,
};
use tapgate_vmm::{Running, SnapshotInfo};

use crate::{
    config::Config,
    storage::{FOLDER, Stored},
};

/// Between two looks at what is left to do, if nothing calls for one.
const SWEEP: Duration = Duration::from_secs(60);
/// How often an upload is begun before the snapshot fails. The store's own client tries each request again by itself.
const UPLOADS: u32 = 3;
/// Between two looks at whether a guest is held.
const LOOK: Duration = Duration::from_millis(20);
const PAUSE: Duration = Duration::from_secs(10);
/// The file in a VM's folder that its disk is made from.
const FETCHED: &str = "snapshot.qcow2";

/// Where copies are until they are stored.
fn staging(config: &Config) -> PathBuf {
    config.data_dir.join("staging")
}

/// What the record calls the stored bytes.
fn key(snapshot: &SnapshotId) -> String {
    format!("{FOLDER}/{snapshot}.qcow2.zst")
}

/// Where the stored memory is, for the kind that has one.
fn memory_key(snapshot: &SnapshotId) -> String {
    format!("{FOLDER}/{snapshot}.memory.zst")
}

fn staged(config: &Config, snapshot: &SnapshotId, kind: &str) -> PathBuf {
    staging(config).join(format!("{snapshot}.{kind}"))
}

/// Starts what is asked for of this VM; where that is being done already, it looks again before it ends.
pub(super) fn take_up(shared: &Arc<Shared>, vm: &VmId, machine: Arc<dyn Running>) {
    let mut next = shared.taking.begin(vm, machine);
    if next.is_none() {
        return;
    }
    let (shared, vm) = (shared.clone(), vm.clone());
    tokio::spawn(async move {
        while let Some(machine) = next {
            take_all(&shared, &vm, machine).await;
            if shared.stop.is_cancelled() {
                return shared.taking.end(&vm);
            }
            next = shared.taking.next(&vm);
        }
    });
}

/// Comes back when nothing is being taken of this VM, for a daemon that ends: it is not to leave a guest held.
pub(super) async fn let_go(shared: &Shared, vm: &VmId) {
    while shared.taking.busy(vm) {
        tokio::time::sleep(LOOK).await;
    }
}

/// Takes what is asked for so far, one after the other.
async fn take_all(shared: &Shared, vm: &VmId, mut machine: Arc<dyn Running>) {
    loop {
        let Some(unfinished) = insist(shared, vm, || shared.store.snapshots_unfinished()).await else {
            return;
        };
        let pending = unfinished.into_iter().find(|s| s.vm == *vm && s.status == SnapshotStatus::Pending);
        let Some(snapshot) = pending else { return };
        // It may have been started anew since.
        if let Some(newer) = shared.taking.newer(vm) {
            machine = newer;
        }
        let taken = if snapshot.kind == SnapshotKind::Disk && !machine.holds_for_snapshots() {
            tokio::select! {
                () = shared.stop.cancelled() => return,
                taken = take(shared, &snapshot, machine.as_ref()) => taken,
            }
        } else if shared.stop.is_cancelled() {
            return;
        } else {
            // Cut off in the middle it would leave the guest held until there is a daemon again.
            let _held = shared.held.hold();
            take(shared, &snapshot, machine.as_ref()).await
        };
        let kept = taken.is_ok();
        let (status, reason) = match taken {
            Ok(()) => (SnapshotStatus::Uploading, None),
            Err(reason) => (SnapshotStatus::Failed, Some(failed(&snapshot, reason))),
        };
        // The copy is made: only the step is tried again.
        let advance = || shared.store.snapshot_advance(&snapshot.id, status, reason.clone());
        let Some(advanced) = insist(shared, vm, advance).await else { return };
        if !(kept && advanced) {
            // It failed; or it was deleted, or its VM ended, while the copy was made.
            tracing::info!(%vm, snapshot = %snapshot.id, "snapshot.not_kept");
            unstage(shared, &snapshot.id);
        }
        shared.uploads.notify_one();
    }
}

/// What the records answer once they do; nothing where the daemon ends before.
async fn insist<T, F>(shared: &Shared, vm: &VmId, ask: impl Fn() -> F) -> Option<T>
where
    F: Future<Output = Result<T, StoreError>>,
{
    let mut backoff = Backoff::new();
    loop {
        let error = match ask().await {
            Ok(answer) => return Some(answer),
            Err(error) => error,
        };
        let pause = backoff.pause();
        tracing::error!(%vm, %error, again_in_s = pause.as_secs(), "snapshot.records_unusable");
        tokio::select! {
            () = shared.stop.cancelled() => return None,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Removes what was copied of a snapshot that is stored, or that nobody wants any more.
fn unstage(shared: &Shared, snapshot: &SnapshotId) {
    for kind in ["part", "qcow2", "memory-part", "memory", "note"] {
        remove(&staged(&shared.config, snapshot, kind));
    }
}

/// Tells of it and hands the reason on.
fn failed(snapshot: &SnapshotRecord, reason: String) -> String {
    tracing::error!(vm = %snapshot.vm, snapshot = %snapshot.id, %reason, "snapshot.failed");
    reason
}

/// Copies the disk to the staging folder.
async fn take(shared: &Shared, snapshot: &SnapshotRecord, machine: &dyn Running) -> Result<(), String> {
    let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what}: {error}");
    let (part, whole) =
        (staged(&shared.config, &snapshot.id, "part"), staged(&shared.config, &snapshot.id, "qcow2"));
    let _ = tokio::fs::remove_file(&part).await;
    let info = match snapshot.kind {
        SnapshotKind::Disk => machine.snapshot(&part).await.map_err(|error| error.to_string())?,
        SnapshotKind::Memory => take_with_memory(shared, snapshot, machine, &part).await?,
    };
    point("snapshot.copied");
    let file = tokio::fs::File::open(&part).await.map_err(failed("open the snapshot"))?;
    file.sync_all().await.map_err(failed("write the snapshot out"))?;
    tokio::fs::rename(&part, &whole).await.map_err(failed("name the snapshot"))?;
    point("snapshot.named");
    let bytes = file.metadata().await.map_err(failed("measure the snapshot"))?.len();
    tracing::info!(vm = %snapshot.vm, snapshot = %snapshot.id, held_us = info.held_us, frozen = info.frozen, bytes,
        "snapshot.taken");
    Ok(())
}

/// Copies disk and memory. The disk's copy gets its name last, so where that is the others are whole.
async fn take_with_memory(
    shared: &Shared,
    snapshot: &SnapshotRecord,
    machine: &dyn Running,
    disk: &Path,
) -> Result<SnapshotInfo, String> {
    let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what}: {error}");
    let [part, whole, note] =
        ["memory-part", "memory", "note"].map(|kind| staged(&shared.config, &snapshot.id, kind));
    let _ = tokio::fs::remove_file(&part).await;
    let taken = machine.snapshot_memory(disk, &part).await.map_err(|error| error.to_string())?;
    tokio::fs::write(&note, &taken.note).await.map_err(failed("note the memory"))?;
    let noted = tokio::fs::File::open(&note).await.map_err(failed("note the memory"))?;
    noted.sync_all().await.map_err(failed("note the memory"))?;
    tokio::fs::rename(&part, &whole).await.map_err(failed("name the memory"))?;
    tracing::info!(vm = %snapshot.vm, snapshot = %snapshot.id, memory_bytes = taken.memory_bytes,
        stored_bytes = taken.stored_bytes, "snapshot.memory_taken");
    Ok(taken.disk)
}

/// Stores what is staged and removes what is not needed, whenever something calls for it and now and then.
pub(super) async fn keep_store(shared: Arc<Shared>) {
    if let Err(error) = open_staging(&shared).await {
        tracing::error!(%error, "snapshot.staging_unusable");
    }
    loop {
        upload_all(&shared).await;
        if let Err(error) = collect(&shared).await {
            tracing::warn!(%error, "snapshot.collection_failed");
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = shared.uploads.notified() => {}
            () = tokio::time::sleep(SWEEP) => {}
        }
    }
}

/// Makes the staging folder and removes from it what no unfinished snapshot needs: halves, and wholes that are stored.
async fn open_staging(shared: &Shared) -> Result<(), String> {
    use std::os::unix::fs::DirBuilderExt as _;
    let folder = staging(&shared.config);
    let text = |error: std::io::Error| format!("{}: {error}", folder.display());
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder).map_err(text)?;
    let unfinished = shared.store.snapshots_unfinished().await.map_err(|error| error.to_string())?;
    for file in std::fs::read_dir(&folder).map_err(text)?.flatten().map(|entry| entry.path()) {
        let uploading = unfinished.iter().any(|snapshot| {
            let ours = file.file_stem().is_some_and(|stem| stem == snapshot.id.as_str());
            ours && snapshot.status == SnapshotStatus::Uploading
        });
        if !uploading {
            remove(&file);
        }
    }
    Ok(())
}

async fn upload_all(shared: &Shared) {
    loop {
        let next = match shared.store.snapshots_unfinished().await {
            Ok(all) => all.into_iter().find(|s| s.status == SnapshotStatus::Uploading),
            Err(error) => return tracing::error!(%error, "snapshot.records_unreadable"),
        };
        let Some(snapshot) = next else { return };
        let result = tokio::select! {
            () = shared.stop.cancelled() => return,
            result = upload(shared, &snapshot) => result,
        };
        // Stored or not: only the step is tried again.
        let noted = match result {
            Ok((stored, memory)) => {
                point("snapshot.stored");
                tracing::info!(vm = %snapshot.vm, snapshot = %snapshot.id, stored = stored.stored_bytes, "snapshot.ready");
                let stored = StoredSnapshot {
                    key: key(&snapshot.id),
                    size_bytes: stored.stored_bytes,
                    sha256: stored.sha256,
                    file_bytes: stored.file_bytes,
                    memory,
                };
                let note = || shared.store.snapshot_stored(&snapshot.id, stored.clone());
                insist(shared, &snapshot.vm, note).await
            }
            Err(reason) => {
                let reason = Some(failed(&snapshot, reason));
                let advance =
                    || shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Failed, reason.clone());
                insist(shared, &snapshot.vm, advance).await.map(drop)
            }
        };
        // The daemon ends: the file stays, and the next one stores it again.
        let Some(()) = noted else { return };
        unstage(shared, &snapshot.id);
    }
}

/// Stores the memory, where there is one, and then the disk.
async fn upload(
    shared: &Shared,
    snapshot: &SnapshotRecord,
) -> Result<(Stored, Option<MemoryObject>), String> {
    let file = staged(&shared.config, &snapshot.id, "qcow2");
    if !file.exists() {
        return Err("the daemon ended before the disk was copied; take another".into());
    }
    let upload = staged(&shared.config, &snapshot.id, "upload");
    let memory = match snapshot.kind {
        SnapshotKind::Disk => None,
        SnapshotKind::Memory => {
            let of = |kind| staged(&shared.config, &snapshot.id, kind);
            let unnoted = |error| format!("what was noted of the memory cannot be read: {error}");
            let note = tokio::fs::read_to_string(of("note")).await.map_err(unnoted)?;
            let key = memory_key(&snapshot.id);
            let Stored { sha256, stored_bytes, file_bytes } =
                put(shared, snapshot, &key, &of("memory"), &upload).await?;
            Some(MemoryObject { sha256, stored_bytes, file_bytes, note })
        }
    };
    Ok((put(shared, snapshot, &key(&snapshot.id), &file, &upload).await?, memory))
}

async fn put(
    shared: &Shared,
    snapshot: &SnapshotRecord,
    key: &str,
    file: &Path,
    note: &Path,
) -> Result<Stored, String> {
    let mut attempt = 1;
    loop {
        match shared.storage.put(key, file, note).await {
            Ok(stored) => return Ok(stored),
            Err(error) if attempt < UPLOADS => {
                tracing::warn!(snapshot = %snapshot.id, %error, attempt, "snapshot.upload_failed");
                attempt += 1;
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => {
                shared.storage.forget_upload(key, note).await;
                return Err(error.to_string());
            }
        }
    }
}

/// Removes the bytes of deleted snapshots. By the records alone: what else is in a bucket is none of ours.
async fn collect(shared: &Arc<Shared>) -> Result<(), String> {
    let of = shared.clone();
    let gone = shared.store.snapshots_to_collect(move |vm| files::has_disk(&of, vm)).await;
    let gone = gone.map_err(|error| error.to_string())?;
    for snapshot in gone {
        for key in [key(&snapshot), memory_key(&snapshot)] {
            shared.storage.remove(&key).await.map_err(|error| error.to_string())?;
        }
        point("snapshot.removed");
        shared.store.snapshot_collected(&snapshot).await.map_err(|error| error.to_string())?;
        tracing::info!(%snapshot, "snapshot.collected");
    }
    Ok(())
}

/// Brings the snapshot that a VM is made from into its folder, verified, if it is not there.
pub(super) async fn fetch(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    let Some(id) = &record.snapshot else { return Ok(()) };
    let to = fetched(shared, record);
    if to.exists() {
        return Ok(());
    }
    let snapshot = shared.store.snapshot_any(id).await.map_err(|error| format!("{id}: {error}"))?;
    let (Some(sha256), Some(stored_bytes), Some(file_bytes)) =
        (snapshot.sha256, snapshot.size_bytes, snapshot.file_bytes)
    else {
        return Err(format!("nothing is known that {id} could be checked by; take another snapshot"));
    };
    let expected = Stored { sha256, stored_bytes, file_bytes };
    let began = Instant::now();
    if record.suspension == Suspension::Cloned {
        fetch_memory(shared, record, id, snapshot.memory).await?;
    }
    let fetched = shared.storage.fetch(&key(id), &expected, &to).await;
    fetched.map_err(|error| format!("cannot bring {id} back: {error}"))?;
    point("create.fetched");
    tracing::info!(vm = %record.id, snapshot = %id, fetch_us = began.elapsed().as_micros() as u64, "snapshot.fetched");
    Ok(())
}

/// The same for the memory that a clone goes on with. The disk comes after it, so that where that is this is whole.
async fn fetch_memory(
    shared: &Shared,
    record: &VmRecord,
    id: &SnapshotId,
    memory: Option<MemoryObject>,
) -> Result<(), String> {
    let memory =
        memory.ok_or_else(|| format!("nothing is known of the memory of {id}; take another snapshot"))?;
    let MemoryObject { sha256, stored_bytes, file_bytes, note } = memory;
    let dir = files::dir(shared, &record.id);
    let expected = Stored { sha256, stored_bytes, file_bytes };
    let fetched = shared.storage.fetch(&memory_key(id), &expected, &dir.join(tapgate_vmm::MEMORY)).await;
    fetched.map_err(|error| format!("cannot bring the memory of {id} back: {error}"))?;
    tapgate_vmm::place_memory(&dir, &note).map_err(|error| error.to_string())
}

/// Where a fetched snapshot lies; it is needed until the disk is made.
pub(super) fn fetched(shared: &Shared, record: &VmRecord) -> PathBuf {
    files::dir(shared, &record.id).join(FETCHED)
}

/// The disk is made: what it was made from can go.
pub(super) fn drop_fetched(shared: &Shared, record: &VmRecord) {
    let file = fetched(shared, record);
    if file.exists() {
        remove(&file);
    }
}

fn remove(file: &Path) {
    match std::fs::remove_file(file) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(file = %file.display(), %error, "snapshot.file_not_removed"),
    }
}
