//! Builds the guest agent as a static binary, so that the crate (and the one binary above it) carries it along.

use std::path::{Path, PathBuf};
use std::process::Command;

type AnyError = Box<dyn std::error::Error>;

fn main() -> Result<(), AnyError> {
    let manifest = PathBuf::from(std::env::var("CARGO_MANIFEST_DIR")?);
    let out = PathBuf::from(std::env::var("OUT_DIR")?);
    let target = std::env::var("TARGET")?;
    let agent = manifest.join("guest-agent");
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed={}", agent.join("src").display());
    println!("cargo::rerun-if-changed={}", agent.join("Cargo.toml").display());

    let built = build(&agent, &out.join("agent"), &target)?;
    std::fs::copy(built, out.join("guest-agent.bin"))?;
    Ok(())
}

fn build(agent: &Path, target_dir: &Path, target: &str) -> Result<PathBuf, AnyError> {
    let cargo = std::env::var("CARGO")?;
    let status = Command::new(cargo)
        .args(["build", "--quiet", "--release", "--target", target, "--target-dir"])
        .arg(target_dir)
        .arg("--manifest-path")
        .arg(agent.join("Cargo.toml"))
        // Static, so that it runs before the guest's file system is there; small, because it is in every initramfs.
        .env("CARGO_ENCODED_RUSTFLAGS", "-Ctarget-feature=+crt-static\x1f-Crelocation-model=static")
        .env("CARGO_PROFILE_RELEASE_OPT_LEVEL", "s")
        .env("CARGO_PROFILE_RELEASE_PANIC", "abort")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("CARGO_PROFILE_RELEASE_DEBUG", "none")
        .env("CARGO_PROFILE_RELEASE_LTO", "fat")
        .env("CARGO_PROFILE_RELEASE_CODEGEN_UNITS", "1")
        .env_remove("RUSTC_WORKSPACE_WRAPPER")
        .env_remove("RUSTFLAGS")
        .status()?;
    if !status.success() {
        return Err("the guest agent does not build; static linking needs the C library's static archive \
                    (Debian: apt-get install libc6-dev)"
            .into());
    }
    Ok(target_dir.join(target).join("release/tapgate-guest-agent"))
}
