//! The resident part: listens for the power button, and keeps the guest as its seed would be now.
//!
//! `GET /v1/user-data` of the guest service answers the seed's user-data of this moment: `#cloud-config` and JSON. With
//! `If-None-Match` the service holds the question until it differs. What comes is applied as at boot.

use crate::http::{Answer, get};
use crate::{agent, apply, channel, power, seed, trust};
use std::fs;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

const PATH: &str = "/v1/user-data";
const SYSTEMD: &str = "/etc/systemd/system.conf.d/50-tapgate.conf";
/// Between two attempts while the service cannot be had; doubles up to the longest.
const SHORTEST: Duration = Duration::from_secs(2);
const LONGEST: Duration = Duration::from_secs(60);

/// Applies the seed if nothing has yet, then stays.
pub fn run() -> Result<(), String> {
    if let Err(error) = apply::run() {
        eprintln!("seed: {error}");
    }
    power::listen();
    std::thread::spawn(channel::listen);
    std::thread::spawn(agent::run);
    if let Err(error) = trust::apply_java() {
        eprintln!("java: {error}");
    }
    follow()
}

fn follow() -> ! {
    let mut tag: Option<String> = None;
    let mut pause = SHORTEST;
    loop {
        match get(PATH, tag.as_deref()) {
            Ok(Answer::New(text, new)) => {
                take(&text);
                // A service without tags is asked now and then instead.
                pause = if new.is_some() { SHORTEST } else { LONGEST };
                if new.is_none() {
                    sleep(pause);
                }
                tag = new;
            }
            Ok(Answer::Same) => pause = SHORTEST,
            Ok(Answer::None) | Err(_) => {
                sleep(pause);
                pause = (pause * 2).min(LONGEST);
            }
        }
    }
}

fn take(text: &str) {
    let user = match seed::user_data(text) {
        Ok(user) => user,
        Err(error) => return eprintln!("the guest service: {error}"),
    };
    let before = fs::read(SYSTEMD).ok();
    for (name, result) in apply::user_data(&user) {
        if let Err(error) = result {
            eprintln!("{name}: {error}");
        }
    }
    if fs::read(SYSTEMD).ok() != before {
        // The manager reads its settings again; services that start from now on see them.
        let reload = Command::new("/usr/bin/systemctl").arg("daemon-reload").stdin(Stdio::null()).status();
        if let Err(error) = reload {
            eprintln!("systemctl: {error}");
        }
    }
}
