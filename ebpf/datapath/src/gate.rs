//! The proof that a VM's gate is attached. Placeholder of the driver's branch until the datapath's own replaces it.

use std::os::fd::OwnedFd;
use tapgate_model::{GuestNet, VmId};

/// Proof that the programs are attached to a VM's link.
#[derive(Debug)]
pub struct Gate {
    vm: VmId,
    net: GuestNet,
    tap: Option<OwnedFd>,
}

impl Gate {
    /// The VM.
    pub fn vm(&self) -> &VmId {
        &self.vm
    }

    /// Its place in the network.
    pub fn net(&self) -> GuestNet {
        self.net
    }

    /// The tap's descriptor, once; `None` for a namespace or an adopted VM.
    pub fn take_tap(&mut self) -> Option<OwnedFd> {
        self.tap.take()
    }

    /// A gate without programs, for the drivers' own tests.
    #[cfg(feature = "driver-tests")]
    #[doc(hidden)]
    pub fn for_driver_tests(vm: VmId, net: GuestNet, tap: Option<OwnedFd>) -> Self {
        Self { vm, net, tap }
    }
}
