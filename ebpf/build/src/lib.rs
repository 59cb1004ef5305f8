//! Finds a toolchain for the BPF programs and builds them: for `ebpf/datapath/build.rs` and for `cargo xtask`.
//!
//! Two kinds of toolchain will do: a nightly of rustup with `rust-src`, or the distribution's cargo with the source of
//! its `core`. Must never install anything; what is missing it names, with the command that brings it.
#![forbid(unsafe_code)]

use std::{
    env,
    ffi::OsString,
    path::{Path, PathBuf},
    process::Command,
};

/// The target of the programs.
const TARGET: &str = "bpfel-unknown-none";
/// Version of `bpf-linker` that is known to work.
const LINKER_VERSION: &str = "0.13.0";
/// Where `cargo xtask setup` puts what no package brings.
const TOOLS: &str = "/usr/local/tapgate-tools/bin";
/// Most of the compiler's complaint that is kept for the error.
const MAX_COMPLAINT: usize = 4000;

/// Why the programs could not be built.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// No toolchain that can build `core` for the BPF target.
    #[error(
        "no Rust toolchain with the source of `core` was found. On Debian 12 run:\n    \
         apt-get install rustc-web rust-web-src cargo-web\n\
         or with rustup:\n    rustup toolchain install nightly --component rust-src"
    )]
    NoToolchain,
    /// No linker for BPF.
    #[error(
        "`bpf-linker` was not found. With Debian's toolchain run:\n    apt-get install llvm-22-dev && \
         LLVM_PREFIX=/usr/lib/llvm-22 cargo install bpf-linker --version {LINKER_VERSION} --no-default-features \
         --features llvm-22\nwith rustup's:\n    cargo install bpf-linker --version {LINKER_VERSION}"
    )]
    NoLinker,
    /// The compiler could not be started.
    #[error("cannot run {0}")]
    Run(PathBuf, #[source] std::io::Error),
    /// The programs do not compile.
    #[error("the BPF programs do not build:\n{0}")]
    Compile(String),
    /// The build went through and left no object.
    #[error("the build of the BPF programs left no object at {0}")]
    NoObject(PathBuf),
}

/// A toolchain that builds the programs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Toolchain {
    cargo: PathBuf,
    rustc: PathBuf,
    linker: PathBuf,
    /// Whether unstable options have to be allowed to a stable compiler.
    bootstrap: bool,
}

impl Toolchain {
    /// Looks for one: the distribution's first, then rustup's nightlies.
    pub fn find() -> Result<Self, BuildError> {
        let (cargo, rustc, bootstrap) = distribution().or_else(rustup).ok_or(BuildError::NoToolchain)?;
        let linker = linker().ok_or(BuildError::NoLinker)?;
        Ok(Self { cargo, rustc, linker, bootstrap })
    }

    /// What was found, in one line.
    pub fn describe(&self) -> String {
        format!("{} with {}", self.rustc.display(), self.linker.display())
    }

    /// Builds the programs of the folder `programs` below `target`; answers the object's path. `log` builds them with
    /// human-readable logs.
    pub fn build(&self, programs: &Path, target: &Path, log: bool) -> Result<PathBuf, BuildError> {
        let mut command = Command::new(&self.cargo);
        // Nothing of the build that this one may run inside of: neither its compiler nor its flags nor its wrappers.
        for (name, _) in env::vars_os() {
            let name_text = name.to_string_lossy();
            let foreign = name_text.starts_with("CARGO") && name_text != "CARGO_HOME"
                || name_text.starts_with("RUSTC")
                || matches!(
                    &*name_text,
                    "RUSTFLAGS" | "RUSTDOCFLAGS" | "RUSTUP_TOOLCHAIN" | "TARGET" | "HOST"
                );
            if foreign {
                command.env_remove(name);
            }
        }
        let architecture = env::consts::ARCH;
        let flags =
            [&format!("--cfg=bpf_target_arch=\"{architecture}\""), "-Cdebuginfo=2", "-Clink-arg=--btf"]
                .join("\x1f");
        command
            .current_dir(programs)
            .env("RUSTC", &self.rustc)
            .env("CARGO_ENCODED_RUSTFLAGS", flags)
            .env("PATH", self.search_path())
            .args([
                "build",
                "--release",
                "--locked",
                "--target",
                TARGET,
                "-Z",
                "build-std=core",
                "--target-dir",
            ])
            .arg(target);
        if self.bootstrap {
            command.env("RUSTC_BOOTSTRAP", "1");
        }
        if log {
            command.args(["--features", "log"]);
        }
        let output = command.output().map_err(|error| BuildError::Run(self.cargo.clone(), error))?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let from = text.char_indices().rev().nth(MAX_COMPLAINT).map_or(0, |(at, _)| at);
            return Err(BuildError::Compile(text[from..].to_owned()));
        }
        let object = target.join(TARGET).join("release/tapgate");
        if object.is_file() { Ok(object) } else { Err(BuildError::NoObject(object)) }
    }

    /// The linker's folder in front of everything else: rustc finds it by name.
    fn search_path(&self) -> OsString {
        let mut path = self.linker.parent().map(Path::as_os_str).unwrap_or_default().to_owned();
        if let Some(rest) = env::var_os("PATH") {
            path.push(":");
            path.push(rest);
        }
        path
    }
}

/// Files that the object depends on: for `cargo:rerun-if-changed`.
pub fn sources(ebpf: &Path) -> Vec<PathBuf> {
    ["programs/src", "programs/Cargo.toml", "programs/Cargo.lock", "common/src", "common/Cargo.toml"]
        .iter()
        .map(|name| ebpf.join(name))
        .collect()
}

fn distribution() -> Option<(PathBuf, PathBuf, bool)> {
    let (cargo, rustc) = (PathBuf::from("/usr/bin/cargo"), PathBuf::from("/usr/bin/rustc"));
    (cargo.is_file() && has_source(&rustc)).then_some((cargo, rustc, true))
}

fn rustup() -> Option<(PathBuf, PathBuf, bool)> {
    let output = Command::new("rustup").args(["toolchain", "list"]).output().ok()?;
    let list = String::from_utf8(output.stdout).ok()?;
    list.lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.contains("nightly"))
        .find_map(|name| {
            let which = |tool: &str| {
                let output =
                    Command::new("rustup").args(["which", "--toolchain", name, tool]).output().ok()?;
                let path = PathBuf::from(String::from_utf8(output.stdout).ok()?.trim());
                path.is_file().then_some(path)
            };
            let (cargo, rustc) = (which("cargo")?, which("rustc")?);
            has_source(&rustc).then_some((cargo, rustc, false))
        })
}

fn has_source(rustc: &Path) -> bool {
    let Ok(output) = Command::new(rustc).env_remove("RUSTUP_TOOLCHAIN").args(["--print", "sysroot"]).output()
    else {
        return false;
    };
    let root = String::from_utf8_lossy(&output.stdout);
    Path::new(root.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").is_file()
}

fn linker() -> Option<PathBuf> {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| Some(PathBuf::from(env::var_os("HOME")?).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = env::split_paths(&path).collect();
    folders.extend(home.map(|home| home.join("bin")));
    folders.push(TOOLS.into());
    folders.into_iter().map(|folder| folder.join("bpf-linker")).find(|file| file.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_is_named_with_a_command() {
        assert!(BuildError::NoToolchain.to_string().contains("apt-get install rustc-web"));
        assert!(BuildError::NoLinker.to_string().contains("cargo install bpf-linker --version 0.13.0"));
    }
}
