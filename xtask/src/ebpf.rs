//! `build-ebpf` and `test-ebpf`: the BPF programs with the crate that embeds and loads them.

use crate::{
    run::{cargo, run},
    tally::Tally,
    test,
};
use anyhow::Result;

/// The crate whose build compiles the programs.
const PACKAGE: &str = "tapgate-datapath";

/// Builds the programs and embeds them.
pub fn build() -> Result<()> {
    run(cargo().args(["build", "--package", PACKAGE]))
}

/// Runs the datapath's own tests.
pub fn test() -> Result<()> {
    let mut tally = Tally::default();
    tally.add(test::rust(&["--package", PACKAGE, "--package", "tapgate-ebpf-common"], false, false)?);
    tally.conclude()?;
    // What the verifier had to walk through, for people.
    let shown = ["--exact", "--nocapture", "the_verifier_accepts_both_programs_with_room_to_spare"];
    run(cargo().args(["test", "--quiet", "--package", PACKAGE, "--test", "matrix", "--"]).args(shown))
}
