//! A whole world: network, servers, counters, and the cleaning that goes with it. Make one, use it, drop it.

use crate::{
    counters::Counters,
    journal::Journal,
    net::{self, Names, inside},
    reaper::Reaper,
    server, sh,
};
use anyhow::{Context as _, Result, ensure};
use std::{
    fs,
    io::{BufRead as _, BufReader},
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
};

/// The token that the git server wants.
pub const GIT_TOKEN: &str = "ghp_9f2Yw7RealTokenOfTheWorld";

/// The branch of `project.git` that agents work on.
pub const AGENT_BRANCH: &str = "agents";

/// A harness as a script: notes its arguments, asks the "LLM", waits to be told to go on, edits, commits and pushes.
const HARNESS: &str = r#"set -eu
printf '%s\0' "$@" >> /root/argv
echo run >> /root/runs
curl -sS --fail --max-time 60 -H "Authorization: Bearer $LLM_API_KEY" --data-binary @/root/argv https://echo.example.com/echo > answer.json
echo "the model has answered"
while [ ! -e /root/go ]; do sleep 0.2; done
printf 'edited by the agent\n' >> README
git add README answer.json
git commit --quiet --message 'Done by the agent'
git push --quiet origin HEAD
echo "pushed"
"#;

/// A world. Its fields are dropped in order: the servers first, the reaper last.
pub struct World {
    names: Names,
    folder: PathBuf,
    servers: Child,
    _reaper: Reaper,
}

impl World {
    /// Makes a world; needs root.
    pub fn new() -> Result<Self> {
        let names = unique();
        let folder = std::env::temp_dir().join(&names.world);
        fs::create_dir_all(&folder).with_context(|| format!("{} cannot be made", folder.display()))?;
        let reaper = Reaper::start(&names, &folder)?;
        net::lay(&names).context("the world's network cannot be made; this needs root")?;
        Counters::install(&names)?;
        fs::write(folder.join(server::GIT_TOKEN_FILE), GIT_TOKEN)?;
        repository(&folder)?;
        let servers = servers(&names, &folder)?;
        Ok(Self { names, folder, servers, _reaper: reaper })
    }

    /// The names of its namespaces.
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// Its folder: certificates, journal, and whatever else should go with it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// The certificate of its authority.
    pub fn ca_file(&self) -> PathBuf {
        self.folder.join(server::CA_FILE)
    }

    /// The certificate of one of its hosts.
    pub fn certificate_file(&self, name: &str) -> PathBuf {
        server::certificate_file(&self.folder, name)
    }

    /// What its servers saw.
    pub fn journal(&self) -> Journal {
        Journal::new(self.folder.join(server::JOURNAL_FILE))
    }

    /// What arrived there.
    pub fn counters(&self) -> Result<Counters> {
        Counters::read(&self.names)
    }

    /// A program on the daemon's host.
    pub fn on_host(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        inside(&self.names.host(), program)
    }

    /// A program on the daemon's host that finds the world's name server in `/etc/resolv.conf` and trusts its authority.
    pub fn client_on_host(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.names.host(), program]);
        command.env("SSL_CERT_FILE", self.ca_file()).env("CURL_CA_BUNDLE", self.ca_file());
        command
            .env("GIT_SSL_CAINFO", self.ca_file())
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("HOME", &self.folder);
        command
    }

    /// A program out in the internet: someone who reaches the host from afar.
    pub fn from_afar(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        inside(&self.names.internet(), program)
    }
}

impl Drop for World {
    fn drop(&mut self) {
        drop(self.servers.stdin.take());
        let _ = self.servers.wait();
    }
}

/// A name that no other world on this machine has, short enough for the daemon's `instance`: at most 8 characters.
fn unique() -> Names {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let count = COUNT.fetch_add(1, Ordering::Relaxed);
    Names { world: format!("w{}{}", base36(std::process::id(), 5), base36(count, 2)) }
}

/// The number's last `digits` digits to the base of 36.
fn base36(number: u32, digits: u32) -> String {
    let digit = |place| char::from_digit(number / 36u32.pow(place) % 36, 36).unwrap_or('0');
    (0..digits).rev().map(digit).collect()
}

fn servers(names: &Names, folder: &Path) -> Result<Child> {
    let mut command = inside(&names.internet(), sh::sibling("tapgate-world")?);
    command.args(["serve", "--folder"]).arg(folder).process_group(0);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut line = String::new();
    BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
    ensure!(line.trim() == "ready", "the world's servers did not start; what they said is above");
    Ok(child)
}

/// The repository `project.git` with one commit.
fn repository(folder: &Path) -> Result<()> {
    let (work, bare) = (folder.join("project"), folder.join(server::GIT_FOLDER).join("project.git"));
    fs::create_dir_all(&work)?;
    fs::write(work.join("README"), "cloned through the gate\n")?;
    let git = |arguments: &[&str]| {
        let identity = ["-c", "user.name=world", "-c", "user.email=world@example.com"];
        let mut command = Command::new("git");
        command.current_dir(&work).env("HOME", folder).env("GIT_CONFIG_NOSYSTEM", "1").args(identity);
        sh::expect(command.args(arguments), b"")
    };
    git(&["init", "--quiet", "--initial-branch=main"])?;
    git(&["add", "README"])?;
    git(&["commit", "--quiet", "--message", "First"])?;
    // What an agent works on: a branch with its harness in it.
    git(&["checkout", "--quiet", "-b", AGENT_BRANCH])?;
    fs::write(work.join("harness.sh"), HARNESS)?;
    git(&["add", "harness.sh"])?;
    git(&["commit", "--quiet", "--message", "Harness"])?;
    git(&["checkout", "--quiet", "main"])?;
    git(&["clone", "--quiet", "--bare", ".", &bare.to_string_lossy()])?;
    sh::expect(Command::new("git").arg("-C").arg(&bare).args(["config", "http.receivepack", "true"]), b"")?;
    Ok(())
}
