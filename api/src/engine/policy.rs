//! Carries policy from the records to where it is enforced: the kernel's maps and the proxy's table.
//!
//! Closing comes before opening nowhere: each VM's policy is replaced whole, in the kernel and in the proxy. If a policy
//! cannot be read or installed, the VM's old one is not kept in use: the VM is closed until it can.

use super::{Scope, Shared};
use std::sync::Arc;
use tapgate_model::{GuestNet, VmId, VmPolicy};

/// Installs what the records now say, for every VM in the scope that has a gate.
pub(super) async fn refresh(shared: &Shared, scope: &Scope) {
    let in_scope: Vec<(VmId, GuestNet)> = shared
        .gates()
        .iter()
        .filter(|(vm, gated)| match scope {
            Scope::Vm(wanted) => *vm == wanted,
            Scope::User(user) => gated.user == *user,
        })
        .map(|(vm, gated)| (vm.clone(), gated.net))
        .collect();
    for (vm, net) in in_scope {
        install(shared, &vm, net).await;
    }
}

/// Installs one VM's policy in both places.
pub(super) async fn install(shared: &Shared, vm: &VmId, net: GuestNet) {
    let policy = match shared.policy_of(vm).await {
        Ok(policy) => policy,
        Err(error) => {
            tracing::error!(%vm, %error, "policy.unreadable");
            shared.table.remove(vm);
            return;
        }
    };
    if let Err(error) = shared.datapath.set_policy(net, &policy) {
        tracing::error!(%vm, %error, "policy.install_failed");
        shared.table.remove(vm);
        return;
    }
    let generation = policy.generation;
    publish(shared, vm, policy);
    tracing::debug!(%vm, generation, "policy.installed");
}

fn publish(shared: &Shared, vm: &VmId, policy: VmPolicy) {
    if !shared.table.update(Arc::new(policy)) {
        tracing::warn!(%vm, "policy.vm_unknown_to_proxy");
    }
}
