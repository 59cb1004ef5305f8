//! Printing the demo for a person: in colour on a terminal, plainly elsewhere and with `NO_COLOR`.

use super::Step;
use crate::{World, daemon::Settings};
use std::{
    io::{IsTerminal as _, Write as _, stdin, stdout},
    time::Duration,
};

/// How wide the column of what was looked at is.
const WIDTH: usize = 44;

/// Where the demo is printed to.
pub struct Show {
    colour: bool,
}

impl Show {
    /// Standard output.
    pub fn new() -> Self {
        let wanted = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        Self { colour: wanted && stdout().is_terminal() }
    }

    /// What the world is.
    pub fn world(&self, world: &World, settings: &Settings) {
        let driver = settings.driver.word();
        println!(
            "A closed world of namespaces ({}-…), guests by the driver `{driver}`.",
            world.names().world
        );
        println!("Nothing outside of it is reached; all of it is gone at the end.\n");
    }

    /// A step begins.
    pub fn begin(&self, number: usize, step: &Step) {
        println!("{}", self.paint("1", &format!("{number}. {}", step.title)));
        println!("   expected: {}", step.expected);
        let _ = stdout().flush();
    }

    /// A step has ended.
    pub fn end(&self, step: &Step, took: Duration) {
        for check in &step.seen {
            let mark = if check.ok { self.paint("32", "✓") } else { self.paint("31", "✗") };
            if check.what.is_empty() {
                println!("     {}", check.seen);
            } else {
                println!("   {mark} {:<WIDTH$} {}", check.what, check.seen);
            }
        }
        let word = if step.ok() { self.paint("32", "ok") } else { self.paint("31", "FAILED") };
        println!("   {word} ({:.1} s)\n", took.as_secs_f32());
    }

    /// Something went wrong outside the steps.
    pub fn fault(&self, error: &anyhow::Error) {
        println!("{} {error:#}", self.paint("31", "error:"));
    }

    /// The end of the daemon's log.
    pub fn log(&self, log: &str) {
        println!("The daemon's log ends with:");
        let lines: Vec<&str> = log.lines().collect();
        for line in &lines[lines.len().saturating_sub(40)..] {
            println!("   {line}");
        }
        println!();
    }

    /// Waits for Enter, for looking around.
    pub fn wait(&self, world: &World) {
        println!("The world stands: `ip netns exec {} sh`. Enter ends it.", world.names().host());
        let _ = stdin().read_line(&mut String::new());
    }

    /// The end; the last line is for programs.
    pub fn total(&self, passed: usize, failed: usize, took: Duration) {
        println!("Took {:.0} s.", took.as_secs_f32());
        println!("{passed} passed, {failed} failed");
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.colour { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}
