//! What a VM has on the host's disk, and what it is made from: its folder, its disk, its seed, its CA.

use super::{Shared, snapshots};
use crate::config::DriverKind;
use std::{collections::BTreeMap, path::PathBuf, sync::Arc};
use tapgate_model::{UserId, VmId};
use tapgate_netns::Netns;
use tapgate_proxy::VmCa;
use tapgate_store::{Suspension, VmRecord};
use tapgate_vmm::{Place, Resume, Seed, VmSpec};

/// The VM's folder.
pub(super) fn dir(shared: &Shared, vm: &VmId) -> PathBuf {
    shared.config.data_dir.join("vms").join(vm.as_str())
}

/// What is needed to end the VM: by the record alone, so that nothing that cannot be read keeps it alive.
pub(super) fn place(shared: &Shared, record: &VmRecord) -> Result<Place, String> {
    let name = namespace_name(shared, record);
    let guest_ns = match shared.config.driver == DriverKind::Netns && Netns::exists(&name) {
        true => Some(Netns::open(&name).map_err(|error| error.to_string())?),
        false => None,
    };
    Ok(Place { id: record.id.clone(), dir: dir(shared, &record.id), slot: record.slot, guest_ns })
}

/// What the driver needs to know of the VM to start it, environment and placeholders as of now.
pub(super) async fn spec(shared: &Shared, record: &VmRecord) -> Result<VmSpec, String> {
    let env = environment(shared, &record.user).await?;
    spec_with(shared, record, env).await
}

/// The same of one that runs, which has had its environment and asks for it anew itself.
pub(super) async fn spec_of_running(shared: &Shared, record: &VmRecord) -> Result<VmSpec, String> {
    let env = environment(shared, &record.user).await.unwrap_or_else(|error| {
        tracing::error!(vm = %record.id, %error, "vm.environment_not_read");
        Vec::new()
    });
    spec_with(shared, record, env).await
}

async fn spec_with(shared: &Shared, record: &VmRecord, env: Vec<(String, String)>) -> Result<VmSpec, String> {
    let failed = |error: tapgate_store::StoreError| format!("cannot read the VM's records: {error}");
    let ca_pem = shared.store.vm_ca_cert(&record.id).await.map_err(failed)?;
    Ok(VmSpec {
        id: record.id.clone(),
        dir: dir(shared, &record.id),
        image: shared.image.clone(),
        resume: match record.suspension {
            Suspension::Kept => Resume::Own,
            Suspension::Cloned => Resume::Another,
            Suspension::None | Suspension::Wanted => Resume::Never,
        },
        // Whether it is there or not: a VM that is to come from a snapshot comes from nothing else.
        snapshot: record.snapshot.as_ref().map(|_| snapshots::fetched(shared, record)),
        guest_ns: guest_namespace(shared, record)?,
        vcpus: record.resources.vcpus,
        memory_mib: record.resources.memory_mib,
        disk_bytes: record.resources.disk_bytes,
        net: shared.net(record),
        seed: Seed {
            instance_id: record.id.to_string(),
            hostname: record.hostname(),
            ssh_keys: record.public_key.lines().map(str::to_owned).collect(),
            net: shared.net(record),
            ca_pem,
            env,
        },
    })
}

/// Variables and secrets' placeholders; a secret's variable stands before a plain one of the same name.
async fn environment(shared: &Shared, user: &UserId) -> Result<Vec<(String, String)>, String> {
    let failed = |error: tapgate_store::StoreError| format!("cannot read the environment: {error}");
    let mut env: BTreeMap<String, String> = shared
        .store
        .env_all(user)
        .await
        .map_err(failed)?
        .into_iter()
        .map(|var| (var.key, var.value))
        .collect();
    env.extend(shared.store.placeholders(user).await.map_err(failed)?);
    Ok(env.into_iter().collect())
}

/// The namespace that stands for the guest, under the driver that has one instead of a VM.
fn guest_namespace(shared: &Shared, record: &VmRecord) -> Result<Option<Netns>, String> {
    if shared.config.driver != DriverKind::Netns {
        return Ok(None);
    }
    let name = namespace_name(shared, record);
    let netns = if Netns::exists(&name) { Netns::open(&name) } else { Netns::create(&name) };
    netns.map(Some).map_err(|error| error.to_string())
}

fn namespace_name(shared: &Shared, record: &VmRecord) -> String {
    namespace_of(shared, record.slot)
}

/// The name of the namespace that stands for the guest of a slot.
pub(super) fn namespace_of(shared: &Shared, slot: u32) -> String {
    format!("tapgate-{}-{slot}", shared.config.instance)
}

/// The VM's CA, for the proxy.
pub(super) async fn ca(shared: &Shared, record: &VmRecord) -> Result<Arc<VmCa>, String> {
    let pem = shared.store.vm_ca(&record.id).await.map_err(|error| error.to_string())?;
    VmCa::from_pem(&pem.cert, &pem.key)
        .map(Arc::new)
        .map_err(|error| format!("the VM's CA is unusable: {error}"))
}

/// Whether the VM has the disk that it was made with. A namespace has none and wants none.
pub(super) fn has_disk(shared: &Shared, vm: &VmId) -> bool {
    shared.config.driver == DriverKind::Netns || tapgate_vmm::disk::find(&dir(shared, vm)).is_some()
}

/// Makes the folder; the driver fills it. Doing it again after a crash is no error.
pub(super) async fn create(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    let dir = dir(shared, &record.id);
    tokio::fs::create_dir_all(&dir).await.map_err(|error| format!("cannot make {}: {error}", dir.display()))
}

/// Removes the folder with all that is in it, and the namespace if there is one.
pub(super) async fn remove(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    if shared.config.driver == DriverKind::Netns {
        Netns::delete(&namespace_name(shared, record)).map_err(|error| error.to_string())?;
    }
    tapgate_fault::point("remove.namespace");
    let dir = dir(shared, &record.id);
    match tokio::fs::remove_dir_all(&dir).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", dir.display()))
        }
        _ => Ok(()),
    }
}
