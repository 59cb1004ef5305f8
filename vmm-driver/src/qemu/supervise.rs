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
/// What QEMU calls a guest that it holds because a write found no room.
const STARVED: &str = "io-error";
/// How many seconds a guest is held between two words about it.
const TOLD: u32 = 60;

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
    /// Whether its guest is held because the host's disk is full, and how often in a row it was let go on.
    pub starved: bool,
    /// See [`Self::starved`].
    pub retries: u32,
    /// Why its guest can never go on, where it was ended here for that.
    pub broken: Option<String>,
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
            _ if self.broken.is_some() => Exit::Crashed(self.broken.take().unwrap_or_default()),
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
            // The daemon's own holds among them.
            "STOP" => self.catch_up().await,
            _ => {}
        }
    }

    /// What QEMU said while nobody was connected to it is lost: what its guest is doing is asked.
    async fn catch_up(&mut self) {
        match self.status().await.as_deref() {
            Some("shutdown") => {
                self.shut_down = true;
                self.quit().await;
            }
            // QEMU keeps the write that found no room, and makes it again when the guest goes on.
            Some(STARVED) => {
                self.starved = true;
                if self.retries.is_multiple_of(TOLD) {
                    let dir = self.dir.display();
                    tracing::error!(%dir, "the host's disk is full: a guest is held until there is room");
                }
            }
            Some(state @ ("internal-error" | "guest-panicked")) => {
                tracing::error!(dir = %self.dir.display(), state, "a guest cannot go on and is ended");
                self.broken = Some(format!("its guest cannot go on: {state}"));
                let _ = self.process.signal(libc::SIGKILL);
            }
            _ => {}
        }
    }

    async fn status(&mut self) -> Option<String> {
        match self.qmp.as_mut()?.command("query-status", Value::Null).await {
            Ok(status) => status.get("status").and_then(Value::as_str).map(str::to_owned),
            // With the next connection, again.
            Err(error) => {
                self.qmp = None;
                self.heard(&error);
                None
            }
        }
    }

    /// Lets a guest go on that found no room on the disk; it is held again at once while there is none. Never one that is held
    /// for anything else: that one's memory may be on its way out.
    async fn feed(&mut self) {
        if !std::mem::take(&mut self.starved) {
            self.retries = 0;
        } else if self.status().await.as_deref() == Some(STARVED) {
            self.retries = self.retries.saturating_add(1);
            if let Some(qmp) = &mut self.qmp
                && let Err(error) = qmp.command("cont", Value::Null).await
            {
                self.starved = true;
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
        self.feed().await;
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

    /// No guest of an emulated CPU gets there: what answers stands in for QEMU.
    #[tokio::test]
    async fn a_guest_that_cannot_go_on_is_ended() {
        use crate::process::ProcessRef;
        use std::io::{BufRead as _, BufReader, Write as _};
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(file::CONTROL);
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let lines = BufReader::new(stream.try_clone().unwrap()).lines();
            writeln!(stream, r#"{{"QMP": {{}}}}"#).unwrap();
            let mut events = r#"{"event": "STOP"}"#;
            for line in lines.map_while(Result::ok) {
                let asked: Value = serde_json::from_str(&line).unwrap();
                let answer = match asked["execute"].as_str().unwrap() {
                    "query-status" if events.is_empty() => json!({"status": "internal-error"}),
                    "query-status" => json!({"status": "running"}),
                    "ringbuf-read" => json!(""),
                    _ => json!({}),
                };
                writeln!(stream, "{}", json!({"return": answer, "id": asked["id"]})).unwrap();
                if asked["execute"] == "ringbuf-read" {
                    writeln!(stream, "{}", std::mem::take(&mut events)).unwrap();
                }
            }
        });
        #[expect(clippy::zombie_processes, reason = "the pidfd reaps it")]
        let child = std::process::Command::new("sleep").arg("1000").spawn().unwrap();
        let process = ProcessRef::of(i32::try_from(child.id()).unwrap()).unwrap();
        let (observed, mut seen) = watch::channel(Observed::default());
        let (_commands, commands) = mpsc::channel(1);
        let (_intent, intent) = watch::channel(false);
        let supervisor = Supervisor {
            dir: dir.path().to_owned(),
            process: Arc::new(Process::open(&process).unwrap().unwrap()),
            scratch: None,
            qmp: Some(Qmp::connect(&path).await.unwrap()),
            commands,
            observed,
            shut_down: false,
            silent: 0,
            hung: false,
            starved: false,
            retries: 0,
            broken: None,
            intent,
        };
        tokio::spawn(supervisor.run(|| {}));
        let ended = tokio::time::timeout(Duration::from_secs(30), seen.wait_for(|seen| seen.exit.is_some()));
        let exit = ended.await.unwrap().unwrap().exit.as_deref().cloned();
        let _ = nix::sys::signal::kill(nix::unistd::Pid::from_raw(process.pid), nix::sys::signal::SIGKILL);
        let why = "its guest cannot go on: internal-error";
        assert_eq!(exit, Some(Exit::Crashed(why.into())));
    }

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
