//! Whose snapshots are being taken, one VM's one after the other, and what was called for meanwhile: a call that comes while the last
//! look at the records is made is a look more. Must never lose a call.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Mutex, MutexGuard, PoisonError},
};
use tapgate_model::VmId;

/// The VMs of which one is being taken, each with the machine that it was called for with since.
#[derive(Debug)]
pub(super) struct Taking<M>(Mutex<HashMap<VmId, Option<M>>>);

impl<M> Default for Taking<M> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<M> Taking<M> {
    /// The machine back, where the caller is to begin; whoever takes already comes to it by [`Self::next`].
    pub(super) fn begin(&self, vm: &VmId, machine: M) -> Option<M> {
        match self.all().entry(vm.clone()) {
            Entry::Occupied(mut busy) => {
                busy.insert(Some(machine));
                None
            }
            Entry::Vacant(free) => {
                free.insert(None);
                Some(machine)
            }
        }
    }

    /// The machine of the last call since it was asked for; it may be another than the one before.
    pub(super) fn newer(&self, vm: &VmId) -> Option<M> {
        self.all().get_mut(vm).and_then(Option::take)
    }

    /// The same for one who is done: without a call he has ended.
    pub(super) fn next(&self, vm: &VmId) -> Option<M> {
        let mut all = self.all();
        let next = all.get_mut(vm).and_then(Option::take);
        if next.is_none() {
            all.remove(vm);
        }
        next
    }

    /// He takes no more, whatever is called for.
    pub(super) fn end(&self, vm: &VmId) {
        self.all().remove(vm);
    }

    pub(super) fn busy(&self, vm: &VmId) -> bool {
        self.all().contains_key(vm)
    }

    fn all(&self) -> MutexGuard<'_, HashMap<VmId, Option<M>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_while_one_is_taken_is_a_look_more() {
        let (taking, vm, other) = (Taking::default(), VmId::generate(), VmId::generate());
        assert_eq!(taking.begin(&vm, 1), Some(1));
        assert_eq!((taking.begin(&vm, 2), taking.begin(&vm, 3)), (None, None), "one at a time");
        assert_eq!(taking.begin(&other, 9), Some(9), "each VM for itself");
        assert_eq!(taking.newer(&vm), Some(3), "the machine that runs now");
        assert_eq!(taking.begin(&vm, 4), None);
        assert_eq!(taking.next(&vm), Some(4), "what was called for after the last look");
        assert!(taking.busy(&vm));
        assert_eq!(taking.next(&vm), None);
        assert!(!taking.busy(&vm), "nothing is left to take");
        assert_eq!(taking.begin(&vm, 5), Some(5), "the next call begins anew");
        taking.end(&vm);
        assert!(!taking.busy(&vm) && taking.busy(&other));
    }
}
