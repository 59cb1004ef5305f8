//! A program that stands for Firecracker or Cloud Hypervisor where there is no KVM: the same arguments, the same API, checked
//! against what their public specifications define; no guest. It does to its files, its tap and its sockets what they do, so
//! that everything around a VMM is the real thing.
//!
//! A test plays the guest by signals: USR1 restarts it, USR2 switches it off.
#![allow(missing_docs, reason = "a program for tests")]
#![allow(clippy::unwrap_used, reason = "a test's program fails by panicking")]

mod agent;
mod api;
mod cloud_hypervisor;
mod escape;
mod fields;
mod firecracker;
mod wishes;

use std::io::Write as _;
use std::os::unix::fs::FileExt as _;
use std::sync::{Arc, Mutex};
use tokio::signal::unix::{SignalKind, signal};

/// Which of the two it plays.
#[derive(Clone, Copy, PartialEq)]
pub enum Role {
    CloudHypervisor,
    Firecracker,
}

/// The VM as far as there is one.
pub struct Machine {
    pub role: Role,
    pub state: Mutex<&'static str>,
    pub console: Mutex<std::fs::File>,
    pub events: Mutex<Option<std::fs::File>>,
    /// How often more it refuses to let its guest go on.
    pub refusals: Mutex<u32>,
}

impl Machine {
    pub fn say(&self, text: &str) {
        // Like the real ones: what does not fit any more is lost, and the guest runs on.
        let _ = writeln!(self.console.lock().unwrap(), "{text}");
    }

    /// Starts the guest: its disk remembers how often.
    pub fn start(&self, disk: &std::fs::File) {
        let mut count = [0u8; 8];
        disk.read_exact_at(&mut count, COUNT_AT).unwrap();
        let count = u64::from_le_bytes(count) + 1;
        disk.write_all_at(&count.to_le_bytes(), COUNT_AT).unwrap();
        self.say(&format!("[    0.000000] Linux version 6.1-simulated, start {count}"));
        for found in escape::attempts() {
            self.say(&format!("ESCAPED: {found}"));
        }
        *self.state.lock().unwrap() = "Running";
    }

    /// Whether it refuses once more to let the guest go on.
    pub fn refuses(&self) -> Result<(), String> {
        let mut refusals = self.refusals.lock().unwrap();
        match refusals.checked_sub(1) {
            Some(fewer) => {
                *refusals = fewer;
                Err("not now".into())
            }
            None => Ok(()),
        }
    }

    pub fn restart(&self) {
        self.say("[    9.000000] reboot: Restarting system");
        match self.role {
            Role::Firecracker => std::process::exit(0),
            Role::CloudHypervisor => {
                let event =
                    "{\n  \"source\": \"vm\",\n  \"event\": \"rebooted\",\n  \"properties\": null\n}\n\n";
                let _ = self.events.lock().unwrap().as_mut().unwrap().write_all(event.as_bytes());
                self.say("[    0.000000] Linux version 6.1-simulated, again");
            }
        }
    }

    pub fn power_off(&self) {
        self.say("[    9.000000] reboot: Power down");
        if self.role == Role::CloudHypervisor {
            std::process::exit(0);
        }
    }
}

/// Where the boot block of an ext4 file system is: 1024 octets that nobody uses.
pub const COUNT_AT: u64 = 512;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    assert_eq!(std::env::vars().count(), 0, "nothing of the daemon's environment");
    let mut restart = signal(SignalKind::user_defined1()).unwrap();
    let mut off = signal(SignalKind::user_defined2()).unwrap();
    let machine: Arc<Machine> = if args.iter().any(|arg| arg == "--api-sock") {
        firecracker::serve(&args)
    } else {
        cloud_hypervisor::serve(&args)
    };
    loop {
        tokio::select! {
            _ = restart.recv() => machine.restart(),
            _ = off.recv() => machine.power_off(),
        }
    }
}

/// Ends with words in the log, as a VMM does that was started wrongly.
pub fn refuse(words: &str) -> ! {
    eprintln!("simulated VMM: {words}");
    std::process::exit(153);
}

/// The value of a flag that must be there.
pub fn flag<'a>(args: &'a [String], name: &str) -> &'a str {
    match args.windows(2).find(|pair| pair[0] == name) {
        Some(pair) => &pair[1],
        None => refuse(&format!("{name} is missing")),
    }
}
