//! Suspending a VM: its memory goes into its folder, its VMM ends, and the next start goes on from there.
//!
//! ```text
//! stopping, wanted ── the memory is whole, the VMM ended ──▶ stopped, kept ── start ──▶ starting ── used ──▶ running
//!        └── it cannot be written ──▶ running, with the reason
//! ```
//!
//! What the folder holds decides whether there is a memory; the records decide whether it may be used. Both must say so.

use super::{
    Shared, files,
    life::{Halt, Live, Next, release},
};
use crate::{
    capacity::memory_file,
    promised::{Need, Promise},
};
use std::time::Duration;
use tapgate_model::{StatusDetail as S, VmId};
use tapgate_store::{Suspension, VmRecord};

/// After the records could not be written.
const RETRY: Duration = Duration::from_secs(1);

/// Whether a user asked for it and it is not done.
pub(super) fn wanted(record: &VmRecord) -> bool {
    record.detail == S::Stopping && record.suspension == Suspension::Wanted
}

/// Suspends it. A former daemon may have come as far as that the memory counts, or the VMM may be gone. Records that cannot be
/// written end nothing: all of it is looked at again.
pub(super) async fn suspend(
    shared: &Shared,
    record: &VmRecord,
    live: &mut Option<Live>,
) -> Result<Next, Halt> {
    let vm = &record.id;
    let failed = match live {
        None => None,
        Some(running) => {
            let _held = shared.held.hold();
            let suspended = match room(shared, record) {
                Ok(_room) => running.machine.suspend().await.map_err(|error| error.to_string()),
                Err(reason) => Err(reason),
            };
            match suspended {
                Err(reason) => Some(reason),
                Ok(done) => {
                    tracing::info!(%vm, memory_bytes = done.memory_bytes, stored_bytes = done.stored_bytes,
                        took_us = done.took_us, "vm.suspended");
                    None
                }
            }
        }
    };
    let noted = match failed {
        Some(reason) => {
            // It runs on; if it does not, its watcher sees that next.
            tracing::warn!(%vm, %reason, "vm.not_suspended");
            shared.store.vm_not_suspended(vm, reason).await
        }
        None => {
            release(shared, record, live.take()).await?;
            if !tapgate_vmm::keeps_memory(&files::dir(shared, vm)) {
                return Ok(ended(shared, vm).await?);
            }
            shared.store.vm_suspended(vm).await
        }
    };
    match noted {
        Ok(()) => shared.notifier.changed(vm.clone()),
        Err(error) => {
            tracing::error!(%vm, %error, "vm.record_unwritable");
            tokio::time::sleep(RETRY).await;
        }
    }
    Ok(Next::Again)
}

/// Room for the memory until it is written. Others may be suspended at the same time, and it was asked for a while ago.
fn room(shared: &Shared, record: &VmRecord) -> Result<Promise, String> {
    let places = vec![files::dir(shared, &record.id).join(tapgate_vmm::MEMORY)];
    let octets = memory_file(record.resources.memory_mib);
    let need = Need { user: record.user.clone(), octets, places, passes: false };
    shared.room.promise_now(need).map_err(|lack| lack.to_string())
}

/// There was no VMM to write the memory and there is none written.
async fn ended(shared: &Shared, vm: &VmId) -> Result<Next, String> {
    let reason = "the VM ended before its memory was written; it starts from its disk";
    tracing::warn!(%vm, reason, "vm.not_suspended");
    let noted = shared.store.vm_memory_gone(vm, Some(reason.into())).await;
    noted.map_err(|error| format!("cannot record the suspension: {error}"))?;
    Ok(Next::Enter(S::Stopped))
}

/// Whether the records allow a memory to be used: its own, or that of the VM that it is a clone of.
fn has(record: &VmRecord) -> bool {
    matches!(record.suspension, Suspension::Kept | Suspension::Cloned)
}

/// Whether a start goes on from a memory.
pub(super) fn keeps(shared: &Shared, record: &VmRecord) -> bool {
    has(record) && tapgate_vmm::keeps_memory(&files::dir(shared, &record.id))
}

/// After a start that failed: whether it had a memory to go on with and has none any more.
pub(super) async fn lost(shared: &Shared, record: &VmRecord) -> bool {
    let lost = has(record) && !keeps(shared, record);
    if lost && let Err(error) = shared.store.vm_memory_gone(&record.id, None).await {
        tracing::error!(vm = %record.id, %error, "vm.record_unwritable");
    }
    lost
}

/// After a start: whatever memory there was is used; or it was taken by a start that a daemon's death cut off.
pub(super) async fn used(shared: &Shared, record: &VmRecord, resumed: bool) -> Result<(), String> {
    if record.suspension == Suspension::None {
        return Ok(());
    }
    let lost = (!resumed)
        .then(|| "a start that was cut off used its memory; it was booted from its disk".to_owned());
    if let Some(reason) = &lost {
        tracing::warn!(vm = %record.id, reason, "vm.memory_lost");
    }
    let noted = shared.store.vm_memory_gone(&record.id, lost).await;
    noted.map_err(|error| format!("cannot record that its memory is used: {error}"))
}
