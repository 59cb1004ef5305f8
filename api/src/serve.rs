//! `tapgate serve`: the daemon.

/// Options of `tapgate serve`.
#[derive(clap::Args, Debug)]
pub struct Args {}

/// Runs the daemon until it is told to stop.
pub fn run(_: Args) -> anyhow::Result<()> {
    anyhow::bail!("this build has no daemon yet")
}
