//! Stores staged copies and removes what deleted snapshots left in the store, beside each other: neither waits for the other, and no
//! account for all that another has to store. Must never remove what the records do not name.

use super::{
    Shared, files,
    snapshots::{failed, insist, key, memory_key, remove, staged, staging, unstage},
    turns::Turns,
};
use crate::{
    promised::{Need, allocated},
    storage::Stored,
};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use std::{collections::HashSet, mem, path::Path, sync::Arc, time::Duration};
use tapgate_fault::point;
use tapgate_model::{SnapshotId, VmId};
use tapgate_store::{
    Kind, MemoryObject, SnapshotKind, SnapshotRecord, SnapshotStatus, StoreError, StoredSnapshot,
};

/// Between two looks at what is left to do, if nothing calls for one.
const SWEEP: Duration = Duration::from_secs(60);
/// How often an upload is begun before the snapshot fails. The store's own client tries each request again by itself.
const UPLOADS: u32 = 3;
/// Uploads at a time, of as many accounts.
const AT_ONCE: usize = 2;
const PAUSE: Duration = Duration::from_secs(10);
/// Removals that may fail before it is left for a while: the store may be down.
const FAILURES: usize = 8;

/// Stores what is staged and removes what is not needed, whenever something calls for it and now and then.
pub(super) async fn keep_store(shared: Arc<Shared>) {
    if let Err(error) = open_staging(&shared).await {
        tracing::error!(%error, "snapshot.staging_unusable");
    }
    shared.staged.open();
    tokio::join!(upload_all(&shared), collect_all(&shared));
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
    for snapshot in unfinished.iter().filter(|one| one.status == SnapshotStatus::Uploading) {
        // As much as there is, and what comes to be stored of it.
        let places: Vec<_> =
            ["qcow2", "memory"].map(|kind| staged(&shared.config, &snapshot.id, kind)).into();
        let octets = places.iter().map(|file| allocated(file)).sum();
        let octets = shared.room.until_stored(octets);
        let need = Need { user: snapshot.user.clone(), octets, places, passes: true };
        shared.staged.keep(&snapshot.id, shared.room.promise_again(need));
    }
    Ok(())
}

async fn upload_all(shared: &Shared) {
    let mut turns = Turns::default();
    let mut running = FuturesUnordered::new();
    loop {
        while running.len() < AT_ONCE
            && let Some(snapshot) = next(shared, &mut turns).await
        {
            running.push(async move {
                finish(shared, &snapshot).await;
                snapshot.id
            });
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            Some(done) = running.next() => turns.done(&done),
            () = shared.uploads.notified() => {}
            () = tokio::time::sleep(SWEEP) => {}
        }
    }
}

async fn next(shared: &Shared, turns: &mut Turns) -> Option<SnapshotRecord> {
    let unfinished = match shared.store.snapshots_unfinished().await {
        Ok(all) => all,
        Err(error) => {
            tracing::error!(%error, "snapshot.records_unreadable");
            return None;
        }
    };
    let uploading = unfinished.iter().filter(|one| one.status == SnapshotStatus::Uploading);
    let waiting: Vec<_> = uploading.map(|one| (one.id.clone(), one.user.clone())).collect();
    let next = turns.next(&waiting)?;
    unfinished.into_iter().find(|one| one.id == next)
}

/// Stores one and notes it, or why not.
async fn finish(shared: &Shared, snapshot: &SnapshotRecord) {
    let result = tokio::select! {
        () = shared.stop.cancelled() => return,
        result = upload(shared, snapshot) => result,
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
            let reason = Some(failed(snapshot, reason));
            let advance =
                || shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Failed, reason.clone());
            insist(shared, &snapshot.vm, advance).await.map(drop)
        }
    };
    // Else the daemon ends: the file stays, and the next one stores it again.
    if noted.is_some() {
        unstage(shared, &snapshot.id);
        // It may have been deleted meanwhile.
        shared.collects.notify_one();
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
    // Guests may have written since it was promised.
    if let Some(Err(lack)) = shared.staged.ask(&snapshot.id, |promise| shared.room.holds(promise)) {
        return Err(lack.to_string());
    }
    let upload = staged(&shared.config, &snapshot.id, "upload");
    // What was deleted while it waited need not be stored to be removed; but for what a former daemon had begun.
    let shown = shared.store.snapshot(&snapshot.user, &snapshot.id).await;
    if matches!(shown, Err(StoreError::NotFound(Kind::Snapshot))) && !upload.exists() {
        return Err("it was deleted".into());
    }
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

async fn collect_all(shared: &Arc<Shared>) {
    let mut put_off = HashSet::new();
    loop {
        let untried = collect(shared, &mut put_off).await.unwrap_or_else(|error| {
            tracing::error!(%error, "snapshot.records_unreadable");
            false
        });
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = shared.collects.notified() => {}
            () = tokio::time::sleep(if untried { PAUSE } else { SWEEP }) => {}
        }
    }
}

/// Removes the bytes of deleted snapshots. By the records alone: what else is in a bucket is none of ours. What cannot be removed
/// is put off until all others were tried, so that it holds none of them up. Whether some were not tried.
async fn collect(shared: &Arc<Shared>, put_off: &mut HashSet<SnapshotId>) -> Result<bool, StoreError> {
    let mut failures = 0;
    loop {
        let of = shared.clone();
        let has_disk = move |vm: &VmId| files::has_disk(&of, vm);
        let gone = shared.store.snapshots_to_collect(has_disk, put_off.clone()).await?;
        if gone.is_empty() {
            // Those that failed before have their turn now, those that failed just now the next time.
            if mem::take(put_off).is_empty() || failures > 0 {
                return Ok(false);
            }
            continue;
        }
        for snapshot in gone {
            if shared.stop.is_cancelled() {
                return Ok(false);
            }
            match collect_one(shared, &snapshot).await {
                Ok(()) => tracing::info!(%snapshot, "snapshot.collected"),
                Err(error) => {
                    tracing::warn!(%snapshot, %error, "snapshot.collection_failed");
                    put_off.insert(snapshot);
                    failures += 1;
                    if failures == FAILURES {
                        return Ok(true);
                    }
                }
            }
        }
    }
}

async fn collect_one(shared: &Shared, snapshot: &SnapshotId) -> Result<(), String> {
    for key in [key(snapshot), memory_key(snapshot)] {
        shared.storage.remove(&key).await.map_err(|error| error.to_string())?;
    }
    point("snapshot.removed");
    shared.store.snapshot_collected(snapshot).await.map_err(|error| error.to_string())
}
