//! Takes the snapshots that the records ask for, beside a VM's life, and keeps the store of them tidy.
//!
//! ```text
//! pending ── the disk is copied to the staging folder ──▶ uploading ── packed and stored ──▶ ready
//!    └────────────── failed, with a reason ◀──────────────────┘
//! ```
//!
//! A staged file has its name only once it is whole, so after a crash a copy is taken again and an upload is made again.
//! One copy at a time for each VM, one upload at a time. Must never hold up the VM's own task.

use super::{Shared, files};
use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};
use tapgate_fault::point;
use tapgate_model::{SnapshotId, VmId};
use tapgate_store::{SnapshotRecord, SnapshotStatus, StoreError, StoredSnapshot, VmRecord};
use tapgate_vmm::Running;

use crate::{
    config::Config,
    storage::{FOLDER, Stored},
};

/// Between two looks at what is left to do, if nothing calls for one.
const SWEEP: Duration = Duration::from_secs(60);
/// How often an upload is begun before the snapshot fails. The store's own client tries each request again by itself.
const UPLOADS: u32 = 3;
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

fn staged(config: &Config, snapshot: &SnapshotId, kind: &str) -> PathBuf {
    staging(config).join(format!("{snapshot}.{kind}"))
}

/// Starts what is asked for of this VM, unless it is being done already.
pub(super) fn take_up(shared: &Arc<Shared>, vm: &VmId, machine: Arc<dyn Running>) {
    let busy =
        |shared: &Shared| !shared.taking.lock().unwrap_or_else(PoisonError::into_inner).insert(vm.clone());
    if busy(shared) {
        return;
    }
    let (shared, vm) = (shared.clone(), vm.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = shared.stop.cancelled() => {}
            () = take_all(&shared, &vm, machine.as_ref()) => {}
        }
        shared.taking.lock().unwrap_or_else(PoisonError::into_inner).remove(&vm);
    });
}

async fn take_all(shared: &Shared, vm: &VmId, machine: &dyn Running) {
    loop {
        let pending = match shared.store.snapshots_unfinished().await {
            Ok(all) => all.into_iter().find(|s| s.vm == *vm && s.status == SnapshotStatus::Pending),
            Err(error) => return tracing::error!(%vm, %error, "snapshot.records_unreadable"),
        };
        let Some(snapshot) = pending else { return };
        let advanced = match take(shared, &snapshot, machine).await {
            Ok(()) => shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Uploading, None).await,
            Err(reason) => fail(shared, &snapshot, reason).await,
        };
        if let Err(error) = advanced {
            return tracing::error!(%vm, %error, "snapshot.record_unwritable");
        }
        shared.uploads.notify_one();
    }
}

async fn fail(shared: &Shared, snapshot: &SnapshotRecord, reason: String) -> Result<(), StoreError> {
    tracing::error!(vm = %snapshot.vm, snapshot = %snapshot.id, %reason, "snapshot.failed");
    shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Failed, Some(reason)).await
}

/// Copies the disk to the staging folder.
async fn take(shared: &Shared, snapshot: &SnapshotRecord, machine: &dyn Running) -> Result<(), String> {
    let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what}: {error}");
    let (part, whole) =
        (staged(&shared.config, &snapshot.id, "part"), staged(&shared.config, &snapshot.id, "qcow2"));
    let _ = tokio::fs::remove_file(&part).await;
    let info = machine.snapshot(&part).await.map_err(|error| error.to_string())?;
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
        let file = staged(&shared.config, &snapshot.id, "qcow2");
        let noted = match result {
            Ok(stored) => {
                point("snapshot.stored");
                tracing::info!(vm = %snapshot.vm, snapshot = %snapshot.id, stored = stored.stored_bytes, "snapshot.ready");
                let stored = StoredSnapshot {
                    key: key(&snapshot.id),
                    size_bytes: stored.stored_bytes,
                    sha256: stored.sha256,
                    file_bytes: stored.file_bytes,
                };
                shared.store.snapshot_stored(&snapshot.id, stored).await
            }
            Err(reason) => fail(shared, &snapshot, reason).await,
        };
        if let Err(error) = noted {
            // The file stays: the upload is made again when the records can be written.
            return tracing::error!(snapshot = %snapshot.id, %error, "snapshot.record_unwritable");
        }
        remove(&file);
    }
}

async fn upload(shared: &Shared, snapshot: &SnapshotRecord) -> Result<Stored, String> {
    let file = staged(&shared.config, &snapshot.id, "qcow2");
    if !file.exists() {
        return Err("the daemon ended before the disk was copied; take another".into());
    }
    let note = staged(&shared.config, &snapshot.id, "upload");
    let mut attempt = 1;
    loop {
        match shared.storage.put(&key(&snapshot.id), &file, &note).await {
            Ok(stored) => return Ok(stored),
            Err(error) if attempt < UPLOADS => {
                tracing::warn!(snapshot = %snapshot.id, %error, attempt, "snapshot.upload_failed");
                attempt += 1;
                tokio::time::sleep(PAUSE).await;
            }
            Err(error) => {
                shared.storage.forget_upload(&key(&snapshot.id), &note).await;
                return Err(error.to_string());
            }
        }
    }
}

/// Removes the bytes of deleted snapshots. By the records alone: what else is in a bucket is none of ours.
async fn collect(shared: &Shared) -> Result<(), String> {
    let gone = shared.store.snapshots_to_collect().await.map_err(|error| error.to_string())?;
    for snapshot in gone {
        shared.storage.remove(&key(&snapshot)).await.map_err(|error| error.to_string())?;
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
    let fetched = shared.storage.fetch(&key(id), &expected, &to).await;
    fetched.map_err(|error| format!("cannot bring {id} back: {error}"))?;
    point("create.fetched");
    tracing::info!(vm = %record.id, snapshot = %id, fetch_us = began.elapsed().as_micros() as u64, "snapshot.fetched");
    Ok(())
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
