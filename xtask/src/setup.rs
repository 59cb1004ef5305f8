//! `setup`: finds what building and testing need and installs what is missing. Idempotent; as root by apt, else it
//! says what is missing and the command that gets it. Never leaves a service running that was not running before.

mod apt;
mod bpf;
mod cargo_tools;
mod needs;
mod services;

use crate::run::{find, is_executable, output, program};
use anyhow::{Result, bail};
use needs::{Need, Sign};
use std::path::Path;

/// What the machine is, as far as decisions depend on it.
pub struct Machine {
    /// Whether we may install.
    pub root: bool,
    /// Whether there is an apt to install with.
    pub apt: bool,
}

impl Machine {
    fn probe() -> Self {
        let uid = output(program("id").arg("-u"));
        Self { root: uid.is_some_and(|uid| uid.trim() == "0"), apt: find("apt-get").is_some() }
    }
}

/// Sets the machine up; with `check` only tells.
pub fn command(check: bool) -> Result<()> {
    let machine = Machine::probe();
    let missing: Vec<&Need> = needs::NEEDS.iter().filter(|need| !need.signs.iter().all(is_there)).collect();
    let mut advice = Vec::new();
    if !missing.is_empty() {
        for need in &missing {
            eprintln!("missing: {} (for {})", need.what, need.why);
        }
        let packages = needs::packages(&missing);
        match apt::decide(&machine, check, &packages) {
            apt::Decision::Install => apt::install(&packages)?,
            apt::Decision::Tell(text) => advice.push(text),
        }
    }
    if advice.is_empty() {
        let still: Vec<&str> =
            missing.iter().filter(|need| !need.signs.iter().all(is_there)).map(|need| need.what).collect();
        if !still.is_empty() {
            bail!("installed, and still not found: {}", still.join(", "));
        }
    }
    advice.extend(bpf::linker(&machine, check)?);
    advice.extend(cargo_tools::install(&machine, check)?);
    if advice.is_empty() {
        eprintln!("setup: everything that building and testing need is here");
        return Ok(());
    }
    for line in &advice {
        eprintln!("to do: {line}");
    }
    bail!("setup is not complete; the lines above say what to run")
}

fn is_there(sign: &Sign) -> bool {
    match sign {
        Sign::Program(name) => find(name).is_some(),
        Sign::File(path) => Path::new(path).exists(),
        Sign::BpfCompiler => bpf::compiler_is_there(),
    }
}

/// The folders that tools built by us are in, the first being where new ones go.
pub fn tool_folders(machine: &Machine) -> Vec<std::path::PathBuf> {
    let shared = Path::new("/usr/local/tapgate-tools").to_path_buf();
    let own = crate::run::target().join("tools");
    if machine.root { vec![shared, own] } else { vec![own, shared] }
}

/// The tool of this name, in our folders or in `PATH`.
pub fn tool(name: &str) -> Option<std::path::PathBuf> {
    let folders = tool_folders(&Machine { root: true, apt: false });
    folders
        .into_iter()
        .map(|folder| folder.join("bin").join(name))
        .find(|f| is_executable(f))
        .or_else(|| find(name))
}
