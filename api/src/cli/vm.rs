//! `tapgate vm`.

use super::exit::{Done, Exit, Failure};
use super::output::{json, line, one, rows};
use super::{Api, Options};
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::{Value, json as value};
use std::path::PathBuf;
use std::time::{Duration, Instant};

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "id"),
    ("NAME", "name"),
    ("STATUS", "status"),
    ("DETAIL", "status_detail"),
    ("CREATED", "created_at"),
    ("UPDATED", "updated_at"),
];
const POLL: Duration = Duration::from_millis(300);

/// `tapgate vm`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Args, Debug)]
struct Waiting {
    /// Wait until it is done
    #[arg(long)]
    wait: bool,
    /// Give up waiting after this many seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, requires = "wait")]
    timeout: u64,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Make a VM and boot it
    Create {
        /// Its name, unique among your VMs
        name: String,
        /// File with the SSH public key for access [default: the first ~/.ssh/id_*.pub]
        #[arg(long, value_name = "FILE")]
        key: Option<PathBuf>,
        /// Boot from this snapshot
        #[arg(long, value_name = "ID")]
        snapshot: Option<String>,
        /// Virtual processors
        #[arg(long)]
        vcpus: Option<u32>,
        /// Memory in MiB
        #[arg(long)]
        memory_mib: Option<u32>,
        /// Disk size in GiB
        #[arg(long)]
        disk_gib: Option<u32>,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// List VMs
    #[command(visible_alias = "ls")]
    List {
        /// Of this status: pending, running, stopped, destroyed, failed
        #[arg(long)]
        status: Option<String>,
        /// Of this name
        #[arg(long)]
        name: Option<String>,
        /// Destroyed ones too
        #[arg(long)]
        all: bool,
    },
    /// Show one VM
    Show {
        /// ID or name
        vm: String,
    },
    /// Boot a stopped VM
    Start {
        /// ID or name
        vm: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Shut a VM down; its disk remains
    Stop {
        /// ID or name
        vm: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Keep a VM's memory and end it; start goes on from there
    Suspend {
        /// ID or name
        vm: String,
        #[command(flatten)]
        waiting: Waiting,
    },
    /// Remove a stopped VM for good
    #[command(visible_alias = "rm")]
    Destroy {
        /// ID or name
        vm: String,
        /// Stop it first if it runs
        #[arg(long)]
        stop: bool,
        #[command(flatten)]
        waiting: Waiting,
    },
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        match self.command {
            Command::Create { name, key, snapshot, vcpus, memory_mib, disk_gib, waiting } => {
                let mut body = value!({ "name": name, "public_key": public_key(key)? });
                for (field, given) in [
                    ("snapshot_id", snapshot.map(Value::from)),
                    ("vcpus", vcpus.map(Value::from)),
                    ("memory_mib", memory_mib.map(Value::from)),
                    ("disk_gib", disk_gib.map(Value::from)),
                ] {
                    if let Some(given) = given {
                        body[field] = given;
                    }
                }
                let vm = api.send("POST", "/v1/vms", Some(body))?;
                show(&api, waiting.until(&api, vm, "ready")?)
            }
            Command::List { status, name, all } => {
                let mut query = Vec::new();
                query.extend(status.clone().map(|status| ("status", status)));
                query.extend(name.map(|name| ("name", name)));
                let mut found = api.list("/v1/vms", &query, 100, usize::MAX)?;
                if !all && status.is_none() {
                    found.retain(|vm| vm["status"] != "destroyed");
                }
                rows(api.json, COLUMNS, found)
            }
            Command::Show { vm } => show(&api, api.get(&path(&api, &vm, "")?, &[])?),
            Command::Start { vm, waiting } => {
                let vm = api.send("POST", &path(&api, &vm, "/start")?, None)?;
                show(&api, waiting.until(&api, vm, "ready")?)
            }
            Command::Stop { vm, waiting } => {
                let vm = api.send("POST", &path(&api, &vm, "/stop")?, None)?;
                show(&api, waiting.until(&api, vm, "stopped")?)
            }
            Command::Suspend { vm, waiting } => {
                let vm = api.send("POST", &path(&api, &vm, "/suspend")?, None)?;
                show(&api, waiting.until(&api, vm, "stopped")?)
            }
            Command::Destroy { vm, stop, waiting } => {
                let path = path(&api, &vm, "")?;
                if stop {
                    match api.send("POST", &format!("{path}/stop"), None) {
                        // It was not running: what was wanted.
                        Err(Failure { exit: Exit::Conflict, .. }) | Ok(_) => {}
                        Err(other) => return Err(other),
                    }
                }
                api.send("DELETE", &path, None)?;
                if waiting.wait {
                    let vm = api.get(&path, &[])?;
                    waiting.until(&api, vm, "destroyed")?;
                }
                if api.json { json(&Value::Null) } else { line(&format!("{vm} is destroyed")) }
            }
        }
    }
}

fn path(api: &Api, vm: &str, rest: &str) -> Done<String> {
    Ok(format!("/v1/vms/{}{rest}", api.vm_id(vm)?))
}

fn show(api: &Api, vm: Value) -> Done {
    let mut columns = COLUMNS.to_vec();
    for (column, field) in
        [("REASON", "failure_reason"), ("SUSPENDED", "suspended"), ("NOT SUSPENDED", "suspend_failure")]
    {
        if !vm[field].is_null() {
            columns.push((column, field));
        }
    }
    one(api.json, &columns, &vm)
}

/// The public key to give the VM.
pub(super) fn public_key(file: Option<PathBuf>) -> Done<String> {
    let candidates = match file {
        Some(file) => vec![file],
        None => {
            let ssh = PathBuf::from(std::env::var_os("HOME").unwrap_or_default()).join(".ssh");
            ["id_ed25519.pub", "id_ecdsa.pub", "id_rsa.pub"].iter().map(|name| ssh.join(name)).collect()
        }
    };
    let found = candidates.iter().find(|path| path.is_file()).ok_or_else(|| {
        let names: Vec<_> = candidates.iter().map(|path| path.display().to_string()).collect();
        let hint = "make one with `ssh-keygen -t ed25519`, or name it with --key";
        Failure::usage(format!("no SSH public key at {}; {hint}", names.join(", ")))
    })?;
    Ok(std::fs::read_to_string(found)?.trim().to_owned())
}

impl Waiting {
    /// Waits until the VM's detail is the one wanted; shows on a terminal what it is doing.
    fn until(&self, api: &Api, mut vm: Value, wanted: &str) -> Done<Value> {
        if !self.wait {
            return Ok(vm);
        }
        let id = vm["id"].as_str().unwrap_or_default().to_owned();
        let deadline = Instant::now() + Duration::from_secs(self.timeout);
        let spinner = ProgressBar::new_spinner();
        spinner.set_style(
            ProgressStyle::with_template("{spinner} {msg} ({elapsed})")
                .unwrap_or_else(|_| ProgressStyle::default_spinner()),
        );
        spinner.enable_steady_tick(Duration::from_millis(120));
        loop {
            let detail = vm["status_detail"].as_str().unwrap_or("?").to_owned();
            spinner.set_message(format!("{id}: {detail}"));
            let broken = detail == "failed" || (detail == "destroyed" && wanted != "destroyed");
            if detail == wanted || broken {
                spinner.finish_and_clear();
            }
            if detail == wanted {
                return Ok(vm);
            }
            if let Some(reason) = vm["suspend_failure"].as_str().filter(|_| wanted == "stopped") {
                spinner.finish_and_clear();
                return Err(Failure::new(Exit::NotReady, format!("{id} is not suspended: {reason}")));
            }
            if broken {
                let reason = vm["failure_reason"].as_str().unwrap_or("no reason was given");
                return Err(Failure::new(Exit::NotReady, format!("{id} is {detail}: {reason}")));
            }
            if Instant::now() >= deadline {
                spinner.finish_and_clear();
                let message = format!("{id} is still {detail} after {} s", self.timeout);
                return Err(Failure::new(Exit::NotReady, message));
            }
            std::thread::sleep(POLL);
            vm = api.get(&format!("/v1/vms/{id}"), &[])?;
        }
    }
}
