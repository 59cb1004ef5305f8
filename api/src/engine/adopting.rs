//! The VMs that ran under a former daemon and that nobody has taken up yet. What they tried meanwhile is told of them once they are, or
//! once it is known that they are not going to be: before that it would be nobody's. Must never keep a VM waited for that is not
//! going to be either.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tapgate_model::{VmId, VmPolicy};
use tokio::sync::watch;

/// They.
#[derive(Debug, Default)]
pub(super) struct Adopting {
    left: watch::Sender<HashSet<VmId>>,
    /// Those that are not taken up, by their slots, until these are given back.
    given_up: Mutex<HashMap<u32, Arc<VmPolicy>>>,
}

impl Adopting {
    /// These are to be taken up.
    pub(super) fn begin(&self, vms: impl Iterator<Item = VmId>) {
        self.left.send_modify(|left| left.extend(vms));
    }

    /// Whether this one is still to be.
    pub(super) fn awaits(&self, vm: &VmId) -> bool {
        self.left.borrow().contains(vm)
    }

    /// This one was, or there is nothing to be told of it.
    pub(super) fn done(&self, vm: &VmId) {
        self.left.send_if_modified(|left| left.remove(vm));
    }

    /// The one of this policy is not going to be: what its slot tried is told of it until [`Self::forget`].
    pub(super) fn give_up(&self, slot: u32, policy: Arc<VmPolicy>) {
        let vm = policy.vm.clone();
        self.given_up().insert(slot, policy);
        self.done(&vm);
    }

    /// Whom what this slot tried is to be told of, where nobody has it now.
    pub(super) fn of_slot(&self, slot: u32) -> Option<Arc<VmPolicy>> {
        self.given_up().get(&slot).cloned()
    }

    /// The slot is given back.
    pub(super) fn forget(&self, slot: u32) {
        self.given_up().remove(&slot);
    }

    /// Comes back when there is none left.
    pub(super) async fn over(&self) {
        // Its sender is here.
        let _ = self.left.subscribe().wait_for(HashSet::is_empty).await;
    }

    fn given_up(&self) -> MutexGuard<'_, HashMap<u32, Arc<VmPolicy>>> {
        self.given_up.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
