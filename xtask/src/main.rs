//! `cargo xtask`: the developer's side of tapgate. Reads the command line and hands over; owns no step itself.
#![forbid(unsafe_code)]

mod bench;
mod build;
mod demo;
mod ebpf;
mod fuzz;
mod image;
mod lint;
mod run;
mod setup;
mod style;
mod tally;
mod test;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

#[derive(Parser)]
#[command(name = "cargo xtask", about = "Set up, build, check and demonstrate tapgate", version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Find or install what building and testing need; says what is missing where it may not install.
    Setup {
        /// Only say what is missing and how to get it; change nothing.
        #[arg(long)]
        check: bool,
        /// Only install packages: the part of it that needs root.
        #[arg(long, hide = true)]
        packages: bool,
    },
    /// Build the `tapgate` binary, with the BPF programs and the guest agent in it.
    Build {
        /// Build without optimisation.
        #[arg(long)]
        debug: bool,
    },
    /// Build the BPF programs and what loads them.
    BuildEbpf,
    /// Run the datapath's tests: programs through the kernel's own test run, and in namespaces.
    TestEbpf,
    /// Run the fuzz targets of the proxy's parsers, guided by coverage.
    Fuzz(fuzz::Options),
    /// Build the base image `debian-12` (kernel, initrd, disk) unless it is cached.
    Image {
        /// Use the release build of the `tapgate` binary.
        #[arg(long)]
        release: bool,
    },
    /// Measure a part against the design's bars, beside its peers, and keep the table in `docs/bench/`.
    Bench(bench::Options),
    /// Watch a real guest being held, let out, and given a secret that it never sees.
    Demo(demo::Options),
    /// Run every test, and the demo's steps.
    Test(test::Options),
    /// Formatting, clippy, house style, dependencies.
    Lint,
    /// The house style alone: how long a file is, and that it opens by saying what it owns.
    Style,
}

fn main() -> ExitCode {
    match run_command(Args::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_command(command: Command) -> anyhow::Result<()> {
    match command {
        Command::Setup { check, packages } => setup::command(check, packages),
        Command::Build { debug } => build::command(debug),
        Command::BuildEbpf => ebpf::build(),
        Command::TestEbpf => ebpf::test(),
        Command::Fuzz(options) => fuzz::command(&options),
        Command::Image { release } => image::command(release),
        Command::Bench(options) => bench::command(&options),
        Command::Demo(options) => demo::command(&options),
        Command::Test(options) => test::command(&options),
        Command::Lint => lint::command(),
        Command::Style => style::check(),
    }
}
