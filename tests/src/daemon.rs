//! The daemon under test: configured, started on the world's host, killed the hard way, started again.

use crate::{World, api::Client, sh, sites};
use anyhow::{Context as _, Result, bail};
use std::{
    fs::{self, OpenOptions},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Stdio},
    thread,
    time::Duration,
};

/// Where it listens, on its own host.
const LISTEN: &str = "127.0.0.1:7070";
/// A harness that is a script of the repository; see [`crate::world`].
const HARNESS: &str =
    "[harness.scripted]\nargv = [\"/bin/bash\", \"./harness.sh\", \"{args}\", \"--\", \"{prompt}\"]\n";
/// How many times we ask whether it answers, ten times a second.
const TRIES: usize = 600;
/// Files from this size on are disks.
const LARGEST_STATE: u64 = 64 << 20;

/// What runs the guests.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// A namespace instead of a VM.
    Netns,
    /// A VM.
    Qemu,
}

impl Driver {
    /// The word of the configuration.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Netns => "netns",
            Self::Qemu => "qemu",
        }
    }
}

/// How a daemon is to be run.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The `tapgate` binary.
    pub binary: PathBuf,
    /// What runs the guests.
    pub driver: Driver,
    /// Where base images are.
    pub images: PathBuf,
}

/// Where the base images of all tests are.
const IMAGES: &str = "/var/cache/tapgate/images";

impl Settings {
    /// The daemon that was built, with the images of all tests.
    pub fn of(driver: Driver) -> Result<Self> {
        Ok(Self { binary: binary()?, driver, images: IMAGES.into() })
    }
}

/// A running daemon. Whatever is left of it when it is dropped, the world's reaper takes.
pub struct Daemon<'world> {
    world: &'world World,
    settings: Settings,
    environment: Vec<(String, String)>,
    child: Child,
}

impl<'world> Daemon<'world> {
    /// Writes the configuration and starts it.
    pub fn start(world: &'world World, settings: Settings) -> Result<Self> {
        Self::start_with(world, settings, "", &[])
    }

    /// The same with more lines of configuration, and variables for the daemon.
    pub fn start_with(
        world: &'world World,
        settings: Settings,
        lines: &str,
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        fs::write(config_file(world), format!("{}{lines}\n{HARNESS}", config(world, &settings)))?;
        let environment: Vec<(String, String)> =
            environment.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
        let child = spawn(world, &settings, &environment)?;
        let mut daemon = Self { world, settings, environment, child };
        daemon.wait_until_it_answers()?;
        Ok(daemon)
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The folder of a VM.
    pub fn vm_folder(&self, vm: &str) -> PathBuf {
        data_dir(self.world).join("vms").join(vm)
    }

    /// The process of a VM's VMM, as it was noted in the VM's folder.
    pub fn vmm(&self, vm: &str) -> Option<u32> {
        let note = fs::read(self.vm_folder(vm).join("vmm.json")).ok()?;
        let handle: serde_json::Value = serde_json::from_slice(&note).ok()?;
        handle["process"]["pid"].as_u64().and_then(|pid| u32::try_from(pid).ok())
    }

    /// The folder of its state.
    pub fn data_dir(&self) -> PathBuf {
        data_dir(self.world)
    }

    /// A client without a key.
    pub fn client(&self) -> Client<'world> {
        Client::new(self.world, format!("http://{LISTEN}"))
    }

    /// `kill -9`: it gets no chance to tidy up.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }

    /// Waits until it has ended by itself.
    pub fn wait_for_death(&mut self) -> Result<()> {
        for _ in 0..TRIES {
            if self.child.try_wait()?.is_some() {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        bail!("tapgate does not end")
    }

    /// Starts it again after [`Self::kill`].
    pub fn start_again(&mut self) -> Result<()> {
        self.child = spawn(self.world, &self.settings, &self.environment)?;
        self.wait_until_it_answers()
    }

    /// The same by another binary, and from then on.
    pub fn start_again_as(&mut self, binary: PathBuf) -> Result<()> {
        self.settings.binary = binary;
        self.start_again()
    }

    /// Everything that it logged.
    pub fn log(&self) -> String {
        fs::read_to_string(log_file(self.world)).unwrap_or_default()
    }

    /// What runs its guests.
    pub fn driver(&self) -> Driver {
        self.settings.driver
    }

    /// The files of its state, but for VMs' disks: for looking whether something stands there that must not.
    pub fn state_files(&self) -> Vec<PathBuf> {
        let mut folders = vec![data_dir(self.world)];
        let mut files = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let Ok(meta) = entry.metadata() else { continue };
                if meta.is_dir() {
                    folders.push(entry.path());
                } else if meta.is_file() && meta.len() < LARGEST_STATE {
                    files.push(entry.path());
                }
            }
        }
        files
    }

    fn wait_until_it_answers(&mut self) -> Result<()> {
        for _ in 0..TRIES {
            if let Some(status) = self.child.try_wait()? {
                bail!("tapgate ended ({status}) instead of serving:\n{}", tail(&self.log()));
            }
            if self.client().get("/healthz").is_ok_and(|reply| reply.status == 200) {
                return Ok(());
            }
            thread::sleep(Duration::from_millis(100));
        }
        bail!("tapgate does not answer at {LISTEN}:\n{}", tail(&self.log()))
    }
}

impl Drop for Daemon<'_> {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if thread::panicking() {
            eprintln!("The daemon's log ends with:\n{}", tail(&self.log()));
        }
    }
}

/// The binary to test: named by `TAPGATE_BIN`, else the one built beside us.
pub fn binary() -> Result<PathBuf> {
    match std::env::var_os("TAPGATE_BIN") {
        Some(path) => Ok(PathBuf::from(path)),
        None => sh::sibling("tapgate"),
    }
}

fn config(world: &World, settings: &Settings) -> String {
    let quoted = |path: &Path| format!("{:?}", path.display().to_string());
    format!(
        "data_dir = {}\nlisten = \"{LISTEN}\"\ndriver = \"{}\"\naccel = \"auto\"\npublic_host = \"{}\"\n\
         guest_v4 = \"10.214.0.0/16\"\nresolvers = [\"{}:53\"]\nssh_ports = \"22000-22999\"\n\
         instance = \"{}\"\nimage = \"debian-12\"\nimage_dir = {}\nlog = \"info\"\n",
        quoted(&data_dir(world)),
        settings.driver.word(),
        sites::HOST_V4,
        sites::DNS.v4,
        world.names().world,
        quoted(&settings.images),
    )
}

fn spawn(world: &World, settings: &Settings, environment: &[(String, String)]) -> Result<Child> {
    let log = OpenOptions::new().create(true).append(true).open(log_file(world))?;
    let mut command = world.on_host(&settings.binary);
    command.args(["serve", "--config"]).arg(config_file(world));
    // Its upstreams are verified against the world's authority, and nothing else.
    command.env("SSL_CERT_FILE", world.ca_file()).env_remove("SSL_CERT_DIR").env("NO_COLOR", "1");
    command.envs(environment.iter().map(|(name, value)| (name, value)));
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    command.spawn().with_context(|| format!("{} could not be started", settings.binary.display()))
}

fn config_file(world: &World) -> PathBuf {
    world.folder().join("tapgate.toml")
}

fn data_dir(world: &World) -> PathBuf {
    world.folder().join("data")
}

fn log_file(world: &World) -> PathBuf {
    world.folder().join("tapgate.log")
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(30)..].join("\n")
}
