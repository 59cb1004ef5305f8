//! Snapshots of a running VM's disk under these drivers: a copy of its raw file while nothing is written to it.
//!
//! Where the guest's agent freezes its file systems the guest's CPUs run on. Elsewhere they are held for the copy, which takes
//! milliseconds where the host's file system shares blocks, and as long as copying does where it does not.

use super::{ApiRunning, Live, hold};
use crate::agent::{Agent, VSOCK_PORT};
use crate::confine::{tool::Work, uid_of};
use crate::disk;
use crate::spec::{SnapshotInfo, VmmError};
use crate::turn::Wanted;
use std::path::Path;
use std::time::Instant;

/// The copy in the VM's folder that the snapshot is packed from.
pub const ASIDE: &str = "snapshot.raw";

/// Writes the disk as of now to a new qcow2 file that depends on no other. What fails leaves no file.
pub(super) async fn take(vm: &ApiRunning, to: &Path) -> Result<SnapshotInfo, VmmError> {
    if to.exists() {
        return Err(VmmError::Disk(format!("{} exists already", to.display())));
    }
    let _one = vm.snapshots.lock().await;
    let copy = vm.spec.dir.join(ASIDE);
    let result = copy_and_pack(vm, &copy, to).await;
    let _ = tokio::fs::remove_file(&copy).await;
    if result.is_err() {
        let _ = tokio::fs::remove_file(to).await;
    }
    result
}

async fn copy_and_pack(vm: &ApiRunning, copy: &Path, to: &Path) -> Result<SnapshotInfo, VmmError> {
    let image = vm.spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
    let image_recipe = disk::origin(&vm.spec.dir, image)?.manifest().recipe.clone();
    let held = Instant::now();
    let mut frozen = frozen_copy(vm, copy).await?;
    let mut held_us = micros(held);
    if !frozen {
        let (live, held) = (vm.live(), Instant::now());
        let copied = match vm.driver.ask(&vm.spec, &live, &vm.driver.kind.hold(true)).await {
            Ok(_) => copy_disk(vm, copy).await,
            Err(error) => Err(error),
        };
        // Whatever happened, the guest goes on: it may be held though that was not answered.
        hold::go_on(&vm.driver, &vm.spec, &live).await?;
        held_us = micros(held);
        copied?;
        frozen = false;
    }
    let (from, to) = (copy.to_owned(), to.to_owned());
    let disk_bytes = tokio::fs::metadata(copy).await.map_err(VmmError::io("the copy"))?.len();
    let uid = uid_of(vm.spec.net.slot);
    tokio::task::spawn_blocking(move || disk::pack(&from, &to, Work { uid, wanted: &Wanted::default() }))
        .await
        .map_err(|e| VmmError::Disk(e.to_string()))??;
    Ok(SnapshotInfo { disk_bytes, frozen, held_us, image_recipe })
}

/// A copy while the guest's file systems are frozen; `false` if they were not, or not for all of it.
async fn frozen_copy(vm: &ApiRunning, to: &Path) -> Result<bool, VmmError> {
    let Ok(mut agent) = agent(&vm.live()).await else { return Ok(false) };
    // What is written out now need not be while everyone is held.
    let _ = agent.write_out().await;
    if !agent.freeze().await.is_ok_and(|count| count > 0) {
        return Ok(false);
    }
    let copied = copy_disk(vm, to).await;
    // Thawed by itself in between, the guest had written again before the copy was whole.
    let whole = agent.thaw().await.is_ok_and(|count| count > 0);
    copied.map(|()| whole)
}

async fn copy_disk(vm: &ApiRunning, to: &Path) -> Result<(), VmmError> {
    let (dir, to) = (vm.spec.dir.clone(), to.to_owned());
    let copy = move || {
        let disk = disk::find(&dir).ok_or_else(|| VmmError::Disk("the VM has no disk".into()))?;
        disk::copy_raw(&disk.path, &to, &Wanted::default())
    };
    tokio::task::spawn_blocking(copy).await.map_err(|e| VmmError::Disk(e.to_string()))?
}

/// The guest's agent, by the VMM's vsock device: the host says which port, the VMM answers `OK` when the guest took it.
pub(super) async fn agent(live: &Live) -> Result<Agent, VmmError> {
    let stream = live.scratch.connect("agent.sock").await.map_err(VmmError::io("agent channel"))?;
    Agent::through(stream, Some(VSOCK_PORT)).await
}

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}
