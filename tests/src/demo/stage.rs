//! What the steps share: the world, the daemon, the account's client, the VM and the way into it.

use crate::{
    World,
    api::Client,
    daemon::{Daemon, Driver},
    sh::Done,
    ssh::{self, Guest},
};
use anyhow::{Context as _, Result};
use serde_json::json;

/// The stage.
pub struct Stage<'world> {
    world: &'world World,
    daemon: Daemon<'world>,
    api: Client<'world>,
    guest: Option<(String, Guest<'world>)>,
    /// Values that must be seen nowhere but at the servers they are for.
    pub secrets: Vec<String>,
}

impl<'world> Stage<'world> {
    /// Signs an account up.
    pub fn new(world: &'world World, daemon: Daemon<'world>) -> Result<Self> {
        let api = daemon.client().sign_up("ada")?;
        Ok(Self { world, daemon, api, guest: None, secrets: Vec::new() })
    }

    /// The world.
    pub fn world(&self) -> &'world World {
        self.world
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon<'world> {
        &self.daemon
    }

    /// The daemon, to be killed.
    pub fn daemon_mut(&mut self) -> &mut Daemon<'world> {
        &mut self.daemon
    }

    /// The account's client.
    pub fn api(&self) -> &Client<'world> {
        &self.api
    }

    /// A folder in the guest for what the steps leave there. The namespace driver's guests share the host's files, so
    /// theirs is in the world's own folder.
    pub fn scratch(&self) -> String {
        match self.daemon.driver() {
            Driver::Netns => self.world.folder().join("guest").display().to_string(),
            Driver::Qemu => "/root/demo".to_owned(),
        }
    }

    /// Where the guest keeps the world's authority, for requests that are not opened on the way.
    pub fn world_ca(&self) -> String {
        format!("{}/world-ca.pem", self.scratch())
    }

    /// Whether there is a guest.
    pub fn has_guest(&self) -> bool {
        self.guest.is_some()
    }

    /// The way into the guest.
    pub fn guest(&self) -> Result<&Guest<'world>> {
        Ok(&self.guest.as_ref().context("there is no guest")?.1)
    }

    /// The VM's id.
    pub fn vm(&self) -> Result<&str> {
        Ok(&self.guest.as_ref().context("there is no VM")?.0)
    }

    /// Asks the API for the way into this VM, now or after a restart.
    pub fn enter(&mut self, vm: String) -> Result<()> {
        let guest = Guest::of(self.world, &self.api, &vm)?;
        self.guest = Some((vm, guest));
        Ok(())
    }

    /// Creates a VM, waits until it is ready and puts the world's authority into it; the states that it went through.
    pub fn boot(&mut self, name: &str) -> Result<Vec<String>> {
        let key = ssh::key(self.world)?;
        let vm = self.api.create_vm(name, &key)?;
        let states = self.api.wait_ready(&vm)?;
        self.enter(vm)?;
        let ca = std::fs::read_to_string(self.world.ca_file())?;
        let (folder, file) = (self.scratch(), self.world_ca());
        self.guest()?.expect(&format!("mkdir -p {folder} && cat > {file} <<'END'\n{ca}END"))?;
        Ok(states)
    }

    /// Stops the VM and starts it again, by the API.
    pub fn restart(&mut self) -> Result<()> {
        let (vm, guest) = self.guest.take().context("there is no VM")?;
        guest.hang_up();
        self.api.post(&format!("/v1/vms/{vm}/stop"), &json!({}))?.expect(200).context("stopping the VM")?;
        self.api.wait_for(&vm, "stopped")?;
        self.api.post(&format!("/v1/vms/{vm}/start"), &json!({}))?.expect(200).context("starting the VM")?;
        self.api.wait_ready(&vm)?;
        self.enter(vm)
    }

    /// Runs a shell script in the guest.
    pub fn sh(&self, script: &str) -> Result<Done> {
        self.guest()?.sh(script)
    }

    /// Stops and destroys the VM by the API.
    pub fn clear(&mut self) -> Result<()> {
        let Some((vm, guest)) = self.guest.take() else { return Ok(()) };
        guest.hang_up();
        self.api.post(&format!("/v1/vms/{vm}/stop"), &json!({}))?.expect(200).context("stopping")?;
        self.api.wait_for(&vm, "stopped")?;
        self.api.delete(&format!("/v1/vms/{vm}"))?.expect(204).context("destroying the VM")?;
        Ok(())
    }
}
