//! Puts the BPF object where the crate embeds it from: a ready one (`TAPGATE_BPF_OBJECT`), or one built here.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::ExitCode,
};
use tapgate_ebpf_build::{Toolchain, sources};

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed=TAPGATE_BPF_OBJECT");
    let Some(out) = env::var_os("OUT_DIR").map(PathBuf::from) else {
        println!("cargo::error=OUT_DIR is not set; this is a build script of cargo");
        return ExitCode::FAILURE;
    };
    match object(&out).and_then(|object| {
        fs::copy(&object, out.join("tapgate.o")).map_err(|error| format!("{}: {error}", object.display()))
    }) {
        Ok(_) => ExitCode::SUCCESS,
        Err(text) => {
            for line in text.lines() {
                println!("cargo::error={line}");
            }
            ExitCode::FAILURE
        }
    }
}

fn object(out: &Path) -> Result<PathBuf, String> {
    if let Some(ready) = env::var_os("TAPGATE_BPF_OBJECT").filter(|path| !path.is_empty()) {
        println!("cargo::rerun-if-changed={}", Path::new(&ready).display());
        return Ok(ready.into());
    }
    let ebpf = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    for source in sources(&ebpf) {
        println!("cargo::rerun-if-changed={}", source.display());
    }
    let log = env::var_os("CARGO_FEATURE_BPF_LOG").is_some();
    let toolchain = Toolchain::find().map_err(|error| error.to_string())?;
    toolchain.build(&ebpf.join("programs"), &out.join("bpf"), log).map_err(|error| error.to_string())
}
