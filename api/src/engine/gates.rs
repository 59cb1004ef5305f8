//! The VMs that have a gate now, found by VM and by slot, each with the policy that is in force for it.
//!
//! Owns what the engine knows about gates and nothing of the gates themselves. A VM that is not in here is reported on by
//! nobody and given no policy.

use std::{collections::HashMap, net::IpAddr, sync::Arc};
use tapgate_model::{GuestNet, UserId, VmId, VmPolicy};

/// A VM that has a gate now.
#[derive(Clone, Debug)]
pub(super) struct Gated {
    pub user: UserId,
    pub net: GuestNet,
    /// When it got its gate, by the programs' clock: what was told of its slot before is another's.
    pub since: u64,
    /// The policy in force, as the records had it; none before the first, and none while the VM is closed for want of one.
    pub policy: Option<Arc<VmPolicy>>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Gates {
    by_vm: HashMap<VmId, Gated>,
    by_slot: HashMap<u32, VmId>,
}

impl Gates {
    /// The VM has a gate from now on.
    pub(super) fn insert(&mut self, vm: VmId, gated: Gated) {
        self.by_slot.insert(gated.net.slot, vm.clone());
        self.by_vm.insert(vm, gated);
    }

    /// It has none any more.
    pub(super) fn remove(&mut self, vm: &VmId) {
        if let Some(gone) = self.by_vm.remove(vm) {
            self.by_slot.retain(|slot, owner| *slot != gone.net.slot || owner != vm);
        }
    }

    /// One of them.
    pub(super) fn get(&self, vm: &VmId) -> Option<&Gated> {
        self.by_vm.get(vm)
    }

    /// Notes which policy of the records is in force.
    pub(super) fn note(&mut self, vm: &VmId, policy: Option<Arc<VmPolicy>>) {
        if let Some(gated) = self.by_vm.get_mut(vm) {
            gated.policy = policy;
        }
    }

    /// The VM whose gate had this slot then.
    pub(super) fn of_slot(&self, slot: u32, then: u64) -> Option<&VmId> {
        let vm = self.by_slot.get(&slot)?;
        self.by_vm.get(vm).is_some_and(|gated| then >= gated.since).then_some(vm)
    }

    /// The VM that has this address.
    pub(super) fn of_address(&self, address: IpAddr) -> Option<&VmId> {
        self.by_vm.iter().find(|(_, gated)| gated.net.has(address)).map(|(vm, _)| vm)
    }

    /// Every one of an account, or of all.
    pub(super) fn of<'a>(
        &'a self,
        user: Option<&'a UserId>,
    ) -> impl Iterator<Item = (&'a VmId, &'a Gated)> + 'a {
        self.by_vm.iter().filter(move |(_, gated)| user.is_none_or(|user| gated.user == *user))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_its_present_owners_from_when_that_had_it() {
        let gated = |slot, since| Gated {
            user: UserId::generate(),
            net: GuestNet::new(slot, [10, 214, 0, 0].into(), None),
            since,
            policy: None,
        };
        let mut gates = Gates::default();
        let (old, new) = (VmId::generate(), VmId::generate());
        gates.insert(old.clone(), gated(3, 10));
        assert_eq!(gates.of_slot(3, 10), Some(&old));
        // The next one has the slot before the last word about the former.
        gates.insert(new.clone(), gated(3, 20));
        gates.remove(&old);
        assert_eq!(gates.of_slot(3, 20), Some(&new));
        assert_eq!(gates.of_slot(3, 19), None, "what the former one did is not told of the present one");
        assert_eq!(gates.of_address([10, 214, 0, 4].into()), Some(&new));
        gates.remove(&new);
        assert!(gates.of_slot(3, 30).is_none() && gates.of(None).next().is_none());
    }
}
