//! Commands in a guest by SSH, from out in the internet, as the API says how to get in.

use crate::{
    World,
    api::Client,
    sh::{Done, capture, expect, run},
};
use anyhow::{Context as _, Result};
use std::{path::PathBuf, process::Command};

/// Makes a key in the world's folder; its public half.
pub fn key(world: &World) -> Result<String> {
    let file = key_file(world);
    if !file.exists() {
        let name = file.to_string_lossy().into_owned();
        run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", "world", "-f", &name])?;
    }
    let text = std::fs::read_to_string(file.with_extension("pub"))?;
    Ok(text.trim().to_owned())
}

fn key_file(world: &World) -> PathBuf {
    world.folder().join("id_ed25519")
}

/// A way into one guest. Keeps one connection for all commands, because a guest without KVM is slow at new ones.
#[derive(Clone)]
pub struct Guest<'world> {
    world: &'world World,
    host: String,
    port: String,
    user: String,
}

impl<'world> Guest<'world> {
    /// Asks the API how to get in.
    pub fn of(world: &'world World, api: &Client<'_>, vm: &str) -> Result<Self> {
        let info = api.get(&format!("/v1/vms/{vm}/ssh"))?.expect(200)?;
        let host = info["host"].as_str().context("no host to reach the guest at")?.to_owned();
        let port = info["port"].as_u64().context("no port to reach the guest at")?.to_string();
        let user = info["username"].as_str().context("no user name for the guest")?.to_owned();
        Ok(Self { world, host, port, user })
    }

    /// Runs a shell script in the guest.
    pub fn sh(&self, script: &str) -> Result<Done> {
        capture(self.ssh().args(["--", script]), b"")
    }

    /// Runs a shell script in the guest; what it printed, or an error.
    pub fn expect(&self, script: &str) -> Result<String> {
        Ok(expect(self.ssh().args(["--", script]), b"")?.trim().to_owned())
    }

    /// Forgets the kept connection, which does not survive the daemon that forwards it.
    pub fn hang_up(&self) {
        let _ = capture(self.ssh().args(["-O", "exit"]), b"");
    }

    fn ssh(&self) -> Command {
        let mut command = self.world.from_afar("ssh");
        let control = self.world.folder().join("ssh-%C");
        command.args(["-F", "/dev/null", "-p", &self.port, "-l", &self.user, "-i"]).arg(key_file(self.world));
        for option in [
            "BatchMode=yes",
            "ConnectTimeout=60",
            "ControlMaster=auto",
            "ControlPersist=600",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
            "ServerAliveInterval=5",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
            &format!("ControlPath={}", control.display()),
        ] {
            command.args(["-o", option]);
        }
        command.arg(&self.host);
        command
    }
}
