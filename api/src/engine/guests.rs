//! What the guest service may ask of the engine: who has an address, and that VM's user-data.

use super::{Shared, files};
use std::{net::IpAddr, sync::Arc};
use tapgate_model::VmId;
use tokio::sync::watch;

/// A view of the engine that shows a guest itself and nothing else.
pub(crate) struct Guests(Arc<Shared>);

impl Guests {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self(shared)
    }

    /// The VM with this address.
    pub(crate) fn by_address(&self, address: IpAddr) -> Option<VmId> {
        let address = address.to_canonical();
        self.0.gates().of_address(address).cloned()
    }

    /// The VM's user-data as of now: keys, certificate, variables and placeholders.
    pub(crate) async fn user_data(&self, vm: &VmId) -> Result<String, String> {
        let record = self.0.store.vm_any(vm).await.map_err(|error| error.to_string())?;
        files::spec(&self.0, &record).await?.seed.user_data().map_err(|error| error.to_string())
    }

    /// Comes back when the daemon stops.
    pub(crate) async fn stopped(&self) {
        self.0.stop.cancelled().await;
    }

    /// Changes whenever some environment did.
    pub(crate) fn news(&self) -> watch::Receiver<u64> {
        self.0.news.subscribe()
    }
}
