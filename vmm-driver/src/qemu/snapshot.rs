//! Snapshots of a running VM's disk. The guest is held only while the copy is started: from then on QEMU saves every
//! block before it is overwritten, so the copy is of that one moment however long it takes.

use super::{QemuRunning, file};
use crate::agent::Agent;
use crate::confine::{self, tool::Work, uid_of};
use crate::disk;
use crate::spec::{SnapshotInfo, VmmError};
use crate::turn::Wanted;
use serde_json::{Value, json};
use std::path::Path;
use std::time::{Duration, Instant};
use tapgate_fault::point;

const NODE: &str = "snapshot";
const JOB: &str = "snapshot";
/// The descriptor set that holds the target's file.
const SET: u32 = 64;
const POLL: Duration = Duration::from_millis(100);
/// For a copy to end that is not wanted any more.
const CANCEL: Duration = Duration::from_secs(10);

/// Writes the disk as of now to a new qcow2 file that depends on no other. What fails leaves no file.
pub async fn take(vm: &QemuRunning, to: &Path) -> Result<SnapshotInfo, VmmError> {
    if to.exists() {
        return Err(VmmError::Disk(format!("{} exists already", to.display())));
    }
    let _turn = vm.turn.lock().await;
    // A daemon that was lost in the middle left its copy running.
    clear(vm).await;
    let result = copy(vm, to).await;
    clear(vm).await;
    if result.is_err() {
        let _ = tokio::fs::remove_file(to).await;
    }
    result
}

/// Ends the job if there is one and clears QEMU's side, whatever happened before; what is not there is refused, which is
/// as good.
pub async fn clear(vm: &QemuRunning) {
    let _ = vm.command("job-cancel", json!({"id": JOB})).await;
    let _ = tokio::time::timeout(CANCEL, finish(vm)).await;
    let _ = vm.command("blockdev-del", json!({"node-name": NODE})).await;
    let _ = vm.command("remove-fd", json!({"fdset-id": SET})).await;
}

/// A file that QEMU has open for a copy of the disk.
pub struct Target {
    disk_bytes: u64,
    image_recipe: String,
}

impl Target {
    /// What is known of a snapshot whose guest was held, and not its file systems.
    pub fn info(self, held_us: u64) -> SnapshotInfo {
        let Self { disk_bytes, image_recipe } = self;
        SnapshotInfo { disk_bytes, frozen: false, held_us, image_recipe }
    }
}

/// Makes the file and hands it to QEMU.
pub async fn target(vm: &QemuRunning, to: &Path) -> Result<Target, VmmError> {
    let image = vm.spec.image.as_ref().ok_or_else(|| VmmError::Disk("the VM has no image".into()))?;
    let (dir, image, target) = (vm.spec.dir.clone(), image.clone(), to.to_owned());
    let uid = uid_of(vm.spec.net.slot);
    let prepare = move || {
        let disk = disk::find(&dir).ok_or_else(|| VmmError::Disk("the VM has no disk".into()))?;
        let bytes = disk::size(&disk)?;
        disk::create_snapshot(&target, bytes, Work { uid, wanted: &Wanted::default() })?;
        let recipe = disk::origin(&dir, &image)?.manifest().recipe.clone();
        Ok::<_, VmmError>((bytes, recipe, confine::open(&target, true)?))
    };
    let (disk_bytes, image_recipe, target) =
        tokio::task::spawn_blocking(prepare).await.map_err(|e| VmmError::Disk(e.to_string()))??;
    vm.command_with("add-fd", json!({"fdset-id": SET}), Some(target)).await?;
    let node = json!({"node-name": NODE, "driver": "qcow2", "discard": "unmap", "detect-zeroes": "unmap",
        "file": {"driver": "file", "filename": format!("/dev/fdset/{SET}"), "locking": "off"}});
    vm.command("blockdev-add", node).await?;
    Ok(Target { disk_bytes, image_recipe })
}

/// Starts the copy: of the disk as it is at this moment.
pub async fn begin(vm: &QemuRunning) -> Result<(), VmmError> {
    let job = json!({"job-id": JOB, "device": "root", "target": NODE, "sync": "full", "auto-dismiss": false});
    vm.command("blockdev-backup", job).await.map(drop)
}

async fn copy(vm: &QemuRunning, to: &Path) -> Result<SnapshotInfo, VmmError> {
    let target = target(vm, to).await?;
    let mut agent = Agent::connect(&vm.spec.dir.join(file::AGENT)).await.ok();
    if let Some(agent) = &mut agent {
        // What is written out now need not be while everyone is held. Other agents do not know this.
        let _ = agent.write_out().await;
    }
    let held = Instant::now();
    let mut frozen = match &mut agent {
        Some(agent) => agent.freeze().await.is_ok_and(|count| count > 0),
        None => false,
    };
    let froze = held.elapsed();
    point("snapshot.frozen");
    let started = begin(vm).await;
    let began = held.elapsed();
    point("snapshot.begun");
    if let Some(agent) = &mut agent {
        // Also after a failure. Thawed by itself in between, the guest had written again before the copy began.
        frozen &= agent.thaw().await.is_ok_and(|count| count > 0);
    }
    let held_us = u64::try_from(held.elapsed().as_micros()).unwrap_or(u64::MAX);
    tracing::debug!(vm = %vm.spec.id, froze = ?froze, began = ?(began - froze), thawed = ?(held.elapsed() - began), "held");
    started?;
    finish(vm).await?;
    Ok(SnapshotInfo { frozen, ..target.info(held_us) })
}

/// Waits for the job's end and says how it ended.
pub async fn finish(vm: &QemuRunning) -> Result<(), VmmError> {
    loop {
        let jobs = match vm.command("query-jobs", Value::Null).await {
            // Busy with the copy on a slow host. One that hangs is ended by its supervisor.
            Err(VmmError::Silent(_)) => continue,
            jobs => jobs?,
        };
        let job = jobs.as_array().into_iter().flatten().find(|job| job["id"] == JOB).cloned();
        match job {
            Some(job) if job["status"] == "concluded" => {
                let _ = vm.command("job-dismiss", json!({"id": JOB})).await;
                return match job.get("error").and_then(Value::as_str) {
                    Some(error) => Err(VmmError::Disk(format!("the snapshot's copy failed: {error}"))),
                    None => Ok(()),
                };
            }
            Some(_) => tokio::time::sleep(POLL).await,
            None => return Err(VmmError::Disk("the snapshot's copy is gone".into())),
        }
    }
}
