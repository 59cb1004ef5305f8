//! VMs that run and of which the records know nothing, or know that they do not run: a backup from before them was put back. Before any
//! address is given out again they are ended and their gates taken away. Their disks stay, for the records may come back. Must never
//! end a VM that the records say may run, nor touch what another daemon made.

use super::{Shared, files, life};
use crate::config::DriverKind;
use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};
use tapgate_model::{GuestNet, StatusDetail as S, VmId};
use tapgate_netns::Netns;
use tapgate_store::VmRecord;
use tapgate_vmm::{Handle, Place, process::ProcessRef};

/// Looks at every folder of a VM; comes back when what runs without a record has ended, or could not be ended and was logged.
pub(super) async fn end(shared: &Shared, living: &[VmRecord]) {
    for (vm, dir) in folders(&shared.config.data_dir.join("vms")) {
        let record = living.iter().find(|record| record.id == vm);
        let ended = match record {
            Some(record) if may_run(record) => continue,
            Some(record) if tapgate_vmm::noted_handle(&dir).is_none() => {
                tracing::debug!(%vm, state = record.detail.word(), "strays.at_rest");
                continue;
            }
            Some(record) => life::discard(shared, record).await.map(|()| Some(record.slot)),
            None => unknown(shared, &vm, &dir).await,
        };
        match ended {
            Ok(None) => tracing::info!(%vm, folder = %dir.display(), "strays.folder_without_record"),
            Ok(Some(slot)) => {
                tracing::warn!(%vm, slot, folder = %dir.display(), state = record.map(|record| record.detail.word()),
                    "strays.ended: it ran, and the records do not know of it; its disk is left in its folder");
                free(shared, slot, living).await;
            }
            Err(error) => tracing::error!(%vm, %error, "strays.not_ended: end its VMM by hand"),
        }
    }
}

/// Those that run by what their drivers noted, though the records do not say so; each with its process.
pub(crate) fn running(vms: &Path, living: &[VmRecord]) -> Vec<(VmId, i32)> {
    let known = |vm: &VmId| living.iter().any(|record| record.id == *vm && may_run(record));
    let strays = folders(vms).into_iter().filter(|(vm, _)| !known(vm));
    strays
        .filter_map(|(vm, dir)| {
            let process = tapgate_vmm::noted_handle(&dir)?.process;
            let same = ProcessRef::of(process.pid).is_ok_and(|now| now == process);
            same.then_some((vm, process.pid))
        })
        .collect()
}

fn may_run(record: &VmRecord) -> bool {
    matches!(record.detail, S::Starting | S::Running | S::Ready | S::Stopping | S::Destroying)
}

fn folders(vms: &Path) -> Vec<(VmId, PathBuf)> {
    let entries = fs::read_dir(vms).into_iter().flatten().flatten();
    entries.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path()))).collect()
}

/// Ends what runs of a VM without a record. Its slot, if anything ran: no record says it, but what runs has it.
async fn unknown(shared: &Shared, vm: &VmId, dir: &Path) -> Result<Option<u32>, String> {
    let handle = tapgate_vmm::noted_handle(dir);
    let slot = match shared.config.driver {
        DriverKind::Netns => handle.as_ref().and_then(|handle| slot_of_namespace(shared, handle)),
        _ => slot_of_processes(vm),
    };
    if handle.is_none() && slot.is_none() {
        return Ok(None);
    }
    let name = slot.map(|slot| files::namespace_of(shared, slot));
    let guest_ns = name.filter(|name| shared.config.driver == DriverKind::Netns && Netns::exists(name));
    let guest_ns = guest_ns.map(|name| Netns::open(&name)).transpose().map_err(|error| error.to_string())?;
    let place = Place { id: vm.clone(), dir: dir.to_owned(), slot: slot.unwrap_or(0), guest_ns };
    if let Some(handle) = &handle {
        shared.driver.discard(&place, handle).await.map_err(|error| error.to_string())?;
    }
    shared.driver.sweep(&place).await.map_err(|error| error.to_string())?;
    Ok(slot)
}

/// Takes the gate and the namespace of an ended VM away, unless a VM that may run has the slot: what is its own is told apart where it
/// is adopted.
async fn free(shared: &Shared, slot: u32, living: &[VmRecord]) {
    if living.iter().any(|record| record.slot == slot && may_run(record)) {
        return;
    }
    let net = GuestNet::new(slot, shared.config.v4_base(), shared.config.v6_base());
    if let Err(error) = shared.datapath.detach(net).await {
        tracing::error!(slot, %error, "strays.gate_left");
    }
    if shared.config.driver == DriverKind::Netns
        && let Err(error) = Netns::delete(&files::namespace_of(shared, slot))
    {
        tracing::error!(slot, %error, "strays.namespace_left");
    }
}

/// By the user of the processes that have the VM's id among their words: each slot's VMM has its own.
fn slot_of_processes(vm: &VmId) -> Option<u32> {
    // Cloud Hypervisor and Firecracker are told the id as a name of theirs, which has no underscore.
    let words = [vm.to_string(), vm.to_string().replace('_', "-")];
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries
        .filter(|entry| entry.file_name().to_str().is_some_and(|name| name.parse::<u32>().is_ok()))
        .filter_map(|entry| {
            let slot = entry.metadata().ok()?.uid().checked_sub(tapgate_vmm::uid_of(0))?;
            let said = fs::read(entry.path().join("cmdline")).ok()?;
            let said = String::from_utf8_lossy(&said);
            words.iter().any(|word| said.contains(word)).then_some(slot)
        })
        .find(|slot| *slot < tapgate_ebpf_common::maps::MAX_VMS)
}

/// By the namespace of its process, if that is one of this daemon's guests'.
fn slot_of_namespace(shared: &Shared, handle: &Handle) -> Option<u32> {
    let of = |path: PathBuf| fs::metadata(path).ok().map(|meta| (meta.dev(), meta.ino()));
    let own = of(format!("/proc/{}/ns/net", handle.process.pid).into())?;
    let prefix = files::namespace_of(shared, 0);
    let prefix = prefix.trim_end_matches('0');
    fs::read_dir("/run/netns").ok()?.flatten().find_map(|entry| {
        let slot = entry.file_name().to_str()?.strip_prefix(prefix)?.parse().ok()?;
        (of(entry.path()) == Some(own)).then_some(slot)
    })
}
