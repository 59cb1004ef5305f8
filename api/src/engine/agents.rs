//! Agents as the engine knows them: the task that a guest is handed, what it reports, the end of its log on disk.
//!
//! What comes from a guest is bounded here, checked against the records, and never believed about anybody but itself.

use super::{Shared, files};
use crate::agent::{Task, pick_credential};
use std::{
    io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tapgate_model::{HostName, VmId};
use tapgate_store::{AgentStatus, StoreError};

/// The most that is kept of a log: its end.
pub(crate) const MAX_LOG: usize = 128 << 10;
/// Between two logs of one guest.
const LOG_PAUSE: Duration = Duration::from_millis(500);
/// The longest reason that is kept.
const MAX_REASON: usize = 1000;
const LOG: &str = "agent.log";

/// Why a guest is not served.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AgentError {
    /// There is no agent in this VM.
    #[error("this VM is no agent's")]
    None,
    /// The report cannot follow what was reported before.
    #[error("{0}")]
    Order(String),
    /// Too often.
    #[error("too many logs; one in half a second is taken")]
    Often,
    /// Not the guest's fault.
    #[error("{0}")]
    Internal(String),
}

impl From<StoreError> for AgentError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound(_) => Self::None,
            StoreError::Illegal { .. } => Self::Order(error.to_string()),
            other => Self::Internal(other.to_string()),
        }
    }
}

/// The task of the agent in this VM.
pub(super) async fn task(shared: &Shared, vm: &VmId) -> Result<Task, AgentError> {
    let agent = shared.store.agent_of(vm).await?.ok_or(AgentError::None)?;
    let record = shared.store.vm_any(vm).await?;
    let env = files::spec(shared, &record).await.map_err(AgentError::Internal)?.seed.environment();
    let config = &shared.config;
    Task::new(agent, &config.harnesses, config.git_host.as_str(), env).map_err(AgentError::Internal)
}

/// What a guest says of its agent.
pub(super) async fn report(
    shared: &Shared,
    vm: &VmId,
    status: AgentStatus,
    failure: Option<String>,
) -> Result<(), AgentError> {
    // Read first: a guest that repeats itself must not keep the writer busy.
    let now = shared.store.agent_of(vm).await?.ok_or(AgentError::None)?.status;
    if now == status {
        return Ok(());
    }
    if !status.may_follow(now) {
        return Err(AgentError::Order(format!(
            "an agent that is {} cannot become {}",
            now.word(),
            status.word()
        )));
    }
    let failure = failure.map(|text| {
        let plain = text.chars().map(|c| if c.is_control() { ' ' } else { c });
        plain.take(MAX_REASON).collect::<String>()
    });
    let agent = shared.store.agent_report(vm, status, failure).await?;
    tracing::info!(%vm, agent = %agent.id, status = agent.status.word(), "agent.reported");
    Ok(())
}

/// Keeps the end of an agent's log.
pub(super) async fn keep_log(shared: &Shared, vm: &VmId, text: String) -> Result<(), AgentError> {
    // First what costs nothing: a guest may ask as fast as it can.
    {
        let mut last = shared.logs.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        last.retain(|_, at| at.elapsed() < LOG_PAUSE);
        if last.contains_key(vm) {
            return Err(AgentError::Often);
        }
        last.insert(vm.clone(), Instant::now());
    }
    if shared.store.agent_of(vm).await?.is_none() {
        return Err(AgentError::None);
    }
    let path = files::dir(shared, vm).join(LOG);
    let new = path.with_extension("log.new");
    let write = async {
        tokio::fs::write(&new, text).await?;
        tokio::fs::rename(&new, &path).await
    };
    write.await.map_err(|error| AgentError::Internal(format!("cannot keep the log: {error}")))
}

/// The placeholder that stands for git's password at this host.
pub(super) async fn credential(
    shared: &Shared,
    vm: &VmId,
    host: &HostName,
) -> Result<Option<String>, AgentError> {
    let agent = shared.store.agent_of(vm).await?.ok_or(AgentError::None)?;
    Ok(pick_credential(&shared.store.secrets_all(&agent.user).await?, host))
}

/// An agent's log as its guest sent it last; empty if it sent none.
pub(crate) async fn read_log(vms: &Path, vm: &VmId) -> io::Result<String> {
    let path: PathBuf = vms.join(vm.as_str()).join(LOG);
    match tokio::fs::read(&path).await {
        Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        Err(error) => Err(error),
    }
}
