//! What the guest service may ask of the engine: who has an address, that VM's user-data, and its agent's task and reports.

use super::{Shared, agents, agents::AgentError, files};
use std::{net::IpAddr, sync::Arc};
use tapgate_model::{HostName, VmId};
use tapgate_store::AgentStatus;
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
        let seed = files::spec(&self.0, &record).await?.seed;
        // Quoting and escaping of all variables: nothing for a thread that serves others.
        let built = tokio::task::spawn_blocking(move || seed.user_data()).await;
        built.map_err(|error| error.to_string())?.map_err(|error| error.to_string())
    }

    /// The task of the agent in the VM, in JSON.
    pub(crate) async fn task(&self, vm: &VmId) -> Result<String, AgentError> {
        let task = agents::task(&self.0, vm).await?;
        // Escaping of all variables.
        let built = tokio::task::spawn_blocking(move || serde_json::to_string(&task)).await;
        let internal = |error: &dyn std::fmt::Display| AgentError::Internal(error.to_string());
        built.map_err(|error| internal(&error))?.map_err(|error| internal(&error))
    }

    /// What the guest says of its agent.
    pub(crate) async fn report(
        &self,
        vm: &VmId,
        status: AgentStatus,
        failure: Option<String>,
    ) -> Result<(), AgentError> {
        agents::report(&self.0, vm, status, failure).await
    }

    /// The end of what its agent shows.
    pub(crate) async fn keep_log(&self, vm: &VmId, text: String) -> Result<(), AgentError> {
        agents::keep_log(&self.0, vm, text).await
    }

    /// The placeholder of git's password at a host.
    pub(crate) async fn credential(&self, vm: &VmId, host: &HostName) -> Result<Option<String>, AgentError> {
        agents::credential(&self.0, vm, host).await
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
