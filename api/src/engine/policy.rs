//! Carries policy from the records to where it is enforced: the kernel's maps and the proxy's table.
//!
//! Each VM's policy is replaced whole, in the kernel and in the proxy. If a policy cannot be read or installed, the VM's
//! old one must never stay in use: the VM is closed until one can be installed. A change of an account is one
//! look at the records and one hold of the kernel's maps, however many VMs it has.

use super::{Scope, Shared, gates::Gated};
use std::{collections::HashMap, sync::Arc};
use tapgate_model::{Mode, RuleSet, UserId, VmId, VmPolicy, policy::SecretsOverHttp};
use tapgate_store::{Kind, StoreError};

/// VMs of one account, with their gates.
type OfUser = HashMap<VmId, Gated>;

/// Installs what the records now say, for every VM in the scope that has a gate.
pub(super) async fn refresh(shared: &Shared, scope: &Scope) {
    let (user, vm) = match scope {
        Scope::User(user) => (user.clone(), None),
        Scope::Vm(vm) => match shared.gates().get(vm) {
            Some(gated) => (gated.user.clone(), Some(vm)),
            None => return,
        },
    };
    install(shared, &user, vm).await;
}

/// What the records say about the account's VM, sharing with its other VMs what is the same.
pub(super) async fn read(shared: &Shared, user: &UserId, vm: &VmId) -> Result<VmPolicy, StoreError> {
    let known = known(&gates_of(shared, user));
    let over_http = shared.config.secrets_over_http;
    let found = shared.store.effective_policies(user, Some(vm), over_http, known).await?;
    found.into_iter().next().ok_or(StoreError::NotFound(Kind::Vm))
}

/// Installs the policies of an account's VMs, or of one, in both places.
pub(super) async fn install(shared: &Shared, user: &UserId, vm: Option<&VmId>) {
    let _one_at_a_time = shared.installing.lock().await;
    let mut gates = gates_of(shared, user);
    let (known, over_http) = (known(&gates), shared.config.secrets_over_http);
    let read = shared.store.effective_policies(user, vm, over_http, known).await;
    gates.retain(|gated, _| vm.is_none_or(|vm| gated == vm));
    let policies = read.unwrap_or_else(|error| {
        tracing::error!(%user, %error, "policy.not_read");
        Vec::new()
    });
    let wanted: Vec<(Gated, Arc<VmPolicy>)> = policies
        .into_iter()
        .filter_map(|policy| Some((gates.remove(&policy.vm)?, Arc::new(policy))))
        .collect();
    let of_kernel: Vec<_> = wanted.iter().map(|(gated, policy)| (gated.net, &**policy)).collect();
    let done = shared.datapath.set_policies(&of_kernel);
    for ((gated, policy), done) in wanted.into_iter().zip(done) {
        let (vm, generation) = (policy.vm.clone(), policy.generation);
        match done {
            Ok(()) => {
                publish(shared, &policy);
                shared.gates().note(&vm, Some(policy));
                tracing::debug!(%vm, generation, "policy.installed");
            }
            Err(error) => {
                tracing::error!(%vm, %error, "policy.not_installed");
                close(shared, &vm, &gated);
            }
        }
    }
    // What the records have no policy for.
    for (vm, gated) in gates {
        tracing::error!(%vm, "policy.not_installed");
        close(shared, &vm, &gated);
    }
}

fn gates_of(shared: &Shared, user: &UserId) -> OfUser {
    shared.gates().of(Some(user)).map(|(vm, gated)| (vm.clone(), gated.clone())).collect()
}

/// The policies in force that came from the records.
fn known(gates: &OfUser) -> HashMap<VmId, Arc<VmPolicy>> {
    gates.iter().filter_map(|(vm, gated)| Some((vm.clone(), gated.policy.clone()?))).collect()
}

/// What the records say, or nothing at all while they cannot be read: for a VM that runs whatever they say.
pub(super) async fn read_or_closed(shared: &Shared, user: &UserId, vm: &VmId) -> VmPolicy {
    read(shared, user, vm).await.unwrap_or_else(|error| {
        tracing::error!(%vm, %error, "policy.not_read");
        shut(user, vm, 0)
    })
}

/// A policy without a rule.
fn shut(user: &UserId, vm: &VmId, generation: u64) -> VmPolicy {
    VmPolicy {
        vm: vm.clone(),
        user: user.clone(),
        generation,
        mode: Mode::Enforce,
        rules: RuleSet::default(),
        secrets: Arc::new([]),
        secrets_over_http: SecretsOverHttp::Never,
    }
}

/// Closes the VM, until a policy of the records can be installed: that is tried again.
fn close(shared: &Shared, vm: &VmId, gated: &Gated) {
    // It is none of the records': nothing may be taken from it later.
    shared.gates().note(vm, None);
    shared.changes.closed();
    let generation = shared.table.policy(vm).map_or(0, |policy| policy.generation);
    let closed = Arc::new(shut(&gated.user, vm, generation));
    if let Err(error) = shared.datapath.set_policy(gated.net, &closed) {
        tracing::error!(%vm, %error, "policy.vm_shut");
        // What could not be put most likely found no memory; this needs none.
        if let Err(error) = shared.datapath.shut(gated.net) {
            tracing::error!(%vm, %error, "policy.vm_not_closed_in_kernel");
        }
    }
    publish(shared, &closed);
}

fn publish(shared: &Shared, policy: &Arc<VmPolicy>) {
    if !shared.table.update(policy.clone()) {
        tracing::warn!(vm = %policy.vm, "policy.vm_unknown_to_proxy");
    }
}
