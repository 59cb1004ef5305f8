//! The demo: eight steps that show tapgate's promises with a real guest, each with what was expected and what was seen.
//! The same steps are a runner of `cargo xtask test`.

mod attempts;
pub mod audit;
mod restart;
mod secrets;
mod show;
mod stage;
mod steps;

pub use stage::Stage;

use crate::{
    World,
    daemon::{Daemon, Settings},
};
use anyhow::Result;
use std::time::Instant;

/// One thing that a step looks at.
#[derive(Clone, Debug)]
pub struct Check {
    /// What was looked at.
    pub what: String,
    /// What was seen.
    pub seen: String,
    /// Whether it is as it must be.
    pub ok: bool,
}

/// One step.
#[derive(Clone, Debug)]
pub struct Step {
    /// What it does.
    pub title: &'static str,
    /// What must be seen.
    pub expected: &'static str,
    /// What was seen.
    pub seen: Vec<Check>,
}

impl Step {
    const fn new(title: &'static str, expected: &'static str) -> Self {
        Self { title, expected, seen: Vec::new() }
    }

    /// Records what was seen.
    pub fn check(&mut self, what: impl Into<String>, seen: impl Into<String>, ok: bool) {
        self.seen.push(Check { what: what.into(), seen: seen.into(), ok });
    }

    /// Whether something was looked at and all of it is as it must be.
    pub fn ok(&self) -> bool {
        !self.seen.is_empty() && self.seen.iter().all(|check| check.ok)
    }
}

/// A step's work: looks at things and records what it saw; an error is a failure too.
type Work = fn(&mut Stage<'_>, &mut Step) -> Result<()>;

const STEPS: [(&str, &str, Work); 8] = [
    (
        "Create a VM by the API, wait until it is ready, log in by SSH",
        "`pending`, then `running`/`ready`; a shell in the guest",
        steps::create,
    ),
    (
        "No rule: nothing gets out",
        "every attempt fails at once and says why; nothing arrives in the internet; each attempt is in the audit",
        attempts::held,
    ),
    (
        "A rule for a host: the same request works, unopened",
        "an answer, under the server's own certificate",
        steps::host_rule,
    ),
    (
        "A secret: the server gets it, the guest never sees it",
        "the guest holds a placeholder, the server received the real value; `git clone` with a token works",
        secrets::given,
    ),
    (
        "A rule for a range: plain TCP and ping, in the kernel; taken away, what runs is cut",
        "an echo by TCP, answers to ping, a download that stops when the rule goes",
        steps::cidr_rule,
    ),
    (
        "Mode `warn`: an unlisted host is reached, and recorded",
        "an answer; an audit event `denied` with `allowed: true`",
        steps::warn,
    ),
    (
        "kill -9 of the daemon: the guest reaches nothing new; started again, it goes on",
        "no packet in the internet while it is dead; the VM is adopted, not booted again",
        restart::killed,
    ),
    (
        "The audit of all this",
        "every attempt above, each with its verdict and reason; no secret in it",
        audit::table,
    ),
];

/// Makes a world and runs every step in it, showing each. Whether all of them were as expected.
pub fn run(settings: Settings, stay: bool) -> Result<bool> {
    let began = Instant::now();
    let show = show::Show::new();
    let world = World::new()?;
    show.world(&world, &settings);
    let daemon = match Daemon::start(&world, settings) {
        Ok(daemon) => daemon,
        Err(error) => {
            show.fault(&error);
            show.total(0, STEPS.len(), began.elapsed());
            return Ok(false);
        }
    };
    let mut stage = Stage::new(&world, daemon)?;
    let (mut passed, mut failed) = (0, 0);
    for (number, (title, expected, work)) in STEPS.into_iter().enumerate() {
        let mut step = Step::new(title, expected);
        show.begin(number + 1, &step);
        let started = Instant::now();
        if let Err(error) = work(&mut stage, &mut step) {
            step.check("the step itself", format!("{error:#}"), false);
        }
        show.end(&step, started.elapsed());
        if step.ok() {
            passed += 1;
        } else {
            failed += 1;
        }
        // Without a guest there is nothing that the other steps could show.
        if !stage.has_guest() {
            failed += STEPS.len() - number - 1;
            break;
        }
    }
    if failed > 0 {
        show.log(&stage.daemon().log());
    }
    if stay {
        show.wait(&world);
    }
    if let Err(error) = stage.clear() {
        show.fault(&error);
        failed += 1;
    }
    show.total(passed, failed, began.elapsed());
    Ok(failed == 0)
}
