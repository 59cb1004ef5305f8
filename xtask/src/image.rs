//! `image`: the base image, by the binary's own builder, which is also what an operator uses.

use crate::{
    build,
    run::{as_root, run},
};
use anyhow::Result;
use std::path::{Path, PathBuf};

/// Where images are, for the demo and for a daemon on this machine alike.
pub fn cache() -> PathBuf {
    std::env::var_os("TAPGATE_IMAGE_DIR").map_or_else(|| "/var/cache/tapgate/images".into(), PathBuf::from)
}

/// Builds the base image unless it is cached.
pub fn command(release: bool) -> Result<()> {
    build(&build::binary(release)?)
}

/// Has the binary build the base image unless it is cached.
pub fn build(tapgate: &Path) -> Result<()> {
    run(as_root(tapgate).args(["image", "build", "--image-dir"]).arg(cache()))
}
