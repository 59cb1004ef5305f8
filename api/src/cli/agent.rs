//! `tapgate agent`.

use super::exit::{Done, Failure, not_found};
use super::output::{json, line, one, rows};
use super::{Api, Options, ssh::become_ssh, vm::public_key};
use serde_json::{Value, json as value};
use std::path::PathBuf;

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "id"),
    ("NAME", "name"),
    ("STATUS", "status"),
    ("HARNESS", "harness"),
    ("REPO", "repo"),
    ("BRANCH", "branch"),
    ("VM", "vm_id"),
    ("CREATED", "created_at"),
];

/// `tapgate agent`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Start one
    Create {
        /// Its name, unique among active agents
        name: String,
        /// What to clone
        #[arg(long)]
        repo: String,
        /// What to check out
        #[arg(long)]
        branch: Option<String>,
        /// What runs the prompt [default: claude]
        #[arg(long)]
        harness: Option<String>,
        /// The task
        #[arg(long, required_unless_present = "prompt_file")]
        prompt: Option<String>,
        /// Read the task from this file
        #[arg(long, value_name = "FILE", conflicts_with = "prompt")]
        prompt_file: Option<PathBuf>,
        /// More arguments for the harness, with quotes as in a shell
        #[arg(long, allow_hyphen_values = true)]
        agent_args: Option<String>,
        /// File with the SSH public key for access [default: the first ~/.ssh/id_*.pub, if there is one]
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Memory of its VM in MiB
        #[arg(long)]
        memory_mib: Option<u32>,
        /// Boot from this snapshot, which has what the harness needs
        #[arg(long, value_name = "ID")]
        snapshot: Option<String>,
    },
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Show one
    Show {
        /// ID or name
        agent: String,
    },
    /// Show the end of what its harness shows
    Log {
        /// ID or name
        agent: String,
        /// How many lines
        #[arg(long, default_value_t = 200)]
        tail: u32,
    },
    /// Attach to its terminal, the tmux session `main` (detach with Ctrl-B D)
    Attach {
        /// ID or name
        agent: String,
        /// File with the SSH private key
        #[arg(short, long, value_name = "FILE")]
        identity: Option<PathBuf>,
    },
    /// Destroy one with its VM
    #[command(visible_alias = "rm")]
    Destroy {
        /// ID or name
        agent: String,
    },
}

fn path(api: &Api, given: &str) -> Done<String> {
    if given.parse::<tapgate_model::AgentId>().is_ok() {
        return Ok(format!("/v1/agents/{given}"));
    }
    let found = api.list("/v1/agents", &[("name", given.to_owned())], 1, 1)?;
    let id = found.first().and_then(|found| found["id"].as_str());
    id.map(|id| format!("/v1/agents/{id}")).ok_or_else(|| not_found("agent", given))
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        match self.command {
            Command::Create {
                name,
                repo,
                branch,
                harness,
                prompt,
                prompt_file,
                agent_args,
                key,
                memory_mib,
                snapshot,
            } => {
                let prompt = match (prompt, prompt_file) {
                    (Some(prompt), _) => prompt,
                    (None, Some(file)) => std::fs::read_to_string(file)?,
                    (None, None) => return Err(Failure::usage("give --prompt or --prompt-file")),
                };
                // Without a key there is no way in; the agent works all the same.
                let public_key = match key {
                    Some(file) => Some(public_key(Some(file))?),
                    None => public_key(None).ok(),
                };
                let body = value!({
                    "name": name, "repo": repo, "branch": branch, "harness": harness, "prompt": prompt,
                    "agent_args": agent_args, "public_key": public_key, "memory_mib": memory_mib,
                    "snapshot_id": snapshot,
                });
                one(api.json, COLUMNS, &api.send("POST", "/v1/agents", Some(body))?)
            }
            Command::List => rows(api.json, COLUMNS, api.list("/v1/agents", &[], 100, usize::MAX)?),
            Command::Show { agent } => {
                let agent = api.get(&path(&api, &agent)?, &[])?;
                let mut columns = COLUMNS.to_vec();
                if agent["failure_reason"].is_string() {
                    columns.push(("REASON", "failure_reason"));
                }
                one(api.json, &columns, &agent)
            }
            Command::Log { agent, tail } => {
                let log = api.get(&format!("{}/log", path(&api, &agent)?), &[("tail", tail.to_string())])?;
                if api.json {
                    return json(&log);
                }
                // A guest wrote this: nothing of it may steer the terminal.
                let text = log["log"].as_str().unwrap_or_default();
                line(&text.replace(|c: char| c.is_control() && !matches!(c, '\n' | '\t'), ""))
            }
            Command::Attach { agent, identity } => {
                let found = api.get(&path(&api, &agent)?, &[])?;
                let vm = found["vm_id"].as_str().ok_or_else(|| not_found("agent", &agent))?;
                let mut ssh = std::process::Command::new("ssh");
                ssh.arg("-t");
                let attach = ["tmux", "attach-session", "-t", "main"].map(str::to_owned);
                become_ssh(&api, vm, ssh, identity.as_deref(), &attach)
            }
            Command::Destroy { agent } => {
                api.send("DELETE", &path(&api, &agent)?, None)?;
                if api.json { json(&Value::Null) } else { line(&format!("{agent} is destroyed")) }
            }
        }
    }
}
