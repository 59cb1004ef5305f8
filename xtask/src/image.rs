//! `image`: the base image, by the binary's own builder, which is also what an operator uses.

use crate::{
    build,
    run::{program, run, target},
};
use anyhow::Result;
use std::path::PathBuf;

/// Where images are cached between runs.
pub fn cache() -> PathBuf {
    target().join("images")
}

/// Builds the base image unless it is cached.
pub fn command(release: bool) -> Result<()> {
    let tapgate = build::binary(release)?;
    run(program(tapgate).args(["image", "build", "--dir"]).arg(cache()))
}
