//! The guest agent: one small static binary inside the base image, in several roles.
//!
//! - `init`: the initramfs' PID 1. Loads the virtio modules, mounts the root disk, applies the seed, becomes systemd.
//! - `apply`: reads the NoCloud seed and applies it; what `init` does, for images with an initramfs of their own.
//! - `serve`: stays. Answers the power button, takes changes of the seed from the guest service, and does an agent's task.
//!   `harness` and `git-credential` are what it has tmux and git call.
//!
//! Everything it reads is data: nothing from a seed ever reaches a shell or a format that it was not quoted for.
#![deny(unsafe_code)]

mod agent;
mod apply;
mod become_another;
mod channel;
mod files;
mod http;
mod identity;
mod init;
mod net;
mod power;
mod seed;
mod service;
mod trust;

use std::process::ExitCode;

fn main() -> ExitCode {
    let role = std::env::args().nth(1);
    // As the initramfs' /init the kernel passes its own command line's leftovers as arguments.
    if std::process::id() == 1 {
        return init::run();
    }
    let result = match role.as_deref() {
        Some("apply") => apply::run(),
        Some("serve") => service::run(),
        Some("harness") => agent::harness::run(std::env::args().nth(2).as_deref()),
        Some("git-credential") => agent::credential::run(std::env::args().nth(2).as_deref()),
        _ => {
            eprintln!("usage: tapgate-guest-agent apply|serve");
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("tapgate-guest-agent: {error}");
            ExitCode::FAILURE
        }
    }
}
