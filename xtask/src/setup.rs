//! `setup`: finds what building and testing need and installs what is missing. Idempotent; by apt as root or with sudo,
//! else it says what is missing and the command that gets it. Never leaves a service running that was not running before.

mod apt;
mod bpf;
mod cargo_tools;
mod needs;
mod services;
mod venvs;

use crate::run::{find, is_executable, output, program, run};
use anyhow::{Result, bail};
use needs::{Need, Sign};
use std::{
    io::IsTerminal as _,
    path::{Path, PathBuf},
    process::Stdio,
};

/// What the machine is, as far as decisions depend on it.
pub struct Machine {
    /// Whether we are root.
    pub root: bool,
    /// Whether sudo can make us so.
    pub sudo: bool,
    /// Whether there is an apt to install with.
    pub apt: bool,
}

impl Machine {
    /// Looks.
    pub fn probe() -> Self {
        let root = output(program("id").arg("-u")).is_some_and(|uid| uid.trim() == "0");
        // Somebody at a terminal can be asked for a password; nobody else can.
        let asked = std::io::stdin().is_terminal() && find("sudo").is_some();
        let sudo = !root && (asked || output(program("sudo").args(["-n", "true"])).is_some());
        Self { root, sudo, apt: find("apt-get").is_some() }
    }
}

/// Sets the machine up; with `check` only tells; with `packages` leaves out what needs no root.
pub fn command(check: bool, packages_only: bool) -> Result<()> {
    let machine = Machine::probe();
    let missing = missing();
    let mut advice = Vec::new();
    if !missing.is_empty() {
        for need in &missing {
            eprintln!("missing: {} (for {})", need.what, need.why);
        }
        let packages = needs::packages(&missing);
        match apt::decide(&machine, check, &packages) {
            apt::Decision::Install => apt::install(&packages)?,
            apt::Decision::Sudo => {
                let mut command = program("sudo");
                run(command
                    .arg(std::env::current_exe()?)
                    .args(["setup", "--packages"])
                    .stdin(Stdio::inherit()))?;
            }
            apt::Decision::Tell(text) => advice.push(text),
        }
        let still: Vec<&str> = self::missing().iter().map(|need| need.what).collect();
        if advice.is_empty() && !still.is_empty() {
            bail!("installed, and still not found: {}", still.join(", "));
        }
    }
    if !packages_only {
        // Without the packages they would not build.
        let check = check || !advice.is_empty();
        advice.extend(bpf::linker(&machine, check)?);
        advice.extend(cargo_tools::install(&machine, check)?);
        advice.extend(venvs::API.install(&machine, check)?);
        advice.extend(venvs::S3.install(&machine, check)?);
        advice.extend(venvs::CLIENTS.install(&machine, check)?);
    }
    if advice.is_empty() {
        eprintln!("setup: everything that building and testing need is here");
        return Ok(());
    }
    for line in &advice {
        eprintln!("to do: {line}");
    }
    bail!("setup is not complete; the lines above say what to run")
}

/// What is measured beside the proxy, which nothing else needs. Says where the Python programs among it are.
pub fn peers() -> Result<PathBuf> {
    let machine = Machine::probe();
    let missing: Vec<&Need> = needs::PEERS.iter().filter(|need| !need.signs.iter().all(is_there)).collect();
    let packages = needs::packages(&missing);
    if !packages.is_empty() {
        match apt::decide(&machine, false, &packages) {
            apt::Decision::Install => apt::install(&packages)?,
            _ => bail!("to measure other proxies, install: {}", packages.join(" ")),
        }
    }
    if let Some(text) = venvs::BENCH.install(&machine, false)? {
        bail!("to measure other proxies: {text}");
    }
    Ok(venvs::BENCH.folder().join("bin"))
}

fn missing() -> Vec<&'static Need> {
    needs::NEEDS.iter().filter(|need| !need.signs.iter().all(is_there)).collect()
}

fn is_there(sign: &Sign) -> bool {
    match sign {
        Sign::Program(name) => find(name).is_some(),
        Sign::File(path) => Path::new(path).exists(),
        Sign::BpfCompiler => bpf::compiler_is_there(),
    }
}

/// The folder that root's tools go to: shared, and known to the build of the BPF programs.
const SHARED: &str = "/usr/local/tapgate-tools";

/// Where tools that we build go: root's to the shared folder, anyone else's to where cargo installs.
pub fn tool_root(machine: &Machine) -> Option<&'static str> {
    machine.root.then_some(SHARED)
}

/// The folders that such tools are in.
pub fn tool_folders() -> Vec<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cargo")));
    std::iter::once(Path::new(SHARED).to_path_buf()).chain(home).map(|folder| folder.join("bin")).collect()
}

/// The tool of this name, in our folders or in `PATH`.
pub fn tool(name: &str) -> Option<PathBuf> {
    tool_folders()
        .into_iter()
        .map(|folder| folder.join(name))
        .find(|f| is_executable(f))
        .or_else(|| find(name))
}
