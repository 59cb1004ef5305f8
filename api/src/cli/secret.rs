//! `tapgate secret`. Values come from a prompt, standard input, a file or the environment, never from the command line,
//! where every user of the host could read them.

use super::exit::{Done, Exit, Failure, not_found};
use super::output::{json, line, one, rows};
use super::{Api, Options};
use serde_json::{Value, json as value};
use std::io::{IsTerminal as _, Read as _};
use std::path::PathBuf;
use zeroize::Zeroizing;

const COLUMNS: &[(&str, &str)] = &[
    ("ID", "id"),
    ("NAME", "name"),
    ("ENV VAR", "env_var"),
    ("HOSTS", "hosts"),
    ("PLACEHOLDER", "proxy_value"),
    ("COMMENT", "comment"),
    ("UPDATED", "updated_at"),
];

/// `tapgate secret`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    #[command(flatten)]
    options: Options,
}

/// Where a value comes from; without any of these: a prompt on a terminal, else standard input.
#[derive(clap::Args, Debug)]
struct Source {
    /// Read the value from this file
    #[arg(long, value_name = "FILE", group = "source")]
    from_file: Option<PathBuf>,
    /// Read the value from this environment variable
    #[arg(long, value_name = "VARIABLE", group = "source")]
    from_env: Option<String>,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// Keep a secret
    Create {
        /// Letters, digits, hyphens, underscores
        name: String,
        /// The environment variable that holds its placeholder in VMs
        #[arg(long, value_name = "NAME")]
        env_var: String,
        /// Where it may be sent: api.github.com, *.github.com, or * [default: *]
        #[arg(long = "host", value_name = "HOST")]
        hosts: Vec<String>,
        /// What it is for
        #[arg(long)]
        comment: Option<String>,
        #[command(flatten)]
        source: Source,
    },
    /// List secrets, without their values
    #[command(visible_alias = "ls")]
    List,
    /// Show one, without its value
    Show {
        /// ID or name
        secret: String,
    },
    /// Change one
    Update {
        /// ID or name
        secret: String,
        /// Read a new value
        #[arg(long)]
        value: bool,
        /// The environment variable
        #[arg(long, value_name = "NAME")]
        env_var: Option<String>,
        /// Where it may be sent; replaces the list
        #[arg(long = "host", value_name = "HOST")]
        hosts: Vec<String>,
        /// What it is for; an empty one removes it
        #[arg(long)]
        comment: Option<String>,
        #[command(flatten)]
        source: Source,
    },
    /// Remove one
    #[command(visible_alias = "rm")]
    Delete {
        /// ID or name
        secret: String,
    },
}

impl Source {
    const fn is_given(&self) -> bool {
        self.from_file.is_some() || self.from_env.is_some()
    }

    fn read(&self) -> Done<Zeroizing<String>> {
        let text = match (&self.from_file, &self.from_env) {
            (Some(file), _) => std::fs::read_to_string(file)
                .map_err(|error| Failure::usage(format!("{}: {error}", file.display())))?,
            (None, Some(name)) => {
                std::env::var(name).map_err(|_| Failure::usage(format!("the variable {name} is not set")))?
            }
            (None, None) if std::io::stdin().is_terminal() => rpassword::prompt_password("Value: ")?,
            (None, None) => {
                let mut text = String::new();
                std::io::stdin().take(64 * 1024).read_to_string(&mut text)?;
                text
            }
        };
        let text = Zeroizing::new(text);
        // Files and pipes end in a line break that is not meant.
        let value = text.strip_suffix('\n').unwrap_or(&text);
        let value = value.strip_suffix('\r').unwrap_or(value);
        if value.is_empty() {
            return Err(Failure::new(Exit::Usage, "the value is empty"));
        }
        Ok(Zeroizing::new(value.to_owned()))
    }
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        api.need_key()?;
        match self.command {
            Command::Create { name, env_var, hosts, comment, source } => {
                let secret = source.read()?;
                let mut body =
                    value!({ "name": name, "secret": *secret, "env_var": env_var, "comment": comment });
                if !hosts.is_empty() {
                    body["hosts"] = hosts.into();
                }
                one(api.json, COLUMNS, &api.send("POST", "/v1/secrets", Some(body))?)
            }
            Command::List => rows(api.json, COLUMNS, api.list("/v1/secrets", &[], 200, usize::MAX)?),
            Command::Show { secret } => one(api.json, COLUMNS, &api.get(&path(&api, &secret)?, &[])?),
            Command::Update { secret, value: read, env_var, hosts, comment, source } => {
                let mut body = value!({});
                if read || source.is_given() {
                    body["secret"] = source.read()?.as_str().into();
                }
                if let Some(env_var) = env_var {
                    body["env_var"] = env_var.into();
                }
                if !hosts.is_empty() {
                    body["hosts"] = hosts.into();
                }
                if let Some(comment) = comment {
                    body["comment"] = if comment.is_empty() { Value::Null } else { comment.into() };
                }
                if body.as_object().is_none_or(serde_json::Map::is_empty) {
                    return Err(Failure::usage(
                        "nothing to change: give --value, --from-file, --from-env, --env-var, --host or --comment",
                    ));
                }
                one(api.json, COLUMNS, &api.send("PATCH", &path(&api, &secret)?, Some(body))?)
            }
            Command::Delete { secret } => {
                api.send("DELETE", &path(&api, &secret)?, None)?;
                if api.json { json(&Value::Null) } else { line(&format!("{secret} is deleted")) }
            }
        }
    }
}

/// A name may look like an ID (`sec_a`), so names are tried first.
fn path(api: &Api, given: &str) -> Done<String> {
    let found = api.list("/v1/secrets", &[("name", given.to_owned())], 1, 1)?;
    match found.first().and_then(|found| found["id"].as_str()) {
        Some(id) => Ok(format!("/v1/secrets/{id}")),
        None if given.parse::<tapgate_model::SecretId>().is_ok() => Ok(format!("/v1/secrets/{given}")),
        None => Err(not_found("secret", given)),
    }
}
