//! `fuzz`: the fuzz targets under libFuzzer, guided by coverage. Built by the ordinary toolchain with what cargo-fuzz passes
//! to the compiler, but without a sanitizer, which that toolchain does not have. Begins with the committed seeds, which it
//! never changes; what it finds besides stays in the target folder for the next run.

use crate::{
    run::{announce, cargo, output, program, root, run, shown, target},
    tally::Tally,
};
use anyhow::{Context as _, Result, ensure};
use clap::Args;
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Where the targets are.
const FOLDER: &str = "userspace-proxy/fuzz";
/// How long each is run as a part of every test run.
const SHORT: u64 = 5;
/// Edges, comparisons and the depth of the stack, as libFuzzer wants to be told of them.
const INSTRUMENTS: &[&str] = &[
    "--cfg=fuzzing",
    "-Cpasses=sancov-module",
    "-Cllvm-args=-sanitizer-coverage-level=4",
    "-Cllvm-args=-sanitizer-coverage-inline-8bit-counters",
    "-Cllvm-args=-sanitizer-coverage-pc-table",
    "-Cllvm-args=-sanitizer-coverage-trace-compares",
    "-Cdebug-assertions=yes",
    "-Coverflow-checks=yes",
];
/// Longer inputs say nothing that these do not.
const LONGEST: usize = 4096;

/// What is run.
#[derive(Args)]
pub struct Options {
    /// One target; all of them if not given.
    target: Option<String>,
    /// How long each is run.
    #[arg(long, default_value_t = 300)]
    seconds: u64,
}

/// Runs one target or all.
pub fn command(options: &Options) -> Result<()> {
    let mut wanted = targets()?;
    if let Some(name) = &options.target {
        ensure!(wanted.contains(name), "there is no target `{name}`, only {}", wanted.join(", "));
        wanted.retain(|target| target == name);
    }
    fuzz(&wanted, options.seconds)?.conclude()
}

/// Runs all of them for a moment; what cannot even be built is one that failed.
pub fn short() -> Tally {
    targets().and_then(|targets| fuzz(&targets, SHORT)).unwrap_or_else(|error| {
        eprintln!("error: fuzz targets: {error:#}");
        Tally { passed: 0, failed: 1 }
    })
}

/// The targets' names: one file each.
fn targets() -> Result<Vec<String>> {
    let folder = root().join(FOLDER).join("fuzz_targets");
    let entries = fs::read_dir(&folder).with_context(|| format!("{} cannot be read", folder.display()))?;
    let name = |entry: fs::DirEntry| Some(entry.path().file_stem()?.to_str()?.to_owned());
    let mut names: Vec<String> = entries.filter_map(|entry| name(entry.ok()?)).collect();
    names.sort();
    ensure!(!names.is_empty(), "there are no targets in {}", folder.display());
    Ok(names)
}

fn fuzz(targets: &[String], seconds: u64) -> Result<Tally> {
    let programs = build()?;
    let mut tally = Tally::default();
    for name in targets {
        match one(&programs, name, seconds) {
            Ok(()) => tally.passed += 1,
            Err(error) => {
                eprintln!("error: fuzz target {name}: {error:#}");
                tally.failed += 1;
            }
        }
    }
    Ok(tally)
}

/// Builds all targets; the folder that they are in. With a triple named, what runs while building is not instrumented.
fn build() -> Result<PathBuf> {
    let compiler = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let about = output(program(compiler).arg("-vV")).context("rustc does not say what it is")?;
    let triple = about.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    let folder = target().join("fuzz");
    let mut build = cargo();
    build.args(["build", "--locked", "--bins", "--target", triple, "--manifest-path"]);
    build.arg(root().join(FOLDER).join("Cargo.toml")).arg("--target-dir").arg(&folder);
    build.env("CARGO_ENCODED_RUSTFLAGS", INSTRUMENTS.join("\u{1f}"));
    run(&mut build)?;
    Ok(folder.join(triple).join("debug"))
}

fn one(programs: &Path, name: &str, seconds: u64) -> Result<()> {
    let kept = target().join("fuzz");
    let (corpus, crashes) = (kept.join("corpus").join(name), kept.join("crashes").join(name));
    for folder in [&corpus, &crashes] {
        fs::create_dir_all(folder).with_context(|| format!("{} cannot be made", folder.display()))?;
    }
    let mut command = Command::new(programs.join(name));
    command.current_dir(root()).arg(&corpus).arg(root().join(FOLDER).join("seeds").join(name));
    command.arg(format!("-max_total_time={seconds}")).arg(format!("-artifact_prefix={}/", crashes.display()));
    command.args([
        "-timeout=20",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
        "-verbosity=0",
        "-print_funcs=0",
    ]);
    command.arg(format!("-max_len={LONGEST}")).stdin(Stdio::null()).env("RUST_BACKTRACE", "0");
    announce(&command);
    let before = files(&crashes);
    let status = command.status().with_context(|| format!("`{}` could not be started", shown(&command)))?;
    for crash in files(&crashes).iter().filter(|file| !before.contains(file)) {
        let bytes = fs::read(crash).unwrap_or_default();
        eprintln!("fuzz target {name} does not hold for \"{}\" ({})", bytes.escape_ascii(), crash.display());
    }
    ensure!(status.success(), "it ended with {status}");
    println!("fuzz target {name}: held for {seconds} s");
    Ok(())
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}
