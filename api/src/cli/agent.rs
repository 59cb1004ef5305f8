//! `tapgate agent`.

use super::exit::{Done, Failure, not_found};
use super::output::{json, line, one, rows};
use super::{Api, Options};
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
        /// More arguments for the harness
        #[arg(long, allow_hyphen_values = true)]
        agent_args: Option<String>,
    },
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Show one
    Show {
        /// ID or name
        agent: String,
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
            Command::Create { name, repo, branch, harness, prompt, prompt_file, agent_args } => {
                let prompt = match (prompt, prompt_file) {
                    (Some(prompt), _) => prompt,
                    (None, Some(file)) => std::fs::read_to_string(file)?,
                    (None, None) => return Err(Failure::usage("give --prompt or --prompt-file")),
                };
                let body = value!({
                    "name": name, "repo": repo, "branch": branch, "harness": harness,
                    "prompt": prompt, "agent_args": agent_args,
                });
                one(api.json, COLUMNS, &api.send("POST", "/v1/agents", Some(body))?)
            }
            Command::List => rows(api.json, COLUMNS, api.list("/v1/agents", &[], 100, usize::MAX)?),
            Command::Show { agent } => one(api.json, COLUMNS, &api.get(&path(&api, &agent)?, &[])?),
            Command::Destroy { agent } => {
                api.send("DELETE", &path(&api, &agent)?, None)?;
                if api.json { json(&Value::Null) } else { line(&format!("{agent} is destroyed")) }
            }
        }
    }
}
