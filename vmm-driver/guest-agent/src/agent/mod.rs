//! The agent of this VM, if it is one's: fetches its task from the guest service, clones, starts the harness in the tmux
//! session `main`, and reports. A task is begun once, whatever restarts in between.
//!
//! Nothing of a task ever is part of a command line that a shell reads: the harness gets it from a file.

mod clone;
pub mod credential;
pub mod harness;
mod record;
mod task;

use crate::http::{self, Answer};
use record::{Record, Step};
use serde_json::json;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use task::Task;

const PATH: &str = "/v1/agent";
/// Between two looks at the harness.
const TICK: Duration = Duration::from_secs(1);
/// Between two logs.
const LOG_EVERY: Duration = Duration::from_secs(2);
/// Between two attempts to reach the service; doubles up to the longest.
const SHORTEST: Duration = Duration::from_secs(1);
const LONGEST: Duration = Duration::from_secs(30);
/// What the service takes of a log.
const MAX_LOG: usize = 128 << 10;
/// How long the boot may take to end, before the harness is started all the same.
const BOOT: Duration = Duration::from_secs(180);

/// Does all that there is to do for this VM's agent; comes back at once where there is none.
pub fn run() {
    let mut pause = SHORTEST;
    let task = loop {
        match http::get(PATH, None) {
            Ok(Answer::New(text, _)) => match Task::parse(&text) {
                Ok(task) => break task,
                Err(error) => return eprintln!("agent: {error}"),
            },
            Ok(Answer::None) => return,
            Ok(Answer::Same) | Err(_) => {
                sleep(pause);
                pause = (pause * 2).min(LONGEST);
            }
        }
    };
    let record = Record::of(&task.id);
    let failure = match work(&task, &record) {
        Ok(failure) => failure,
        Err(error) => Some(error),
    };
    if let Err(error) = record.set(&Step::Ended(failure.clone())) {
        eprintln!("agent: {error}");
    }
    send_log(&mut String::new());
    report("idle", failure.as_deref());
}

/// Brings the task to its end. The answer is why the harness failed, if it did; the error is why it was not run whole.
fn work(task: &Task, record: &Record) -> Result<Option<String>, String> {
    match record.step() {
        Some(Step::Ended(failure)) => return Ok(failure),
        Some(Step::Started(boot)) if boot != record::boot_id() => {
            return Err("the guest was restarted while the harness ran; it is not run twice".into());
        }
        Some(Step::Started(_)) => {}
        Some(Step::Cloning) | None => {
            if !task.is_new() {
                return Err(
                    "the guest has lost the record of the run (its disk was put back); it is not run twice"
                        .into(),
                );
            }
            record.set(&Step::Cloning)?;
            let folder = clone::clone(task)?;
            harness::find(task, &folder)?;
            await_boot();
            record.keep(task, &folder)?;
            // On disk before it is true: a guest that is cut off here does not start a second one.
            record.set(&Step::Started(record::boot_id()))?;
            start(task, &folder)?;
        }
    }
    report("running", None);
    let (mut shown, mut sent) = (String::new(), Instant::now());
    loop {
        sleep(TICK);
        if sent.elapsed() >= LOG_EVERY {
            send_log(&mut shown);
            sent = Instant::now();
        }
        if let Some(ended) = record.outcome() {
            return Ok(ended);
        }
        if !record.harness_lives() {
            // It may have ended between the two looks.
            return record.outcome().ok_or_else(|| "the harness was killed".to_owned());
        }
    }
}

/// The session is there for whoever attaches, so it begins when the boot no longer cleans up under it.
fn await_boot() {
    let waiting = Command::new("/usr/bin/systemctl")
        .args(["is-system-running", "--wait", "--quiet"])
        .stdin(Stdio::null())
        .spawn();
    let Ok(mut child) = waiting else { return };
    let end = Instant::now() + BOOT;
    while Instant::now() < end {
        if !matches!(child.try_wait(), Ok(None)) {
            return;
        }
        sleep(Duration::from_millis(200));
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Several words after the options: tmux runs them as they are, without a shell.
fn start(task: &Task, folder: &Path) -> Result<(), String> {
    let output = Command::new("/usr/bin/tmux")
        .args(["new-session", "-d", "-s", "main", "-x", "180", "-y", "50", "-c"])
        .arg(folder)
        .args(["/usr/lib/tapgate/guest-agent", "harness", &task.id])
        .env_clear()
        .envs(harness::BASE)
        .current_dir("/root")
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("tmux, which the harness runs in, cannot be started: {e}"))?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("tmux did not start the session: {}", clone::last_words(&output.stderr)))
}

/// Sends what the session shows, if it changed.
fn send_log(shown: &mut String) {
    let output = Command::new("/usr/bin/tmux")
        .args(["capture-pane", "-p", "-J", "-S", "-5000", "-t", "main"])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output();
    let Ok(output) = output else { return };
    let text = String::from_utf8_lossy(&output.stdout).trim_end().to_owned();
    if !output.status.success() || text.is_empty() || text == *shown {
        return;
    }
    let mut from = text.len().saturating_sub(MAX_LOG - 1024);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    if http::put("/v1/agent/log", &text.as_bytes()[from..], "text/plain").is_ok() {
        *shown = text;
    }
}

/// Reports until it is taken, or refused for good.
fn report(status: &str, failure: Option<&str>) {
    let body = json!({"status": status, "failure_reason": failure}).to_string();
    let mut pause = SHORTEST;
    loop {
        match http::put("/v1/agent/status", body.as_bytes(), "application/json") {
            Ok(200..=299) => return,
            Ok(refused @ 400..=499) if refused != 429 => {
                return eprintln!("agent: the report `{status}` was refused ({refused})");
            }
            Ok(_) | Err(_) => {
                sleep(pause);
                pause = (pause * 2).min(LONGEST);
            }
        }
    }
}
