//! Step 4: a secret goes to the server that it is for, and the guest never holds more than a placeholder.

use super::{Step, stage::Stage};
use crate::{daemon::Driver, sites, world::GIT_TOKEN};
use anyhow::Result;
use std::{thread, time::Duration};

const REAL: &str = "sk-live-2b8f4c1e9d7a4f60a35e";
const NAME: &str = "echo-key";
const VARIABLE: &str = "ECHO_KEY";

/// Step 4.
pub fn given(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let (echo, git) = (sites::ECHO.name, sites::GIT.name);
    stage.api().rule("host", echo)?;
    stage.api().rule("host", git)?;
    let placeholder = stage.api().secret(NAME, VARIABLE, REAL, &[echo])?;
    stage.api().secret("git-token", "GIT_TOKEN", GIT_TOKEN, &[git])?;
    stage.secrets.extend([REAL.to_owned(), GIT_TOKEN.to_owned()]);
    let wanted = format!("{placeholder} IRONSH_PROXY_git-token");
    if stage.daemon().driver() == Driver::Netns {
        // Only a VM has an agent that takes changes over while it runs.
        stage.restart()?;
    }
    let held = format!("printf '%s %s' \"${VARIABLE}\" \"$GIT_TOKEN\"");
    let mut environment = String::new();
    for _ in 0..40 {
        environment = stage.guest()?.expect(&held)?;
        if environment == wanted {
            break;
        }
        thread::sleep(Duration::from_millis(500));
    }
    step.check(
        format!("${VARIABLE} and $GIT_TOKEN in the guest"),
        environment.clone(),
        environment == wanted,
    );

    let (guest, at) = (stage.guest()?, stage.scratch());
    let journal = stage.world().journal().mark();
    let request =
        format!("curl -sS --max-time 60 -v -H \"Authorization: Bearer ${VARIABLE}\" https://{echo}/echo");
    let done = guest.sh(&request)?;
    step.check("a request with it", format!("exit {}", done.code), done.ok());
    let received = journal.http(echo)?;
    let got = received.iter().any(|entry| entry["headers"].to_string().contains(&format!("Bearer {REAL}")));
    step.check("the server received", if got { "the real value" } else { "something else" }, got);
    let seen = done.out.contains(REAL) || done.err.contains(REAL);
    let back = done.out.contains(&placeholder);
    step.check(
        "the server's echo, as the guest reads it",
        match (seen, back) {
            (true, _) => "the real value",
            (_, true) => "the placeholder",
            _ => "neither",
        },
        !seen && back,
    );

    let journal = stage.world().journal().mark();
    let clone = format!(
        "rm -rf {at}/project; GIT_TERMINAL_PROMPT=0 timeout 120 git clone -q https://x:$GIT_TOKEN@{git}/project.git \
         {at}/project && cat {at}/project/README"
    );
    let done = guest.sh(&clone)?;
    step.check("git clone with the token over Basic", done.gist(), done.ok());
    let basic = format!("x:{GIT_TOKEN}");
    let right = journal.http(git)?.iter().any(|entry| entry["basic"] == basic.as_str());
    step.check("the git server was given", if right { "the real token" } else { "another" }, right);

    let journal = stage.world().journal().mark();
    let name = sites::API.name;
    guest.sh(&format!("curl -sS --max-time 60 -k -H \"X-Key: ${VARIABLE}\" https://{name}/ -o /dev/null"))?;
    let other = journal.http(name)?;
    let leaked = other.iter().any(|entry| entry.to_string().contains(REAL));
    let arrived = other.iter().any(|entry| entry.to_string().contains(&placeholder));
    let told = if leaked {
        "the real value"
    } else if arrived {
        "the placeholder"
    } else {
        "nothing"
    };
    step.check(format!("sent to {name}, which it is not for"), told, arrived && !leaked);

    if stage.daemon().driver() == Driver::Netns {
        // The files of such a guest are the host's, where the world itself keeps what its servers compare with.
        return Ok(());
    }
    let places = "/root /home /etc /tmp /var/log /run /var/lib";
    let search = format!(
        "grep -rlsaF -e {REAL} -e {GIT_TOKEN} {places}; cat /proc/*/environ | tr '\\0' '\\n' | grep -cF -e {REAL} -e {GIT_TOKEN}"
    );
    let found = guest.sh(&hidden(&search))?.out.trim().to_owned();
    let nowhere = found == "0";
    step.check(
        "the real values in the guest's files and processes",
        if nowhere { "nowhere" } else { &found },
        nowhere,
    );
    Ok(())
}

/// The search itself must not be what is found: its values are put together only in the guest.
fn hidden(script: &str) -> String {
    let halves = |value: &str| {
        let (a, b) = value.split_at(value.len() / 2);
        format!("{a}\"\"{b}")
    };
    script.replace(REAL, &halves(REAL)).replace(GIT_TOKEN, &halves(GIT_TOKEN))
}
