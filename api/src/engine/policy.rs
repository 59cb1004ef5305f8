//! Carries policy from the records to where it is enforced: the kernel's maps and the proxy's table.
//!
//! Each VM's policy is replaced whole, in the kernel and in the proxy. If a policy cannot be read or installed, the VM's
//! old one must never stay in use: the VM is closed until a later change can be installed.

use super::{Gated, Scope, Shared};
use std::sync::Arc;
use tapgate_model::{Mode, RuleSet, VmId, VmPolicy, policy::SecretsOverHttp};

/// Installs what the records now say, for every VM in the scope that has a gate.
pub(super) async fn refresh(shared: &Shared, scope: &Scope) {
    let in_scope: Vec<(VmId, Gated)> = shared
        .gates()
        .iter()
        .filter(|(vm, gated)| match scope {
            Scope::Vm(wanted) => *vm == wanted,
            Scope::User(user) => gated.user == *user,
        })
        .map(|(vm, gated)| (vm.clone(), gated.clone()))
        .collect();
    for (vm, gated) in in_scope {
        install(shared, &vm, &gated).await;
    }
}

/// Installs one VM's policy in both places.
pub(super) async fn install(shared: &Shared, vm: &VmId, gated: &Gated) {
    let installed = match shared.policy_of(vm).await {
        Ok(policy) => {
            shared.datapath.set_policy(gated.net, &policy).map(|()| policy).map_err(|e| e.to_string())
        }
        Err(error) => Err(error.to_string()),
    };
    match installed {
        Ok(policy) => {
            let generation = policy.generation;
            publish(shared, vm, policy);
            tracing::debug!(%vm, generation, "policy.installed");
        }
        Err(error) => {
            tracing::error!(%vm, %error, "policy.not_installed");
            close(shared, vm, gated);
        }
    }
}

/// Closes the VM: a policy without a rule, until the next change brings one that can be installed.
fn close(shared: &Shared, vm: &VmId, gated: &Gated) {
    let generation = shared.table.policy(vm).map_or(0, |policy| policy.generation);
    let closed = VmPolicy {
        vm: vm.clone(),
        user: gated.user.clone(),
        generation,
        mode: Mode::Enforce,
        rules: RuleSet::default(),
        secrets: Arc::new([]),
        secrets_over_http: SecretsOverHttp::Never,
    };
    if let Err(error) = shared.datapath.set_policy(gated.net, &closed) {
        tracing::error!(%vm, %error, "policy.vm_not_closed_in_kernel");
    }
    publish(shared, vm, closed);
}

fn publish(shared: &Shared, vm: &VmId, policy: VmPolicy) {
    if !shared.table.update(Arc::new(policy)) {
        tracing::warn!(%vm, "policy.vm_unknown_to_proxy");
    }
}
