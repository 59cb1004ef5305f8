//! The VMs that ran under a former daemon and that nobody has taken up yet. What they tried meanwhile is told of them once they are:
//! before that it would be nobody's. Must never keep a VM in here that is not going to be taken up.

use std::collections::HashSet;
use tapgate_model::VmId;
use tokio::sync::watch;

/// They.
#[derive(Debug, Default)]
pub(super) struct Adopting(watch::Sender<HashSet<VmId>>);

impl Adopting {
    /// These are to be taken up.
    pub(super) fn begin(&self, vms: impl Iterator<Item = VmId>) {
        self.0.send_modify(|left| left.extend(vms));
    }

    /// This one was, or is not going to be.
    pub(super) fn done(&self, vm: &VmId) {
        self.0.send_if_modified(|left| left.remove(vm));
    }

    /// Comes back when there is none left.
    pub(super) async fn over(&self) {
        // Its sender is here.
        let _ = self.0.subscribe().wait_for(HashSet::is_empty).await;
    }
}
