//! `demo`: builds what the demo needs and runs it. The steps are `tapgate-e2e`'s, shared with the tests.

use crate::{
    build, image,
    run::{announce, as_root, cargo, run},
    setup,
};
use anyhow::{Context as _, Result};
use clap::{Args, ValueEnum};
use std::process::Command;

/// How the demo is run.
#[derive(Args)]
pub struct Options {
    /// What runs the guest.
    #[arg(long, value_enum, default_value_t = Driver::Qemu)]
    pub driver: Driver,
    /// Use release builds.
    #[arg(long)]
    pub release: bool,
    /// Leave the world standing at the end, until Enter is pressed.
    #[arg(long)]
    pub stay: bool,
}

/// What runs the guest.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Driver {
    /// A real VM.
    Qemu,
    /// A network namespace instead of a VM: faster, and without the steps that need a VM.
    Netns,
}

/// Sets up, builds and runs the demo.
pub fn command(options: &Options) -> Result<()> {
    setup::command(false, false)?;
    let mut demo = prepare(options)?;
    announce(&demo);
    if options.stay {
        demo.arg("--stay");
    }
    let status = demo.status().context("the demo could not be started")?;
    anyhow::ensure!(status.success(), "a step of the demo did not show what it must show");
    Ok(())
}

/// Builds what the demo runs; the command that runs it.
pub fn prepare(options: &Options) -> Result<Command> {
    let tapgate = build::binary(options.release)?;
    run(build::with_profile(cargo().args(["build", "--package", "tapgate-e2e", "--bins"]), options.release))?;
    let driver = match options.driver {
        Driver::Netns => "netns",
        Driver::Qemu => "qemu",
    };
    if options.driver == Driver::Qemu {
        image::build(&tapgate)?;
    }
    let mut demo = as_root(build::folder(options.release).join("tapgate-demo"));
    demo.args(["--driver", driver, "--tapgate"]).arg(tapgate).arg("--images").arg(image::cache());
    Ok(demo)
}
