//! `build`: the guest agent, linked statically because it runs in any image, then the `tapgate` binary.

use crate::run::{cargo, run, target};
use anyhow::Result;
use std::path::PathBuf;

/// Builds the agent and the binary.
pub fn command(debug: bool) -> Result<()> {
    let file = binary(!debug)?;
    eprintln!("built {}", file.display());
    Ok(())
}

/// Builds what runs, and returns where the `tapgate` binary is.
pub fn binary(release: bool) -> Result<PathBuf> {
    guest_agent()?;
    run(with_profile(cargo().args(["build", "--package", "tapgate"]), release))?;
    Ok(folder(release).join("tapgate"))
}

/// Builds the static guest agent. For a target given by name, so that flags for it touch no build script.
pub fn guest_agent() -> Result<()> {
    let mut command = cargo();
    command.args(["build", "--package", "tapgate-guest-agent", "--release", "--target", AGENT_TARGET]);
    run(command.env("RUSTFLAGS", "-Ctarget-feature=+crt-static"))
}

const AGENT_TARGET: &str = "x86_64-unknown-linux-gnu";

/// The folder of this profile's programs.
pub fn folder(release: bool) -> PathBuf {
    target().join(if release { "release" } else { "debug" })
}

/// Adds `--release` where wanted.
pub fn with_profile(command: &mut std::process::Command, release: bool) -> &mut std::process::Command {
    if release { command.arg("--release") } else { command }
}
