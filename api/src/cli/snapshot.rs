//! `tapgate snapshot`.

use super::exit::Done;
use super::output::{json, line, one, rows};
use super::{Api, Options};
use serde_json::{Value, json as value};

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "id"),
    ("LABEL", "label"),
    ("KIND", "kind"),
    ("VM", "source_virtual_machine_id"),
    ("STATUS", "status"),
    ("BYTES", "size_bytes"),
    ("CREATED", "created_at"),
];

/// `tapgate snapshot`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Take one of a running VM
    Create {
        /// ID or name of the VM
        vm: String,
        /// What to call it
        #[arg(long)]
        label: Option<String>,
        /// With its memory: a VM made from it goes on where this one is
        #[arg(long)]
        memory: bool,
    },
    /// List them
    #[command(visible_alias = "ls")]
    List {
        /// Of this VM (ID or name)
        #[arg(long)]
        vm: Option<String>,
    },
    /// Show one
    Show {
        /// Its ID
        snapshot: String,
    },
    /// Remove one
    #[command(visible_alias = "rm")]
    Delete {
        /// Its ID
        snapshot: String,
    },
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        match self.command {
            Command::Create { vm, label, memory } => {
                let path = format!("/v1/vms/{}/snapshots", api.vm_id(&vm)?);
                let made = api.send(
                    "POST",
                    &path,
                    Some(value!({ "label": label, "kind": if memory { "memory" } else { "disk" } })),
                )?;
                show(&api, made)
            }
            Command::List { vm } => {
                let path = match vm {
                    Some(vm) => format!("/v1/vms/{}/snapshots", api.vm_id(&vm)?),
                    None => "/v1/snapshots".to_owned(),
                };
                let mut found = api.list(&path, &[], 200, usize::MAX)?;
                found.iter_mut().for_each(name_kind);
                rows(api.json, COLUMNS, found)
            }
            Command::Show { snapshot } => show(&api, api.get(&format!("/v1/snapshots/{snapshot}"), &[])?),
            Command::Delete { snapshot } => {
                api.send("DELETE", &format!("/v1/snapshots/{snapshot}"), None)?;
                if api.json { json(&Value::Null) } else { line(&format!("{snapshot} is deleted")) }
            }
        }
    }
}

/// The contract has no kind: where none is said it is the disk.
fn name_kind(snapshot: &mut Value) {
    if snapshot["kind"].is_null() {
        snapshot["kind"] = "disk".into();
    }
}

fn show(api: &Api, mut answer: Value) -> Done {
    let mut snapshot = answer["data"].take();
    name_kind(&mut snapshot);
    let mut columns = COLUMNS.to_vec();
    if !snapshot["failure_reason"].is_null() {
        columns.push(("REASON", "failure_reason"));
    }
    one(api.json, &columns, &snapshot)
}
