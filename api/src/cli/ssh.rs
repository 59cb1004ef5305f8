//! `tapgate ssh`: the host's own ssh, with the right port and a host key file of our own.
//!
//! Ports are used again by later VMs, so host keys are kept under the VM's id and never in `~/.ssh/known_hosts`.

use super::exit::{Done, Exit, Failure};
use super::{Api, Options, profile};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};

/// `tapgate ssh`.
#[derive(clap::Args, Debug)]
pub struct Args {
    /// ID or name
    vm: String,
    /// File with the SSH private key
    #[arg(short, long, value_name = "FILE")]
    identity: Option<PathBuf>,
    /// Option for ssh, as `-o` of ssh takes it
    #[arg(short = 'o', value_name = "OPTION")]
    ssh_options: Vec<String>,
    /// Forward a local port, as `-L` of ssh takes it
    #[arg(short = 'L', value_name = "ADDRESS")]
    forward: Vec<String>,
    /// Command to run in the VM
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
    #[command(flatten)]
    options: Options,
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        let vm = api.vm_id(&self.vm)?;
        let mut ssh = std::process::Command::new("ssh");
        // ssh takes the first value of an option: what the user gives wins over ours.
        for option in &self.ssh_options {
            ssh.args(["-o", option]);
        }
        for forward in &self.forward {
            ssh.args(["-L", forward]);
        }
        become_ssh(&api, &vm, ssh, self.identity.as_deref(), &self.command)
    }
}

/// Adds to `ssh` what leads to the VM, and becomes it.
pub(super) fn become_ssh(
    api: &Api,
    vm: &str,
    mut ssh: std::process::Command,
    identity: Option<&Path>,
    command: &[String],
) -> Done {
    let info = api.get(&format!("/v1/vms/{vm}/ssh"), &[])?;
    let (Some(host), Some(port), Some(user)) =
        (info["host"].as_str(), info["port"].as_u64(), info["username"].as_str())
    else {
        return Err(Failure::new(Exit::Other, "the API did not say how to reach the VM"));
    };
    if host.starts_with('-') || user.starts_with('-') {
        return Err(Failure::new(Exit::Other, "the API answered an address that is none"));
    }
    let known = profile::make_folder()?.join("known_hosts");
    ssh.args(["-p", &port.to_string()]);
    ssh.arg("-o").arg(format!("UserKnownHostsFile=\"{}\"", known.display()));
    ssh.args(["-o", &format!("HostKeyAlias={vm}"), "-o", "StrictHostKeyChecking=accept-new"]);
    ssh.args(["-o", "CheckHostIP=no"]);
    if let Some(identity) = identity {
        ssh.arg("-i").arg(identity).args(["-o", "IdentitiesOnly=yes"]);
    }
    ssh.arg(format!("{user}@{host}")).args(command);
    let error = ssh.exec();
    Err(Failure::new(Exit::Other, format!("cannot run ssh: {error}; install the OpenSSH client")))
}
