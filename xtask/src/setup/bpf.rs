//! The BPF toolchain: whether a compiler with the sources of `core` is there, and the linker, built where missing.

use super::{Machine, tool, tool_root};
use crate::run::{cargo, find, is_executable, output, program, run, shown};
use anyhow::Result;
use std::path::Path;

/// The linker that fits the compiler's LLVM.
const LINKER: &str = "0.13.0";
const LLVM: &str = "/usr/lib/llvm-22";

/// Whether some compiler can build `core` for the BPF target: Debian's, or a rustup nightly with `rust-src`.
pub fn compiler_is_there() -> bool {
    debian() || nightly()
}

fn debian() -> bool {
    let rustc = Path::new("/usr/bin/rustc");
    is_executable(rustc) && is_executable(Path::new("/usr/bin/cargo")) && has_core(program(rustc))
}

fn nightly() -> bool {
    let mut rustc = program("rustup");
    rustc.args(["run", "nightly", "rustc"]).env("RUSTUP_AUTO_INSTALL", "0");
    find("rustup").is_some() && has_core(rustc)
}

/// Whether the compiler's sysroot holds the source of `core`.
fn has_core(mut rustc: std::process::Command) -> bool {
    output(rustc.args(["--print", "sysroot"])).is_some_and(|sysroot| {
        Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core/src/lib.rs").exists()
    })
}

/// Builds `bpf-linker` unless it is there; what one has to do by hand, if anything.
pub fn linker(machine: &Machine, check: bool) -> Result<Option<String>> {
    if tool("bpf-linker").is_some() {
        return Ok(None);
    }
    let mut command = cargo();
    command.args(["install", "bpf-linker", "--version", LINKER, "--locked"]);
    command.args(["--no-default-features", "--features", "llvm-22"]);
    if let Some(root) = tool_root(machine) {
        command.args(["--root", root]);
    }
    command.env("LLVM_PREFIX", LLVM);
    if check || !Path::new(LLVM).join("bin/llvm-config").exists() {
        return Ok(Some(format!("{} (needs the package llvm-22-dev)", shown(&command))));
    }
    run(&mut command)?;
    Ok(None)
}
