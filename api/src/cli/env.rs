//! `tapgate env`.

use super::exit::{Done, Failure};
use super::output::{json, line, one, rows};
use super::{Api, Options};
use serde_json::{Value, json as value};

const COLUMNS: &[(&str, &str)] = &[("KEY", "key"), ("VALUE", "value"), ("UPDATED", "updated_at")];

/// `tapgate env`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Set variables. Not for credentials: use `tapgate secret`
    Set {
        /// KEY=VALUE
        #[arg(required = true, value_name = "KEY=VALUE")]
        pairs: Vec<String>,
    },
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Show one
    Get {
        /// Its key
        key: String,
    },
    /// Remove some
    #[command(visible_alias = "rm")]
    Delete {
        /// Their keys
        #[arg(required = true)]
        keys: Vec<String>,
    },
}

fn path(key: &str) -> String {
    let set = percent_encoding::NON_ALPHANUMERIC;
    format!("/v1/env/{}", percent_encoding::utf8_percent_encode(key, set))
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        match self.command {
            Command::Set { pairs } => {
                let split = |pair: &String| {
                    let (key, value) = pair.split_once('=')?;
                    (!key.is_empty()).then(|| (key.to_owned(), value.to_owned()))
                };
                let pairs: Option<Vec<_>> = pairs.iter().map(split).collect();
                let pairs = pairs.ok_or_else(|| Failure::usage("write variables as KEY=VALUE"))?;
                let mut set = Vec::new();
                for (key, value) in pairs {
                    set.push(api.send("PUT", &path(&key), Some(value!({ "value": value })))?);
                }
                rows(api.json, COLUMNS, set)
            }
            Command::List => rows(api.json, COLUMNS, api.list("/v1/env", &[], 200, usize::MAX)?),
            Command::Get { key } => one(api.json, COLUMNS, &api.get(&path(&key), &[])?),
            Command::Delete { keys } => {
                for key in &keys {
                    api.send("DELETE", &path(key), None)?;
                }
                if api.json { json(&Value::Null) } else { line(&format!("deleted: {}", keys.join(", "))) }
            }
        }
    }
}
