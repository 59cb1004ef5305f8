//! What a VM has on the host's disk, and what it is made from: its folder, its disk, its seed, its CA.

use super::Shared;
use std::{path::PathBuf, sync::Arc};
use tapgate_model::{UserId, VmId};
use tapgate_proxy::VmCa;
use tapgate_store::VmRecord;
use tapgate_vmm::{Seed, VmSpec};

/// The VM's folder.
pub(super) fn dir(shared: &Shared, vm: &VmId) -> PathBuf {
    shared.config.data_dir.join("vms").join(vm.as_str())
}

/// What the driver needs to know of the VM, environment and placeholders as of now.
pub(super) async fn spec(shared: &Shared, record: &VmRecord) -> Result<VmSpec, String> {
    let failed = |error: tapgate_store::StoreError| format!("cannot read the VM's records: {error}");
    let ca = shared.store.vm_ca(&record.id).await.map_err(failed)?;
    Ok(VmSpec {
        id: record.id.clone(),
        dir: dir(shared, &record.id),
        vcpus: record.resources.vcpus,
        memory_mib: record.resources.memory_mib,
        disk_bytes: record.resources.disk_bytes,
        net: shared.net(record),
        seed: Seed {
            instance_id: record.id.to_string(),
            hostname: record.hostname(),
            ssh_keys: vec![record.public_key.clone()],
            net: shared.net(record),
            ca_pem: ca.cert,
            env: environment(shared, &record.user).await?,
        },
    })
}

/// Variables and secrets' placeholders; a secret's variable stands before a plain one of the same name.
async fn environment(shared: &Shared, user: &UserId) -> Result<Vec<(String, String)>, String> {
    shared.store.guest_env(user).await.map_err(|error| format!("cannot read the environment: {error}"))
}

/// The VM's CA, for the proxy.
pub(super) async fn ca(shared: &Shared, record: &VmRecord) -> Result<Arc<VmCa>, String> {
    let pem = shared.store.vm_ca(&record.id).await.map_err(|error| error.to_string())?;
    VmCa::from_pem(&pem.cert, &pem.key).map(Arc::new).map_err(|error| format!("the VM's CA is unusable: {error}"))
}

/// Makes folder and disk. Doing it again after a crash is no error.
pub(super) async fn create(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    let spec = spec(shared, record).await?;
    shared.driver.prepare(&spec).await.map_err(|error| error.to_string())
}

/// Removes the folder with all that is in it.
pub(super) async fn remove(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    let dir = dir(shared, &record.id);
    match tokio::fs::remove_dir_all(&dir).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(format!("cannot remove {}: {error}", dir.display()))
        }
        _ => Ok(()),
    }
}

