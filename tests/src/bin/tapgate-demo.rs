//! The demo's program: `cargo xtask demo` builds what it needs and starts it.
#![forbid(unsafe_code)]

use clap::{Parser, ValueEnum};
use std::{path::PathBuf, process::ExitCode};
use tapgate_e2e::{
    daemon::{self, Settings},
    demo,
};

#[derive(Parser)]
#[command(about = "Watch a guest being held, let out, and given a secret that it never sees")]
struct Args {
    /// What runs the guest.
    #[arg(long, value_enum, default_value_t = Driver::Qemu)]
    driver: Driver,
    /// The `tapgate` binary; the one beside this program if not given.
    #[arg(long)]
    tapgate: Option<PathBuf>,
    /// Where base images are.
    #[arg(long, default_value = "/var/cache/tapgate/images")]
    images: PathBuf,
    /// Leave the world standing at the end, until Enter is pressed.
    #[arg(long)]
    stay: bool,
}

#[derive(Clone, Copy, ValueEnum)]
enum Driver {
    Netns,
    Qemu,
}

fn main() -> ExitCode {
    let args = Args::parse();
    let driver = match args.driver {
        Driver::Netns => daemon::Driver::Netns,
        Driver::Qemu => daemon::Driver::Qemu,
    };
    let binary = args.tapgate.map_or_else(daemon::binary, Ok);
    let run = |binary| demo::run(Settings { binary, driver, images: args.images }, args.stay);
    match binary.and_then(run) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
