//! `test`: every test of the workspace, the documentation's examples, the fuzz targets for a moment each, and the demo's
//! steps; one count at the end.

use crate::{
    build, demo, fuzz,
    run::{announce, cargo, run, shown},
    setup,
    tally::Tally,
};
use anyhow::{Context as _, Result, ensure};
use clap::Args;
use std::{
    io::{BufRead as _, BufReader, Read},
    process::{Command, Stdio},
    thread,
};

/// Tests that boot a real VM have this in their name.
const REAL_VM: &str = "real_vm";

/// Tests with a long form run it where this is set.
const LONG: &str = "TAPGATE_LONG";

/// What is run.
#[derive(Args)]
pub struct Options {
    /// Leave out whatever boots a real VM; the demo's steps then run with the namespace driver.
    #[arg(long)]
    fast: bool,
    /// The long forms of campaigns too: whole hosts, kill rounds, faults. Takes hours.
    #[arg(long, conflicts_with = "fast")]
    long: bool,
}

/// Runs everything.
pub fn command(options: &Options) -> Result<()> {
    ensure!(
        setup::Machine::probe().root,
        "the tests make network namespaces and load BPF programs, which needs root: \
         sudo -E env PATH=\"$PATH\" cargo xtask test"
    );
    let mut tally = Tally::default();
    let driver = if options.fast { demo::Driver::Netns } else { demo::Driver::Qemu };
    let mut steps = demo::prepare(&demo::Options { driver, release: false, stay: false })?;
    run(cargo().args(["build", "--workspace", "--all-targets"]))?;
    tally.add(rust(&["--workspace"], options.fast, options.long)?);
    tally.add(counted(cargo().args(["test", "--workspace", "--doc"]))?);
    tally.add(fuzz::short());
    tally.add(counted(&mut steps)?);
    tally.conclude()
}

/// Runs the tests of the packages that the arguments choose: by nextest where it is, which gives each test a process
/// of its own, else by cargo.
pub fn rust(packages: &[&str], fast: bool, long: bool) -> Result<Tally> {
    let mut command = cargo();
    if setup::tool("cargo-nextest").is_some() {
        command.args(["nextest", "run", "--no-fail-fast", "--no-tests=warn"]).args(packages);
        if fast {
            command.args(["-E", &format!("not test(/{REAL_VM}/)")]);
        }
    } else {
        command.args(["test", "--no-fail-fast", "--lib", "--bins", "--tests"]).args(packages);
        command.args(["--", "--test-threads=1"]);
        if fast {
            command.args(["--skip", REAL_VM]);
        }
    }
    let binary = build::folder(false).join("tapgate");
    if binary.exists() {
        command.env("TAPGATE_BIN", binary);
    }
    if long {
        command.env(LONG, "1");
    }
    counted(&mut command)
}

/// Runs the command, shows what it prints while it prints it, and counts.
fn counted(command: &mut Command) -> Result<Tally> {
    announce(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("`{}` could not be started", shown(command)))?;
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let errors = thread::spawn(move || stderr.map(|pipe| pass_on(pipe, std::io::stderr())));
    let mut text = stdout.map(|pipe| pass_on(pipe, std::io::stdout())).unwrap_or_default();
    text.push_str(&errors.join().ok().flatten().unwrap_or_default());
    let status = child.wait()?;
    Ok(Tally::of_run(&text, status.success()))
}

fn pass_on(from: impl Read, mut to: impl std::io::Write) -> String {
    let mut text = String::new();
    for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
        let line = String::from_utf8_lossy(&line);
        let _ = writeln!(to, "{line}");
        text.push_str(&line);
        text.push('\n');
    }
    text
}
