//! The engine's view of what the kernel counted.

use super::Shared;
use crate::traffic::{Traffic, VmTraffic};
use std::sync::Arc;
use tapgate_model::VmId;

/// Reads the maps of the VMs that have a gate.
pub(super) struct Counted(pub(super) Arc<Shared>);

impl Traffic for Counted {
    fn of(&self, vm: &VmId) -> Option<VmTraffic> {
        let slot = self.0.gates().get(vm)?.net.slot;
        self.0.datapath.counters(slot).ok().map(Into::into)
    }

    fn all(&self) -> Vec<(VmId, VmTraffic)> {
        let gates: Vec<(VmId, u32)> =
            self.0.gates().iter().map(|(vm, gated)| (vm.clone(), gated.net.slot)).collect();
        let read = |(vm, slot)| Some((vm, self.0.datapath.counters(slot).ok()?.into()));
        gates.into_iter().filter_map(read).collect()
    }

    fn stray(&self) -> Option<VmTraffic> {
        self.0.datapath.stray_counters().ok().map(Into::into)
    }
}
