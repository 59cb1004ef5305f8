//! Agent records. An agent and its VM are made in one transaction, and go in one.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Order, Page, PageRequest};
use crate::store::Store;
use crate::time::now_us;
use crate::users::id;
use crate::vms::{self, NewVm};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use tapgate_model::lifecycle::Call;
use tapgate_model::{AgentId, StatusDetail, UserId, VmId};

/// What an agent is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AgentStatus {
    /// It has done its work.
    Idle,
    /// Its VM is being made.
    Provisioning,
    /// It works.
    Running,
}

impl AgentStatus {
    /// The word of the API and the database.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Provisioning => "provisioning",
            Self::Running => "running",
        }
    }

    /// Whether it may be reported of an agent that is in the other: steps may be left out, none goes back.
    pub const fn may_follow(self, from: Self) -> bool {
        self.place() >= from.place()
    }

    /// Its place in an agent's life.
    const fn place(self) -> u8 {
        match self {
            Self::Provisioning => 0,
            Self::Running => 1,
            Self::Idle => 2,
        }
    }

    /// The status with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Idle, Self::Provisioning, Self::Running].into_iter().find(|status| status.word() == word)
    }
}

/// An agent to be made.
#[derive(Clone, Debug)]
pub struct NewAgent {
    /// Unique among the account's agents that are not destroyed.
    pub name: String,
    /// What to clone.
    pub repo: String,
    /// What to check out.
    pub branch: Option<String>,
    /// What runs the prompt.
    pub harness: String,
    /// The task.
    pub prompt: String,
    /// For the harness.
    pub agent_args: Option<String>,
    /// Its VM.
    pub vm: NewVm,
}

/// An agent.
#[derive(Clone, Debug)]
pub struct AgentRecord {
    /// Id.
    pub id: AgentId,
    /// The owner.
    pub user: UserId,
    /// Its VM.
    pub vm: VmId,
    /// Name.
    pub name: String,
    /// What is cloned.
    pub repo: String,
    /// What is checked out.
    pub branch: Option<String>,
    /// What runs the prompt.
    pub harness: String,
    /// The task.
    pub prompt: String,
    /// For the harness.
    pub agent_args: Option<String>,
    /// What it is doing.
    pub status: AgentStatus,
    /// Why it could not do its work.
    pub failure: Option<String>,
    /// Microseconds since the epoch.
    pub created_at: i64,
    /// Microseconds since the epoch.
    pub updated_at: i64,
}

/// Which agents to list.
#[derive(Clone, Debug, Default)]
pub struct AgentFilter {
    /// Of this status.
    pub status: Option<AgentStatus>,
    /// Of exactly this name.
    pub name: Option<String>,
}

const SELECT: &str = "SELECT seq, id, user, vm, name, repo, branch, harness, prompt, agent_args, status, failure, \
     created_at, updated_at FROM agents";

fn read(row: &Row<'_>) -> rusqlite::Result<AgentRecord> {
    let status: String = row.get("status")?;
    Ok(AgentRecord {
        id: id(row, "id")?,
        user: id(row, "user")?,
        vm: id(row, "vm")?,
        name: row.get("name")?,
        repo: row.get("repo")?,
        branch: row.get("branch")?,
        harness: row.get("harness")?,
        prompt: row.get("prompt")?,
        agent_args: row.get("agent_args")?,
        status: AgentStatus::from_word(&status)
            .ok_or_else(|| rusqlite::Error::InvalidColumnName("status".into()))?,
        failure: row.get("failure")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

fn find(db: &Connection, user: &UserId, agent: &AgentId) -> Result<AgentRecord> {
    db.prepare_cached(&format!("{SELECT} WHERE id = ?1 AND user = ?2 AND destroyed_at IS NULL"))?
        .query_row(params![agent.as_str(), user.as_str()], read)
        .optional()?
        .ok_or(StoreError::NotFound(Kind::Agent))
}

impl Store {
    /// Makes an agent and its VM.
    pub async fn agent_create(&self, new: NewAgent) -> Result<AgentRecord> {
        let store = self.clone();
        self.db
            .write(move |tx| {
                let user = new.vm.user.clone();
                let taken: bool = tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM agents WHERE user = ?1 AND name = ?2 AND destroyed_at IS NULL)",
                    params![user.as_str(), new.name],
                    |row| row.get(0),
                )?;
                if taken {
                    return Err(Conflict::AgentName.into());
                }
                let vm = vms::insert(&store, tx, &new.vm)?;
                let agent = AgentId::generate();
                tx.execute(
                    "INSERT INTO agents (id, user, vm, name, repo, branch, harness, prompt, agent_args, status,
                                         created_at, updated_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, 'provisioning', ?10, ?10)",
                    params![
                        agent.as_str(),
                        user.as_str(),
                        vm.id.as_str(),
                        new.name,
                        new.repo,
                        new.branch,
                        new.harness,
                        new.prompt,
                        new.agent_args,
                        now_us()
                    ],
                )?;
                find(tx, &user, &agent)
            })
            .await
    }

    /// A user's agents that are not destroyed, newest first.
    pub async fn agents(
        &self,
        user: &UserId,
        filter: AgentFilter,
        limit: u32,
        cursor: Option<String>,
    ) -> Result<Page<AgentRecord>> {
        let (user, cursors) = (user.clone(), self.cursors.clone());
        self.db
            .read(move |db| {
                let scope = format!("agents\0{user}\0{filter:?}");
                let mut filters =
                    vec![("user = ?", Value::Text(user.into())), ("destroyed_at IS NULL", Value::Null)];
                if let Some(status) = filter.status {
                    filters.push(("status = ?", Value::Text(status.word().into())));
                }
                if let Some(name) = filter.name {
                    filters.push(("name = ?", Value::Text(name)));
                }
                Listing { select: SELECT, filters, sort: "created_at", scope }.run(
                    db,
                    &cursors,
                    &PageRequest { limit, cursor, order: Order::Desc },
                    read,
                )
            })
            .await
    }

    /// One agent of a user.
    pub async fn agent(&self, user: &UserId, agent: &AgentId) -> Result<AgentRecord> {
        let (user, agent) = (user.clone(), agent.clone());
        self.db.read(move |db| find(db, &user, &agent)).await
    }

    /// The agent that lives in a VM, if one does: for the engine.
    pub async fn agent_of(&self, vm: &VmId) -> Result<Option<AgentRecord>> {
        let vm = vm.clone();
        self.db.read(move |db| living(db, &vm)).await
    }

    /// Destroys an agent with its VM, whatever that is doing. Answers the VM for the engine to be woken.
    pub async fn agent_destroy(&self, user: &UserId, agent: &AgentId) -> Result<VmId> {
        let (user, agent) = (user.clone(), agent.clone());
        self.db
            .write(move |tx| {
                let found = find(tx, &user, &agent)?;
                // Nobody sees it any more; its task may be long, and is not for keeping.
                tx.execute(
                    "UPDATE agents SET destroyed_at = ?2, repo = '', branch = NULL, prompt = '', agent_args = NULL, failure = NULL
                     WHERE id = ?1",
                    params![agent.as_str(), now_us()],
                )?;
                let mut vm = vms::owned(tx, &user, &found.vm)?;
                if matches!(
                    vm.detail,
                    StatusDetail::Queued
                        | StatusDetail::Creating
                        | StatusDetail::Starting
                        | StatusDetail::Running
                        | StatusDetail::Ready
                ) {
                    vms::call(tx, &vm, Call::Stop)?;
                    vm = vms::owned(tx, &user, &found.vm)?;
                }
                vms::call(tx, &vm, Call::Destroy)?;
                Ok(found.vm)
            })
            .await
    }

    /// What the guest in a VM reports of its agent: `provisioning` → `running` → `idle`, a step may be left out, none goes
    /// back. Repeating the last report is fine. `failure` is kept with `idle`.
    pub async fn agent_report(
        &self,
        vm: &VmId,
        status: AgentStatus,
        failure: Option<String>,
    ) -> Result<AgentRecord> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                let now = living(tx, &vm)?.ok_or(StoreError::NotFound(Kind::Agent))?;
                if !status.may_follow(now.status) {
                    return Err(StoreError::Illegal { from: now.status.word(), to: status.word() });
                }
                // What ended it first is what counts.
                if now.status != status {
                    let failure = failure.filter(|_| status == AgentStatus::Idle);
                    set(tx, &now.id, status, failure.as_deref())?;
                }
                living(tx, &vm)?.ok_or(StoreError::NotFound(Kind::Agent))
            })
            .await
    }

    /// Notes why an agent that is being provisioned does not get on.
    pub async fn agent_hindered(&self, vm: &VmId, reason: String) -> Result<()> {
        let vm = vm.clone();
        self.db
            .write(move |tx| match living(tx, &vm)? {
                Some(agent) if agent.status == AgentStatus::Provisioning => {
                    set(tx, &agent.id, agent.status, Some(&reason))
                }
                _ => Ok(()),
            })
            .await
    }
}

fn living(db: &Connection, vm: &VmId) -> Result<Option<AgentRecord>> {
    Ok(db
        .prepare_cached(&format!("{SELECT} WHERE vm = ?1 AND destroyed_at IS NULL"))?
        .query_row([vm.as_str()], read)
        .optional()?)
}

fn set(tx: &Transaction<'_>, agent: &AgentId, status: AgentStatus, failure: Option<&str>) -> Result<()> {
    tx.execute(
        "UPDATE agents SET status = ?2, failure = ?3, updated_at = max(?4, created_at) WHERE id = ?1",
        params![agent.as_str(), status.word(), failure, now_us()],
    )?;
    Ok(())
}

/// What a VM's new state means for the agent in it. An agent does not outlive its run: where the VM ends, so does its work.
pub(crate) fn follow(tx: &Transaction<'_>, vm: &VmId, to: StatusDetail, failure: Option<&str>) -> Result<()> {
    let Some(agent) = living(tx, vm)? else { return Ok(()) };
    let because = |what: &str| failure.map_or_else(|| what.to_owned(), |reason| format!("{what}: {reason}"));
    match (agent.status, to) {
        (AgentStatus::Running, StatusDetail::Failed) => {
            set(tx, &agent.id, AgentStatus::Idle, Some(&because("its VM failed")))
        }
        (AgentStatus::Running, StatusDetail::Stopped) => {
            set(tx, &agent.id, AgentStatus::Idle, Some("its VM was stopped while it ran"))
        }
        // By itself, without the agent: whatever it was to do is not done any more.
        (
            AgentStatus::Provisioning | AgentStatus::Running,
            StatusDetail::Destroying | StatusDetail::Destroyed,
        ) => set(tx, &agent.id, AgentStatus::Idle, Some("its VM was destroyed")),
        // It has not begun, so it begins when the VM is started again.
        (AgentStatus::Provisioning, StatusDetail::Failed) => {
            set(tx, &agent.id, agent.status, Some(&because("its VM failed")))
        }
        (AgentStatus::Provisioning, StatusDetail::Starting) if agent.failure.is_some() => {
            set(tx, &agent.id, agent.status, None)
        }
        _ => Ok(()),
    }
}
