//! Starts the daemon's log: events with fields on standard error, which systemd keeps.

use anyhow::Context as _;
use std::io::IsTerminal as _;

/// Starts logging with the given filter.
///
/// # Errors
/// The filter is not one.
pub fn start(filter: &str) -> anyhow::Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(filter).with_context(|| {
        format!("configuration key `log`: `{filter}` is not a filter such as info or tapgate=debug")
    })?;
    let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(colour).init();
    Ok(())
}
