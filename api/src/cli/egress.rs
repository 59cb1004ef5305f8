//! `tapgate egress`: policy and rules, of the account or (with `--vm`) of one VM.

use super::exit::{Done, Failure};
use super::output::{json, line, one, rows};
use super::{Api, Options};
use serde_json::{Value, json as value};

const RULES: &[(&str, &str)] = &[
    ("ID", "id"),
    ("NAME", "name"),
    ("HOST", "host"),
    ("CIDR", "cidr"),
    ("COMMENT", "comment"),
    ("CREATED", "created_at"),
];

/// `tapgate egress`.
#[derive(clap::Args, Debug)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
    /// Of this VM (ID or name) rather than of the account
    #[arg(long, global = true)]
    vm: Option<String>,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// What happens to traffic that no rule allows
    Policy {
        #[command(subcommand)]
        command: Option<Policy>,
    },
    /// With --vm: frames, octets and drops by reason, and attempts that no audit event holds
    Counters,
    /// What is allowed
    #[command(visible_alias = "rules")]
    Rule {
        #[command(subcommand)]
        command: Rule,
    },
}

#[derive(clap::Subcommand, Debug)]
enum Policy {
    /// Show it
    Show,
    /// Change it
    Set {
        /// enforce: deny it; warn: let it pass and record it. With --vm it may be left out: the account's holds
        #[arg(value_parser = ["enforce", "warn"])]
        mode: Option<String>,
        /// With --vm: the account's rules do not hold for this VM
        #[arg(long)]
        no_inherit_rules: bool,
    },
    /// With --vm: go back to the account's
    Reset,
}

#[derive(clap::Subcommand, Debug)]
enum Rule {
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Allow a host or a range of addresses
    #[command(visible_alias = "create")]
    Add {
        /// api.github.com, *.npmjs.org, 10.0.0.0/8
        target: String,
        /// Unique in the account
        #[arg(long)]
        name: Option<String>,
        /// Why
        #[arg(long)]
        comment: Option<String>,
    },
    /// Remove one
    #[command(visible_alias = "rm")]
    Delete {
        /// ID or name
        rule: String,
    },
}

impl Args {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        let base = match &self.vm {
            Some(vm) => format!("/v1/vms/{}/egress", api.vm_id(vm)?),
            None => "/v1/egress".to_owned(),
        };
        match self.command {
            Command::Policy { command } => {
                policy(&api, &base, self.vm.is_some(), command.unwrap_or(Policy::Show))
            }
            Command::Counters if self.vm.is_none() => {
                Err(Failure::usage("name a VM: tapgate egress counters --vm NAME"))
            }
            Command::Counters => counters(&api, &base),
            Command::Rule { command } => rule(&api, &base, command),
        }
    }
}

fn policy(api: &Api, base: &str, of_vm: bool, command: Policy) -> Done {
    let path = format!("{base}/policy");
    let answer = match command {
        Policy::Show => api.get(&path, &[])?,
        // Without a word it would look as if it had been done.
        Policy::Set { no_inherit_rules: true, .. } if !of_vm => {
            return Err(Failure::usage("--no-inherit-rules is of one VM: add --vm NAME"));
        }
        Policy::Reset if !of_vm => {
            return Err(Failure::usage("the account's policy has none to go back to; name a VM: --vm NAME"));
        }
        Policy::Set { mode: None, .. } if !of_vm => {
            return Err(Failure::usage("say which: tapgate egress policy set enforce, or warn"));
        }
        Policy::Set { mode, no_inherit_rules } => {
            let mut body = value!({});
            if let Some(mode) = mode {
                body["mode"] = mode.into();
            }
            if of_vm {
                body["inherit_rules"] = (!no_inherit_rules).into();
            }
            api.send("PUT", &path, Some(body))?
        }
        Policy::Reset => {
            api.send("DELETE", &path, None)?;
            api.get(&path, &[])?
        }
    };
    let columns: &[(&str, &str)] = match of_vm {
        true => &[("MODE", "mode"), ("INHERIT MODE", "inherit_mode"), ("INHERIT RULES", "inherit_rules")],
        false => &[("MODE", "mode")],
    };
    one(api.json, columns, &answer)
}

fn counters(api: &Api, base: &str) -> Done {
    let counted = api.get(&format!("{base}/counters"), &[])?;
    if api.json {
        return json(&counted);
    }
    let mut lines = Vec::new();
    for (name, value) in counted.as_object().into_iter().flatten() {
        match value.as_object() {
            None => lines.push(value!({ "counter": name, "value": value })),
            Some(reasons) => lines.extend(
                reasons
                    .iter()
                    .map(|(reason, count)| value!({ "counter": format!("{name} {reason}"), "value": count })),
            ),
        }
    }
    rows(false, &[("COUNTER", "counter"), ("VALUE", "value")], lines)
}

fn rule(api: &Api, base: &str, command: Rule) -> Done {
    let path = format!("{base}/rules");
    match command {
        Rule::List => rows(api.json, RULES, api.list(&path, &[], 200, usize::MAX)?),
        Rule::Add { target, name, comment } => {
            // What begins with an address was meant as a range, also where it is none.
            let begins = target.split_once('/').map_or(target.as_str(), |(address, _)| address);
            let field = if begins.parse::<std::net::IpAddr>().is_ok() { "cidr" } else { "host" };
            let body = value!({ field: target, "name": name, "comment": comment });
            one(api.json, RULES, &api.send("POST", &path, Some(body))?)
        }
        Rule::Delete { rule } => {
            let id = match rule.parse::<tapgate_model::RuleId>() {
                Ok(_) => rule.clone(),
                Err(_) => {
                    let found = api.list(&path, &[("name", rule.clone())], 1, 1)?;
                    let id = found.first().and_then(|found| found["id"].as_str());
                    id.map_or_else(|| Err(super::exit::not_found("rule", &rule)), |id| Ok(id.to_owned()))?
                }
            };
            api.send("DELETE", &format!("{path}/{id}"), None)?;
            if api.json { json(&Value::Null) } else { line(&format!("{rule} is deleted")) }
        }
    }
}
