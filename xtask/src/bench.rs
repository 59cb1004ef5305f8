//! `bench`: measures a part against the bars of the design and keeps the table in `docs/bench/`. Each part brings its own
//! program, the example `bench` of its crate, which prints Markdown; this only builds it, runs it and files what it says.

use crate::{
    build,
    run::{announce, as_root, cargo, output, program, root, run},
    setup,
};
use anyhow::{Context as _, Result, ensure};
use clap::{Args, ValueEnum};
use std::{fs, process::Stdio};

/// What is measured, and how thoroughly.
#[derive(Args)]
pub struct Options {
    /// The part.
    #[arg(value_enum)]
    part: Part,
    /// The whole measurement; without it a shorter one that shows that everything still runs.
    #[arg(long)]
    long: bool,
    /// Print the table and leave `docs/bench/` as it is.
    #[arg(long)]
    print: bool,
}

/// The parts that have bars.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Part {
    /// REST API and store.
    Api,
    /// BPF programs, forwarding, rule changes.
    Datapath,
    /// Splicing and interception, beside other proxies.
    Proxy,
    /// Creation, snapshots, restoring, memory.
    Vm,
}

impl Part {
    const fn name(self) -> &'static str {
        match self {
            Self::Api => "api",
            Self::Datapath => "datapath",
            Self::Proxy => "proxy",
            Self::Vm => "vm",
        }
    }

    /// The package whose example `bench` measures it.
    const fn package(self) -> &'static str {
        match self {
            Self::Api => "tapgate",
            Self::Datapath => "tapgate-datapath",
            Self::Proxy => "tapgate-proxy",
            Self::Vm => "tapgate-e2e",
        }
    }
}

/// Builds, measures, and keeps the table.
pub fn command(options: &Options) -> Result<()> {
    setup::command(false, false)?;
    let part = options.part;
    // Those that run a daemon look for it beside themselves.
    let tapgate = build::binary(true)?;
    let target = format!("bench-{}", part.name());
    run(cargo().args(["build", "--release", "--package", part.package(), "--example", &target, "--bins"]))?;
    let mut bench = as_root(build::folder(true).join("examples").join(&target));
    bench.env("TAPGATE_BIN", tapgate).stdout(Stdio::piped());
    if part == Part::Proxy {
        bench.env("BENCH_MITMDUMP", setup::peers()?.join("mitmdump"));
    }
    if options.long {
        bench.arg("--long");
    }
    announce(&bench);
    let out = bench.spawn().and_then(|child| child.wait_with_output()).context("it could not be started")?;
    ensure!(out.status.success(), "the measurement failed ({}); what it printed says why", out.status);
    let table =
        String::from_utf8(out.stdout).context("the measurement printed something that is not text")?;
    print!("{table}");
    if options.print {
        return Ok(());
    }
    let file = root().join("docs/bench").join(format!("{}.md", part.name()));
    fs::create_dir_all(root().join("docs/bench"))?;
    fs::write(&file, page(options, &table))
        .with_context(|| format!("{} cannot be written", file.display()))?;
    eprintln!("kept in {}", file.display());
    Ok(())
}

/// The table with what one has to know of the machine to read it.
fn page(options: &Options, table: &str) -> String {
    let part = options.part.name();
    let long = if options.long { " --long" } else { "" };
    let line =
        |name: &str, args: &[&str]| output(program(name).args(args)).unwrap_or_default().trim().to_owned();
    format!(
        "# Figures: {part}\n\nBy `cargo xtask bench {part}{long}` on {}, kernel {}, {} processors. They compare what ran side by side in one \
         run; as absolute figures they belong to that machine.\n\n{}\n",
        line("date", &["-u", "+%Y-%m-%d"]),
        line("uname", &["-r"]).split('-').next().unwrap_or_default(),
        line("nproc", &[]),
        table.trim_end()
    )
}
