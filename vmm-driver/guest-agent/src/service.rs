//! The resident part: listens for the power button, keeps what the boot had no time for, and follows changes of the seed.

use crate::{apply, power, seed, trust};
use std::{
    process::{Command, Stdio},
    thread,
    time::Duration,
};

/// Where the gateway answers with the user-data as it is now; asked with the last tag, it waits for a change.
const USER_DATA: &str = "http://169.254.169.254/v1/user-data";
/// Longer than the service holds a question.
const PATIENCE: Duration = Duration::from_secs(60);
/// After a failure: the daemon may be restarting.
const PAUSE: Duration = Duration::from_secs(2);
/// Octets of user-data that are read.
const MOST: u64 = 4 << 20;

/// Applies the seed if nothing has yet, then stays.
pub fn run() -> Result<(), String> {
    if let Err(error) = apply::run() {
        eprintln!("seed: {error}");
    }
    power::listen();
    if let Err(error) = trust::apply_java() {
        eprintln!("java: {error}");
    }
    follow()
}

/// Asks for the user-data for ever and applies what is new.
fn follow() -> ! {
    let agent: ureq::Agent = ureq::Agent::config_builder()
        .timeout_global(Some(PATIENCE))
        .max_redirects(0)
        .proxy(None)
        .build()
        .into();
    let mut known: Option<String> = None;
    loop {
        match ask(&agent, known.as_deref()) {
            Ok(Some((tag, text))) => {
                take(&text);
                known = Some(tag);
            }
            Ok(None) => {}
            Err(_) => thread::sleep(PAUSE),
        }
    }
}

/// The user-data and its tag, or nothing if it is still what the tag says.
fn ask(agent: &ureq::Agent, known: Option<&str>) -> Result<Option<(String, String)>, ureq::Error> {
    let mut request = agent.get(USER_DATA);
    if let Some(tag) = known {
        request = request.header("If-None-Match", tag);
    }
    let mut response = request.call()?;
    if response.status() == 304 {
        return Ok(None);
    }
    let tag = response.headers().get("etag").and_then(|tag| tag.to_str().ok()).map(str::to_owned);
    let text = response.body_mut().with_config().limit(MOST).read_to_string()?;
    Ok(Some((tag.ok_or(ureq::Error::BadUri("an answer without a tag".into()))?, text)))
}

fn take(text: &str) {
    let user = match seed::user_data(text) {
        Ok(user) => user,
        Err(error) => return eprintln!("guest service: {error}"),
    };
    for (step, result) in apply::user_data(&user) {
        if let Err(error) = result {
            eprintln!("{step}: {error}");
        }
    }
    // Services that start from now on get the variables; systemd reads its settings again only when told.
    let told = Command::new("/usr/bin/systemctl").arg("daemon-reload").stdin(Stdio::null()).status();
    if let Err(error) = told {
        eprintln!("systemctl daemon-reload: {error}");
    }
}
