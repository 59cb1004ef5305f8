//! What the datapath counted for each VM, readable by the API without knowing the datapath.
//!
//! Numbers of the kernel as they are at that moment: since the VM's gate was made, daemons' restarts included. Must never
//! hand out a slot: who has one changes, and only the engine knows who.

use super::{Shared, gates::Gated};
use std::sync::{Arc, OnceLock, Weak};
use tapgate_datapath::{Counters, DatapathError};
use tapgate_model::{UserId, VmId};

/// One VM's numbers.
#[derive(Clone, Debug)]
pub struct VmCounters {
    /// The VM.
    pub vm: VmId,
    /// Its owner.
    pub user: UserId,
    /// Frames and octets both ways, and why they were let through or dropped.
    pub counters: Counters,
    /// Flows that the kernel forwards for it just now.
    pub flows: u64,
}

/// The engine's numbers, as soon as there is an engine; empty without one. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Meters(Arc<OnceLock<Weak<Shared>>>);

impl std::fmt::Debug for Meters {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Meters").field(&self.0.get().is_some()).finish()
    }
}

impl Meters {
    /// Reads from this engine from now on.
    pub(super) fn connect(&self, shared: &Arc<Shared>) {
        let _ = self.0.set(Arc::downgrade(shared));
    }

    fn shared(&self) -> Option<Arc<Shared>> {
        self.0.get()?.upgrade()
    }

    /// One VM's; `None` while it has no gate.
    pub(super) fn one(&self, vm: &VmId) -> Result<Option<VmCounters>, DatapathError> {
        let Some(shared) = self.shared() else { return Ok(None) };
        let gated = shared.gates().get(vm).cloned();
        gated.map_or(Ok(None), |gated| read(&shared, vm, &gated))
    }

    /// Every VM's that has a gate, in no order.
    pub(super) fn all(&self) -> Result<Vec<VmCounters>, DatapathError> {
        let Some(shared) = self.shared() else { return Ok(Vec::new()) };
        let gates: Vec<_> = shared.gates().of(None).map(|(vm, gated)| (vm.clone(), gated.clone())).collect();
        gates.iter().filter_map(|(vm, gated)| read(&shared, vm, gated).transpose()).collect()
    }

    /// What came from taps that no VM has.
    pub(super) fn stray(&self) -> Result<Option<Counters>, DatapathError> {
        self.shared().map(|shared| shared.datapath.stray_counters()).transpose()
    }
}

/// A VM that lost its gate meanwhile has no numbers.
fn read(shared: &Shared, vm: &VmId, gated: &Gated) -> Result<Option<VmCounters>, DatapathError> {
    let slot = gated.net.slot;
    match (shared.datapath.counters(slot), shared.datapath.flows(slot)) {
        (Ok(counters), Ok(flows)) => {
            Ok(Some(VmCounters { vm: vm.clone(), user: gated.user.clone(), counters, flows }))
        }
        (Err(DatapathError::NotAttached(_)), _) | (_, Err(DatapathError::NotAttached(_))) => Ok(None),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}
