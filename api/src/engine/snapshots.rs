//! Takes the snapshots that the records ask for, beside a VM's life, and removes the files that no record needs.
//!
//! A snapshot's file has its name only once it is whole. One at a time for each VM. Must never hold up the VM's own task.

use super::Shared;
use crate::config::Config;
use std::{
    path::{Path, PathBuf},
    sync::{Arc, PoisonError},
    time::Duration,
};
use tapgate_model::{SnapshotId, VmId};
use tapgate_store::{SnapshotRecord, SnapshotStatus};
use tapgate_vmm::Running;

/// Between two rounds of removing what no record needs.
const SWEEP: Duration = Duration::from_secs(60);

fn folder(config: &Config) -> PathBuf {
    config.data_dir.join("snapshots")
}

/// What the record calls the stored bytes.
fn key(snapshot: &SnapshotId) -> String {
    format!("snapshots/{snapshot}.qcow2")
}

/// Where a whole snapshot lies.
pub(super) fn path(config: &Config, snapshot: &SnapshotId) -> PathBuf {
    config.data_dir.join(key(snapshot))
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
        let result = take(shared, &snapshot, machine).await;
        let advanced = match result {
            Ok(size) => {
                tracing::info!(%vm, snapshot = %snapshot.id, size, "snapshot.ready");
                let stored = Some((key(&snapshot.id), size));
                shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Ready, stored, None).await
            }
            Err(reason) => {
                tracing::error!(%vm, snapshot = %snapshot.id, %reason, "snapshot.failed");
                shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Failed, None, Some(reason)).await
            }
        };
        if let Err(error) = advanced {
            return tracing::error!(%vm, %error, "snapshot.record_unwritable");
        }
    }
}

async fn take(shared: &Shared, snapshot: &SnapshotRecord, machine: &dyn Running) -> Result<u64, String> {
    let folder = folder(&shared.config);
    let failed = |what: &'static str| move |error: std::io::Error| format!("cannot {what}: {error}");
    tokio::fs::create_dir_all(&folder).await.map_err(failed("make the snapshots' folder"))?;
    shared
        .store
        .snapshot_advance(&snapshot.id, SnapshotStatus::Uploading, None, None)
        .await
        .map_err(|error| error.to_string())?;
    let whole = path(&shared.config, &snapshot.id);
    let part = whole.with_extension("part");
    machine.snapshot(&part).await.map_err(|error| error.to_string())?;
    let file = tokio::fs::File::open(&part).await.map_err(failed("open the snapshot"))?;
    file.sync_all().await.map_err(failed("write the snapshot out"))?;
    tokio::fs::rename(&part, &whole).await.map_err(failed("name the snapshot"))?;
    let meta = file.metadata().await.map_err(failed("measure the snapshot"))?;
    Ok(meta.len())
}

/// Marks what a former daemon left half done, and removes files that no record needs, now and then.
pub(super) async fn keep_tidy(shared: Arc<Shared>) {
    match shared.store.snapshots_unfinished().await {
        Ok(left) => {
            for snapshot in left.into_iter().filter(|s| s.status == SnapshotStatus::Uploading) {
                let reason = "the daemon ended while it was taken; take another".to_owned();
                let done =
                    shared.store.snapshot_advance(&snapshot.id, SnapshotStatus::Failed, None, Some(reason));
                if let Err(error) = done.await {
                    tracing::error!(snapshot = %snapshot.id, %error, "snapshot.record_unwritable");
                }
            }
        }
        Err(error) => tracing::error!(%error, "snapshot.records_unreadable"),
    }
    loop {
        if let Err(error) = sweep(&shared).await {
            tracing::warn!(%error, "snapshot.sweep_failed");
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(SWEEP) => {}
        }
    }
}

async fn sweep(shared: &Shared) -> Result<(), String> {
    // The files first: one that appears after the records were read is not taken for a leftover.
    let files: Vec<PathBuf> = match std::fs::read_dir(folder(&shared.config)) {
        Ok(entries) => entries.flatten().map(|entry| entry.path()).collect(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error.to_string()),
    };
    let held = shared.store.snapshots_held().await.map_err(|error| error.to_string())?;
    for file in files {
        let id =
            file.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse::<SnapshotId>().ok());
        if id.is_some_and(|id| !held.contains(&id)) {
            remove(&file);
        }
    }
    Ok(())
}

fn remove(file: &Path) {
    match std::fs::remove_file(file) {
        Ok(()) => tracing::info!(file = %file.display(), "snapshot.file_removed"),
        Err(error) => tracing::warn!(file = %file.display(), %error, "snapshot.file_not_removed"),
    }
}
