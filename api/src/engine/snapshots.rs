//! Takes the snapshots that the records ask for, beside a VM's life, and brings them to the VMs that are made from them.
//!
//! ```text
//! pending ── the disk is copied to the staging folder ──▶ uploading ── packed and stored (`uploads`) ──▶ ready
//!    └────────────── failed, with a reason ◀──────────────────┘
//! ```
//!
//! A staged file has its name only once it is whole, so after a crash a copy is taken again and an upload is made again.
//! One copy at a time for each VM, and none before there is room for it. Must never hold up the VM's own task.

use super::{Shared, backoff::Backoff, files};
use crate::{
    config::Config,
    promised::{Need, Promise, allocated},
    storage::{FOLDER, Stored},
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tapgate_fault::point;
use tapgate_model::{SnapshotId, VmId};
use tapgate_store::{
    MemoryObject, SnapshotKind, SnapshotRecord, SnapshotStatus, StoreError, Suspension, VmRecord,
};
use tapgate_vmm::{Running, SnapshotInfo};

/// Between two looks at whether a guest is held.
const LOOK: Duration = Duration::from_millis(20);
/// Between two looks at whether a snapshot that waits for room is still wanted.
const WANTED: Duration = Duration::from_secs(5);
/// The file in a VM's folder that its disk is made from.
const FETCHED: &str = "snapshot.qcow2";

/// What there may be of a copy: halves and wholes, and what is noted of its memory.
const STAGED: [&str; 5] = ["part", "qcow2", "memory-part", "memory", "note"];

/// Where copies are until they are stored.
pub(super) fn staging(config: &Config) -> PathBuf {
    config.data_dir.join("staging")
}

/// What the record calls the stored bytes.
pub(super) fn key(snapshot: &SnapshotId) -> String {
    format!("{FOLDER}/{snapshot}.qcow2.zst")
}

/// Where the stored memory is, for the kind that has one.
pub(super) fn memory_key(snapshot: &SnapshotId) -> String {
    format!("{FOLDER}/{snapshot}.memory.zst")
}

pub(super) fn staged(config: &Config, snapshot: &SnapshotId, kind: &str) -> PathBuf {
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
    // What a former daemon left is removed first, and has its room.
    tokio::select! {
        () = shared.stop.cancelled() => return,
        () = shared.staged.opened() => {}
    }
    loop {
        let Some(unfinished) = insist(shared, vm, || shared.store.snapshots_unfinished()).await else {
            return;
        };
        let pending = unfinished.into_iter().find(|s| s.vm == *vm && s.status == SnapshotStatus::Pending);
        let Some(snapshot) = pending else { return };
        let room = tokio::select! {
            () = shared.stop.cancelled() => return,
            room = room_for(shared, &snapshot) => room,
        };
        // It may have been started anew since.
        if let Some(newer) = shared.taking.newer(vm) {
            machine = newer;
        }
        let refused = match room {
            Ok(Some(promise)) => {
                shared.staged.keep(&snapshot.id, promise);
                None
            }
            // It was deleted, or its VM ended, while it waited.
            Ok(None) => continue,
            Err(reason) => Some(reason),
        };
        let taken = if let Some(reason) = refused {
            Err(reason)
        } else if snapshot.kind == SnapshotKind::Disk && !machine.holds_for_snapshots() {
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
            shared.collects.notify_one();
        }
        shared.uploads.notify_one();
    }
}

/// Room for the copy, once it is there; nothing where the snapshot is not wanted any more.
async fn room_for(shared: &Shared, snapshot: &SnapshotRecord) -> Result<Option<Promise>, String> {
    let vm = &snapshot.vm;
    let record =
        shared.store.vm_any(vm).await.map_err(|error| format!("cannot read the VM's record: {error}"))?;
    let memory_mib = (snapshot.kind == SnapshotKind::Memory).then_some(record.resources.memory_mib);
    loop {
        let mut places: Vec<PathBuf> =
            STAGED.iter().map(|kind| staged(&shared.config, &snapshot.id, kind)).collect();
        places.push(files::dir(shared, vm).join(tapgate_vmm::ASIDE));
        let octets = needs(shared, vm, memory_mib).await?;
        let need = Need { user: snapshot.user.clone(), octets, places, passes: true };
        let began = Instant::now();
        let mut promised = std::pin::pin!(shared.room.promise(need));
        let promise = loop {
            tokio::select! {
                promise = &mut promised => break promise.map_err(|lack| lack.to_string())?,
                () = tokio::time::sleep(WANTED) => {
                    let now = shared.store.snapshot_any(&snapshot.id).await;
                    if now.is_ok_and(|now| now.status != SnapshotStatus::Pending) {
                        return Ok(None);
                    }
                }
            }
        };
        // The disk may have grown while it waited.
        if began.elapsed() < WANTED || needs(shared, vm, memory_mib).await? <= octets {
            return Ok(Some(promise));
        }
    }
}

async fn needs(shared: &Shared, vm: &VmId, memory_mib: Option<u32>) -> Result<u64, String> {
    let (room, vm) = (shared.room.clone(), vm.clone());
    let needs = tokio::task::spawn_blocking(move || room.snapshot_of(&vm, memory_mib)).await;
    needs
        .unwrap_or_else(|error| Err(error.to_string()))
        .map_err(|reason| format!("cannot look at the disk: {reason}"))
}

/// What the records answer once they do; nothing where the daemon ends before.
pub(super) async fn insist<T, F>(shared: &Shared, vm: &VmId, ask: impl Fn() -> F) -> Option<T>
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
pub(super) fn unstage(shared: &Shared, snapshot: &SnapshotId) {
    for kind in STAGED {
        remove(&staged(&shared.config, snapshot, kind));
    }
    shared.staged.gone(snapshot);
}

/// Tells of it and hands the reason on.
pub(super) fn failed(snapshot: &SnapshotRecord, reason: String) -> String {
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
    let copied = STAGED.iter().map(|kind| allocated(&staged(&shared.config, &snapshot.id, kind))).sum();
    shared.staged.is(&snapshot.id, shared.room.until_stored(copied));
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

/// Room for the disk that a VM is to be made with, once it is there: until it is made.
pub(super) async fn room_for_disk(shared: &Shared, record: &VmRecord) -> Result<Promise, String> {
    shared.staged.opened().await;
    let snapshot = match &record.snapshot {
        Some(id) => Some(shared.store.snapshot_any(id).await.map_err(|error| format!("{id}: {error}"))?),
        None => None,
    };
    let (folder, fetched) = (files::dir(shared, &record.id), fetched(shared, record));
    let (octets, places) = match &snapshot {
        // What is to be fetched is there, and so is its memory.
        Some(snapshot) if fetched.exists() => {
            (shared.room.fetched_disk(snapshot), vec![fetched, folder.join("disk.new")])
        }
        snapshot => (shared.room.new_disk(snapshot.as_ref()), vec![folder]),
    };
    let need = Need { user: record.user.clone(), octets, places, passes: false };
    shared.room.promise(need).await.map_err(|lack| lack.to_string())
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

pub(super) fn remove(file: &Path) {
    match std::fs::remove_file(file) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => tracing::warn!(file = %file.display(), %error, "snapshot.file_not_removed"),
    }
}
