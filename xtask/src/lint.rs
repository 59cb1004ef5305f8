//! `lint`: formatting, clippy with warnings as errors, the house style, and the dependencies' licences and sources.

use crate::{
    run::{cargo, program, run},
    setup, style,
};
use anyhow::{Context as _, Result};

/// Runs every check, the quick ones first; stops at the first that fails.
pub fn command() -> Result<()> {
    style::check()?;
    run(cargo().args(["fmt", "--check"]))?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))?;
    let deny =
        setup::tool("cargo-deny").context("cargo-deny is not there; `cargo xtask setup` installs it")?;
    run(program(deny).args(["check", "bans", "licenses", "sources"]))
}
