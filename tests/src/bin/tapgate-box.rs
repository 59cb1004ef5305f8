//! A KVM host in a box, by hand: boots a fresh Debian host under emulation, whose `/dev/kvm` works, runs a script in it, and
//! is gone. For trying what this machine cannot: KVM, another kernel, systemd.
#![forbid(unsafe_code)]

use anyhow::{Context as _, Result};
use clap::{Parser, ValueEnum};
use std::{path::PathBuf, process::ExitCode};
use tapgate_e2e::kvm_box::{Kernel, KvmBox};

#[derive(Parser)]
#[command(about = "Boot a Debian host with working KVM under emulation and run a script in it")]
struct Args {
    /// Its kernel.
    #[arg(long, value_enum, default_value_t = Version::V6_1)]
    kernel: Version,
    /// A file or folder that it finds in /share, under its own name or the one behind the colon.
    #[arg(long, value_name = "PATH[:NAME]")]
    share: Vec<String>,
    /// The script; without one it stays until Enter is pressed, and says how to log in.
    script: Vec<String>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Version {
    #[value(name = "6.1")]
    V6_1,
    #[value(name = "6.12")]
    V6_12,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    let mut shared = Vec::new();
    for given in &args.share {
        let (path, name) = match given.split_once(':') {
            Some((path, name)) => (PathBuf::from(path), name.to_owned()),
            None => {
                let path = PathBuf::from(given);
                let name = path.file_name().context("--share needs a file or folder with a name")?;
                let name = name.to_string_lossy().into_owned();
                (path, name)
            }
        };
        shared.push((path, name));
    }
    let shared: Vec<_> = shared.iter().map(|(path, name)| (path.as_path(), name.as_str())).collect();
    let kernel = match args.kernel {
        Version::V6_1 => Kernel::V6_1,
        Version::V6_12 => Kernel::V6_12,
    };
    let host = KvmBox::boot(kernel, &shared)?;
    if args.script.is_empty() {
        println!("{}\nPress Enter to end it.", host.how_to_log_in());
        std::io::stdin().read_line(&mut String::new())?;
        return Ok(ExitCode::SUCCESS);
    }
    let done = host.sh(&args.script.join(" "))?;
    print!("{}", done.out);
    eprint!("{}", done.err);
    Ok(ExitCode::from(u8::try_from(done.code).unwrap_or(1)))
}
