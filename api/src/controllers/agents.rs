//! Agents: the records, and the VM that is made and destroyed with each.

use super::vms::{asked, check_public_key, new_vm, of_snapshot, parse_snapshot};
use crate::agent::CloneUrl;
use crate::engine::agents as logs;
use crate::http::{Account, ApiError, AppState, Fields, Id, List, NoFields, Params, time};
use crate::http::{fields_at_most as at_most, fields_bounded as bounded};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_model::AgentId;
use tapgate_store::{AgentFilter, AgentRecord, AgentStatus, NewAgent, SnapshotKind};

#[derive(Serialize)]
pub(crate) struct AgentView {
    id: String,
    name: String,
    repo: String,
    branch: Option<String>,
    harness: String,
    prompt: String,
    agent_args: Option<String>,
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    failure_reason: Option<String>,
    vm_id: String,
    created_at: String,
    updated_at: String,
}

impl From<AgentRecord> for AgentView {
    fn from(agent: AgentRecord) -> Self {
        Self {
            id: agent.id.into(),
            name: agent.name,
            repo: agent.repo,
            branch: agent.branch,
            harness: agent.harness,
            prompt: agent.prompt,
            agent_args: agent.agent_args,
            status: agent.status.word(),
            failure_reason: agent.failure,
            vm_id: agent.vm.into(),
            created_at: time(agent.created_at),
            updated_at: time(agent.updated_at),
        }
    }
}

/// Words that reach a command line in the guest: nothing that could be taken for an option or break a line.
fn check_word(name: &str, text: &str, max: usize) -> Result<(), ApiError> {
    bounded(name, text, max, false)?;
    if text.starts_with('-') || text.chars().any(char::is_whitespace) {
        return Err(ApiError::validation(format!("`{name}` must not begin with a hyphen or contain spaces")));
    }
    Ok(())
}

pub(crate) async fn create(
    State(state): State<AppState>,
    account: Account,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<AgentView>), ApiError> {
    params.finish()?;
    let name = fields.text("name")?;
    let repo = fields.text("repo")?;
    let branch = fields.optional_text("branch")?;
    let harness = fields.optional_text("harness")?.unwrap_or_else(|| "claude".into());
    let prompt = fields.text("prompt")?;
    let agent_args = fields.optional_text("agent_args")?;
    let public_key = fields.optional_text("public_key")?;
    let snapshot = fields.optional_text("snapshot_id")?.map(|text| parse_snapshot(&text)).transpose()?;
    let asked = asked(&state, &mut fields)?;
    fields.finish()?;
    bounded("name", &name, 64, false)?;
    check_word("repo", &repo, 2048)?;
    if let Some(branch) = &branch {
        check_word("branch", branch, 255)?;
    }
    check_word("harness", &harness, 64)?;
    bounded("prompt", &prompt, 65_536, true)?;
    if let Some(args) = &agent_args {
        at_most("agent_args", args, 4096, false)?;
    }
    CloneUrl::parse(&repo, &state.settings().git_host)
        .map_err(|error| ApiError::validation(error.to_string()))?;
    let known = state.settings().harnesses.get(&harness);
    known
        .and_then(|harness| harness.argv(&prompt, agent_args.as_deref()))
        .map_err(|error| ApiError::validation(error.to_string()))?;
    let public_key = public_key.map_or(Ok(String::new()), |key| check_public_key(&key))?;
    let resources = match &snapshot {
        Some(snapshot) => {
            let snapshot = state.store().snapshot(&account.user, snapshot).await?;
            if snapshot.kind == SnapshotKind::Memory {
                // Its agent would be the parent's, in the middle of what that one does.
                return Err(ApiError::validation(
                    "`snapshot_id` of an agent must be a snapshot of kind `disk`",
                ));
            }
            of_snapshot(&state, &snapshot, asked).await?
        }
        None => asked.or_default(&state),
    };
    let vm_name = format!("agent-{name}");
    let vm = new_vm(&state, account.user, vm_name, public_key, snapshot, resources).await?;
    let new = NewAgent { name, repo, branch, harness, prompt, agent_args, vm };
    let agent = state.store().agent_create(new).await?;
    state.engine().wake(agent.vm.clone());
    Ok((StatusCode::CREATED, Json(agent.into())))
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    mut params: Params,
) -> Result<Json<List<AgentView>>, ApiError> {
    let status = params.parsed("status", "one of provisioning, running, idle", AgentStatus::from_word)?;
    let name = params.text("name");
    let (limit, cursor) = (params.limit(20, 100)?, params.cursor());
    params.finish()?;
    let page = state.store().agents(&account.user, AgentFilter { status, name }, limit, cursor).await?;
    Ok(Json(List::of(page, Into::into)))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    account: Account,
    Id(agent): Id<AgentId>,
    params: Params,
) -> Result<Json<AgentView>, ApiError> {
    params.finish()?;
    Ok(Json(state.store().agent(&account.user, &agent).await?.into()))
}

#[derive(Serialize)]
pub(crate) struct LogView {
    /// The last lines of what the harness shows.
    log: String,
    /// Whether there was more before.
    truncated: bool,
}

/// The end of what the harness shows on its terminal, as the guest sent it last.
pub(crate) async fn log(
    State(state): State<AppState>,
    account: Account,
    Id(agent): Id<AgentId>,
    mut params: Params,
) -> Result<Json<LogView>, ApiError> {
    let wanted = |text: &str| text.parse().ok().filter(|lines| (1..=10_000).contains(lines));
    let lines: usize = params.parsed("tail", "a number of lines from 1 to 10000", wanted)?.unwrap_or(200);
    params.finish()?;
    let agent = state.store().agent(&account.user, &agent).await?;
    let text = logs::read_log(&state.settings().vms, &agent.vm).await.map_err(|error| {
        tracing::error!(agent = %agent.id, %error, "agent.log_unreadable");
        ApiError::internal()
    })?;
    let starts = text.trim_end_matches('\n').rmatch_indices('\n').nth(lines - 1).map(|(at, _)| at + 1);
    let log = text.get(starts.unwrap_or(0)..).unwrap_or_default().to_owned();
    Ok(Json(LogView { log, truncated: starts.is_some() }))
}

pub(crate) async fn destroy(
    State(state): State<AppState>,
    account: Account,
    Id(agent): Id<AgentId>,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    let vm = state.store().agent_destroy(&account.user, &agent).await?;
    state.engine().wake(vm);
    Ok(StatusCode::NO_CONTENT)
}
