//! The processes that a world needs besides the one that made it: its servers, and the one that cleans up after it.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use std::path::PathBuf;
use tapgate_e2e::{net::Names, reaper, server};

#[derive(Parser)]
#[command(about = "Parts of the closed test world; started by tests and the demo")]
struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// Serve until standard input ends.
    Serve {
        /// The world's folder.
        #[arg(long)]
        folder: PathBuf,
    },
    /// Wait until standard input ends, then clean up.
    Reap {
        /// What the names of the world's namespaces begin with.
        #[arg(long)]
        world: String,
        /// The world's folder.
        #[arg(long)]
        folder: PathBuf,
    },
}

fn main() -> anyhow::Result<()> {
    match Args::parse().part {
        Part::Serve { folder } => server::serve(&folder),
        Part::Reap { world, folder } => {
            reaper::wait_and_reap(&Names { world }, &folder);
            Ok(())
        }
    }
}
