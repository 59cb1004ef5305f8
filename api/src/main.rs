//! The `tapgate` command: the daemon and its client in one binary.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use std::process::ExitCode;
use tapgate::{admin, cli, config, doctor, images, serve, unit};

/// Runs untrusted code in microVMs and decides what may leave them.
#[derive(Parser)]
#[command(name = "tapgate", version, propagate_version = true, after_help = cli::EXIT_CODES)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the daemon
    Serve(serve::Args),
    /// Test what this host can do, and say how to mend what is missing
    Doctor(doctor::Args),
    /// Check the configuration and print it: what is set, and every other key with its default
    Config(serve::Args),
    /// The operator's work on the daemon's data
    Admin(admin::Args),
    /// Build, import and look after the images that VMs boot from
    #[command(subcommand)]
    Image(images::Args),
    /// Print the systemd unit: `tapgate unit | sudo tee /etc/systemd/system/tapgate.service`
    Unit,
    #[command(flatten)]
    Client(cli::Command),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().command {
        Command::Serve(args) => serve::run(args),
        Command::Doctor(args) => doctor::run(args),
        Command::Config(args) => config::print(args),
        Command::Admin(args) => admin::run(args),
        Command::Image(args) => images::run(args),
        Command::Unit => {
            unit::run();
            Ok(())
        }
        Command::Client(command) => return cli::run(command),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tapgate: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory as _;

    #[test]
    fn the_command_line_is_sound() {
        Arguments::command().debug_assert();
    }
}
