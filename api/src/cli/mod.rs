//! The client: commands for people (tables) and programs (`--json`), over the same REST API that anyone can use.
//!
//! It knows nothing of the daemon's files: whatever it can do, `curl` can.

mod account;
mod agent;
mod api;
mod audit;
mod egress;
mod env;
mod exit;
mod output;
mod profile;
mod secret;
mod snapshot;
mod ssh;
mod vm;

pub use exit::EXIT_CODES;

use api::Api;
use exit::Failure;
use std::process::ExitCode;

/// What every client command takes.
#[derive(clap::Args, Clone, Debug)]
pub struct Options {
    /// Where the API is
    #[arg(long, global = true, env = "TAPGATE_API_URL", value_name = "URL", help_heading = "Connection")]
    api_url: Option<String>,
    /// Print JSON, for programs
    #[arg(long, global = true, help_heading = "Output")]
    json: bool,
}

/// The client's commands.
#[derive(clap::Subcommand, Debug)]
pub enum Command {
    /// Make an account and keep its API key
    Signup(account::Signup),
    /// Keep an API key for later commands
    Login(account::Login),
    /// Forget the kept API key
    Logout(account::Logout),
    /// API keys of the account
    Key(account::Keys),
    /// Virtual machines
    Vm(vm::Args),
    /// Open a shell in a VM, or run a command there
    Ssh(ssh::Args),
    /// What VMs may reach
    Egress(egress::Args),
    /// Credentials that the proxy puts in on the VMs' behalf
    Secret(secret::Args),
    /// Environment variables of the VMs
    Env(env::Args),
    /// Snapshots of VMs
    Snapshot(snapshot::Args),
    /// Coding agents, each in a VM of its own
    Agent(agent::Args),
    /// What VMs tried to reach
    Audit(audit::Args),
}

/// Runs a client command.
pub fn run(command: Command) -> ExitCode {
    let done = match command {
        Command::Signup(args) => args.run(),
        Command::Login(args) => args.run(),
        Command::Logout(args) => args.run(),
        Command::Key(args) => args.run(),
        Command::Vm(args) => args.run(),
        Command::Ssh(args) => args.run(),
        Command::Egress(args) => args.run(),
        Command::Secret(args) => args.run(),
        Command::Env(args) => args.run(),
        Command::Snapshot(args) => args.run(),
        Command::Agent(args) => args.run(),
        Command::Audit(args) => args.run(),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { exit, message }) => {
            if !message.is_empty() {
                eprintln!("tapgate: {message}");
            }
            exit.into()
        }
    }
}
