//! Follows one QEMU process: its end, its events, its console. One task for each VM, for as long as the daemon lives.
//!
//! Never decides about a VM's life: it says what happened and carries out single commands.

use crate::confine::scratch::Scratch;
use crate::process::{Ended, Process};
use crate::qmp::{Event, Qmp};
use crate::spec::{Exit, Observed, VmmError};
use serde_json::{Value, json};
use std::fs::{self, OpenOptions};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval};

/// How often the console is fetched, and a lost control connection tried again.
const TICK: Duration = Duration::from_secs(1);
/// The console log's size before it is turned over; two are kept.
const LOG: u64 = 1 << 20;
/// How often in a row QEMU may leave a question without an answer before it is taken to hang; each takes ten seconds.
const PATIENCE: u32 = 2;
const CHUNK: u32 = 64 << 10;

/// A command for QEMU and where its answer goes.
pub struct Command {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub arguments: Value,
    /// A descriptor that goes along with it.
    pub descriptor: Option<OwnedFd>,
    /// Where the answer goes.
    pub answer: oneshot::Sender<Result<Value, VmmError>>,
}

/// Names of the files in a VM's folder.
pub mod file {
    /// The guest's console.
    pub const CONSOLE: &str = "console.log";
    /// QEMU's own complaints.
    pub const VMM: &str = "vmm.log";
    /// The control socket.
    pub const CONTROL: &str = "qmp.sock";
    /// The guest agent's channel.
    pub const AGENT: &str = "agent.sock";
    /// The seed disk.
    pub const SEED: &str = "seed.img";
    /// The handle, for a daemon that was lost before it could note it.
    pub const HANDLE: &str = "vmm.json";
}

/// What the task works with.
pub struct Supervisor {
    /// The VM's folder.
    pub dir: PathBuf,
    /// The process.
    pub process: Arc<Process>,
    /// Where the VMM writes, if it is confined.
    pub scratch: Option<Scratch>,
    /// The control connection; `None` after it was lost.
    pub qmp: Option<Qmp>,
    /// Commands from the VM's handle.
    pub commands: mpsc::Receiver<Command>,
    /// What everyone may see.
    pub observed: watch::Sender<Observed>,
    /// Whether the guest had shut down already when it was adopted.
    pub shut_down: bool,
    /// How many questions in a row were left without an answer.
    pub silent: u32,
    /// Whether it was ended here for that. What its socket says afterwards changes nothing about it.
    pub hung: bool,
    /// Set by whoever ends the process on purpose.
    pub intent: watch::Receiver<bool>,
}

impl Supervisor {
    /// Runs until the process has ended. `clean` removes what it left, before anyone learns of its end: after that the VM may
    /// have another VMM in the same places.
    pub async fn run(mut self, clean: impl FnOnce()) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let process = self.process.clone();
        let ended = async move { process.wait().await.unwrap_or(Ended::Unknown) };
        tokio::pin!(ended);
        if self.shut_down {
            self.quit().await;
        } else {
            self.catch_up().await;
        }
        let status = loop {
            tokio::select! {
                biased;
                status = &mut ended => break status,
                event = next(&mut self.qmp) => match event {
                    Ok(event) => self.on_event(event).await,
                    Err(_) => self.qmp = None,
                },
                Some(command) = self.commands.recv() => {
                    let result = match &mut self.qmp {
                        Some(qmp) => qmp.command_with(command.name, command.arguments, command.descriptor).await,
                        None => Err(VmmError::Control("its control socket is closed".into())),
                    };
                    let _ = command.answer.send(result);
                }
                _ = tick.tick() => self.on_tick().await,
            }
        };
        let exit = match status {
            _ if self.shut_down => Exit::GuestShutdown,
            _ if *self.intent.borrow() => Exit::Stopped,
            _ if self.hung => Exit::Crashed("it hung: its control socket did not answer".into()),
            Ended::Code(code) => Exit::Crashed(self.last_words(&format!("exit code {code}"))),
            Ended::Signal(signal) => Exit::Crashed(self.last_words(&format!("signal {signal}"))),
            Ended::Unknown => Exit::Crashed(self.last_words("it is gone")),
        };
        clean();
        self.observed.send_modify(|seen| seen.exit = Some(Arc::new(exit)));
    }

    async fn on_event(&mut self, event: Event) {
        match event.name.as_str() {
            "SHUTDOWN" if event.data.get("guest").and_then(Value::as_bool) == Some(true) => {
                self.shut_down = true;
                self.quit().await;
            }
            "RESET" if event.data.get("guest").and_then(Value::as_bool) == Some(true) => {
                self.observed.send_modify(|seen| seen.reboots = seen.reboots.saturating_add(1));
            }
            _ => {}
        }
    }

    /// What QEMU said while nobody was connected to it is lost: what its guest is doing is asked.
    async fn catch_up(&mut self) {
        let Some(qmp) = &mut self.qmp else { return };
        match qmp.command("query-status", Value::Null).await {
            Ok(status) if status.get("status").and_then(Value::as_str) == Some("shutdown") => {
                self.shut_down = true;
                self.quit().await;
            }
            Ok(_) => {}
            // With the next connection, again.
            Err(error) => {
                self.qmp = None;
                self.heard(&error);
            }
        }
    }

    /// The guest is off and QEMU waits: take its last output and let it go.
    async fn quit(&mut self) {
        self.fetch_console().await;
        let asked = match &mut self.qmp {
            Some(qmp) => qmp.command("quit", Value::Null).await.is_ok(),
            None => false,
        };
        if !asked {
            let _ = self.process.signal(libc::SIGTERM);
        }
    }

    async fn on_tick(&mut self) {
        if self.qmp.is_none() {
            // QEMU takes one connection at a time and takes the next when the last is closed.
            match Qmp::connect(&self.dir.join(file::CONTROL)).await {
                Ok(qmp) => {
                    self.qmp = Some(qmp);
                    // QEMU keeps no count of its guest's restarts: there may have been one, so that readiness is looked at anew.
                    self.observed.send_modify(|seen| seen.reboots = seen.reboots.saturating_add(1));
                    self.catch_up().await;
                }
                Err(error) => self.heard(&error),
            }
        }
        self.fetch_console().await;
    }

    /// A VMM that hangs is ended: its guest does not run, and nobody else would notice.
    fn heard(&mut self, error: &VmmError) {
        match error {
            VmmError::Silent(_) => self.silent += 1,
            _ => self.silent = 0,
        }
        if self.silent >= PATIENCE && !self.hung {
            self.hung = true;
            tracing::error!(dir = %self.dir.display(), "QEMU hangs and is ended");
            let _ = self.process.signal(libc::SIGKILL);
        }
    }

    async fn fetch_console(&mut self) {
        for _ in 0..super::args::CONSOLE / CHUNK {
            let Some(qmp) = &mut self.qmp else { return };
            let arguments = json!({"device": "console", "size": CHUNK, "format": "utf8"});
            match qmp.command("ringbuf-read", arguments).await {
                Ok(Value::String(text)) if !text.is_empty() => {
                    if let Err(error) = append(&self.dir.join(file::CONSOLE), text.as_bytes()) {
                        tracing::warn!(%error, "the console log cannot be written");
                    }
                }
                Ok(_) => return self.silent = 0,
                Err(error) => return self.heard(&error),
            }
        }
    }

    fn last_words(&self, how: &str) -> String {
        let words = words(&self.dir, self.scratch.as_ref());
        let last: Vec<&str> = words.lines().rev().filter(|line| !line.trim().is_empty()).take(3).collect();
        if last.is_empty() {
            return how.to_owned();
        }
        format!("{how}: {}", last.into_iter().rev().collect::<Vec<_>>().join("; "))
    }
}

/// The VMM's last complaints. Those of a confined one are in memory and are kept in its log from here on.
pub fn words(dir: &Path, scratch: Option<&Scratch>) -> String {
    let log = dir.join(file::VMM);
    if let Some(scratch) = scratch {
        let words = scratch.tail("log", 1024);
        if !words.is_empty() {
            let _ = append(&log, words.as_bytes());
        }
        return words;
    }
    tail(&log, 1024)
}

async fn next(qmp: &mut Option<Qmp>) -> Result<Event, VmmError> {
    match qmp {
        Some(qmp) => qmp.event().await,
        None => std::future::pending().await,
    }
}

/// Appends to a log of bounded size.
pub fn append(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if fs::metadata(path).is_ok_and(|data| data.len() > LOG) {
        fs::rename(path, path.with_extension("log.1"))?;
    }
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)?.write_all(bytes)
}

/// The end of a text file.
pub fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = fs::File::open(path)?;
        let length = file.metadata()?.len();
        file.seek(SeekFrom::Start(length.saturating_sub(bytes)))?;
        let mut buffer = Vec::new();
        file.take(bytes).read_to_end(&mut buffer)?;
        Ok(buffer)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    text.chars().filter(|c| !c.is_control() || *c == '\n').collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_console_log_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file::CONSOLE);
        let chunk = vec![b'x'; 64 << 10];
        for _ in 0..80 {
            append(&path, &chunk).unwrap();
        }
        let total: u64 =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum();
        assert!(total < 3 * LOG, "{total}");
        assert_eq!(tail(&path, 10), "x".repeat(10));
    }
}
