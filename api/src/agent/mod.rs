//! What an agent is to be told: which repository, which command, which credential. Pure decisions: parses what users and
//! operators wrote once, and never lets text become part of a command line that a shell reads.

mod credential;
mod harness;
mod repo;

pub(crate) use credential::pick as pick_credential;
pub use harness::{Harness, HarnessError, Harnesses};
pub(crate) use repo::CloneUrl;

use serde::Serialize;
use tapgate_store::AgentRecord;

/// What the guest service hands to the guest of an agent.
#[derive(Debug, Serialize)]
pub(crate) struct Task {
    /// The agent.
    id: String,
    /// What the user calls it.
    name: String,
    /// What the records say of it: a task that has begun is not begun again.
    status: &'static str,
    /// What runs the prompt, for messages.
    harness: String,
    /// What to clone.
    url: String,
    /// What to check out, if not the default.
    branch: Option<String>,
    /// Name of the folder to clone into.
    directory: String,
    /// The program and its arguments, each as it is to arrive.
    argv: Vec<String>,
    /// Variables and placeholders as of now.
    env: Vec<(String, String)>,
}

impl Task {
    /// The task of an agent. Fails where the operator's configuration no longer has what the agent was made with.
    pub(crate) fn new(
        agent: AgentRecord,
        harnesses: &Harnesses,
        git_host: &str,
        mut env: Vec<(String, String)>,
    ) -> Result<Self, String> {
        let clone = CloneUrl::parse(&agent.repo, git_host).map_err(|error| error.to_string())?;
        let harness = harnesses.get(&agent.harness).map_err(|error| error.to_string())?;
        let argv =
            harness.argv(&agent.prompt, agent.agent_args.as_deref()).map_err(|error| error.to_string())?;
        // The user's own variables win over those that the harness asks for.
        for (name, value) in &harness.env {
            if !env.iter().any(|(known, _)| known == name) {
                env.push((name.clone(), value.clone()));
            }
        }
        Ok(Self {
            id: agent.id.into(),
            name: agent.name,
            status: agent.status.word(),
            harness: agent.harness,
            url: clone.url().to_owned(),
            branch: agent.branch,
            directory: clone.directory().to_owned(),
            argv,
            env,
        })
    }
}
