//! `tapgate doctor`: tests what this host can do.

/// Options of `tapgate doctor`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the checks.
pub fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("this build has no checks yet")
}
