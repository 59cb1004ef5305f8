//! Programs that come as crates: the test runner and the check of dependencies. Built once, without optimisation,
//! because building them costs more than running them ever will here.

use super::{Machine, tool, tool_root};
use crate::run::{cargo, run, shown};
use anyhow::Result;

struct Tool {
    name: &'static str,
    version: &'static str,
    /// Whether everything works without it, only less well.
    optional: bool,
}

const TOOLS: &[Tool] = &[
    Tool { name: "cargo-deny", version: "0.20.2", optional: false },
    Tool { name: "cargo-nextest", version: "0.9.143", optional: true },
];

/// Installs what is missing; what one has to do by hand, if anything.
pub fn install(machine: &Machine, check: bool) -> Result<Vec<String>> {
    let mut advice = Vec::new();
    for wanted in TOOLS.iter().filter(|wanted| tool(wanted.name).is_none()) {
        let mut command = cargo();
        command.args(["install", wanted.name, "--version", wanted.version, "--locked", "--debug"]);
        if let Some(root) = tool_root(machine) {
            command.args(["--root", root]);
        }
        if check {
            advice.push(shown(&command));
        } else if let Err(error) = run(&mut command) {
            if !wanted.optional {
                return Err(error);
            }
            eprintln!("without {}: {error}; `cargo test` runs the tests instead", wanted.name);
        }
    }
    Ok(advice)
}
