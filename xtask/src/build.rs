//! `build`: the `tapgate` binary. The BPF programs and the guest agent are built by the crates that embed them.

use crate::run::{cargo, run, target};
use anyhow::Result;
use std::{path::PathBuf, process::Command};

/// Builds the binary and says where it is.
pub fn command(debug: bool) -> Result<()> {
    let file = binary(!debug)?;
    eprintln!("built {}", file.display());
    Ok(())
}

/// Builds the binary; where it is.
pub fn binary(release: bool) -> Result<PathBuf> {
    run(with_profile(cargo().args(["build", "--package", "tapgate"]), release))?;
    Ok(folder(release).join("tapgate"))
}

/// The folder of this profile's programs.
pub fn folder(release: bool) -> PathBuf {
    target().join(if release { "release" } else { "debug" })
}

/// Adds `--release` where wanted.
pub fn with_profile(command: &mut Command, release: bool) -> &mut Command {
    if release { command.arg("--release") } else { command }
}
