//! The client.
/// Exit codes.
pub const EXIT_CODES: &str = "";
/// Client commands.
#[derive(clap::Subcommand, Debug)]
pub enum Command {}
/// Runs a client command.
pub fn run(command: Command) -> std::process::ExitCode {
    match command {}
}
