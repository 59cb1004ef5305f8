//! The steps about the VM itself, rules for hosts and ranges, and the mode `warn`.

use super::{Step, stage::Stage};
use crate::{sh, sites};
use anyhow::{Context as _, Result};
use std::{thread, time::Duration};

/// Step 1.
pub fn create(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let states = stage.boot("demo")?;
    step.check("the VM's states", states.join(" → "), true);
    let who = stage.guest()?.expect("id -un; hostname; uname -r")?;
    let who: Vec<&str> = who.lines().collect();
    step.check("logged in by SSH", who.join(", "), who.first() == Some(&"root"));
    Ok(())
}

/// Step 3.
pub fn host_rule(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let name = sites::API.name;
    stage.api().rule("host", name)?;
    let (guest, ca) = (stage.guest()?, stage.world_ca());
    let done = guest.sh(&format!("curl -sS --max-time 30 --cacert {ca} https://{name}/"))?;
    step.check(format!("curl https://{name}/"), done.gist(), done.ok() && done.out.contains("hello from"));
    let shown = guest.expect(&format!(
        "openssl s_client -connect {name}:443 -servername {name} </dev/null 2>/dev/null | openssl x509 -noout \
         -fingerprint -sha256"
    ))?;
    let file = stage.world().certificate_file(name);
    let own =
        sh::run("openssl", ["x509", "-noout", "-fingerprint", "-sha256", "-in", &file.to_string_lossy()])?;
    let same = fingerprint(&shown) == fingerprint(&own);
    step.check("the certificate that the guest sees", short(fingerprint(&shown)), same);
    step.check("the server's own certificate", short(fingerprint(&own)), same);
    let other = guest.sh(&format!("curl -sS --max-time 30 https://{}/", sites::ECHO.name))?;
    step.check(format!("curl https://{}/ (no rule)", sites::ECHO.name), other.gist(), refused(other.code));
    Ok(())
}

/// Step 5.
pub fn cidr_rule(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let address = sites::FILES.v4;
    let rule = stage.api().rule("cidr", &format!("{address}/32"))?;
    let (guest, at) = (stage.guest()?, stage.scratch());
    let talk =
        format!("timeout 20 bash -c 'exec 3<>/dev/tcp/{address}/7; printf over-tcp >&3; head -c 8 <&3'");
    let done = guest.sh(&talk)?;
    step.check(format!("TCP echo with {address} port 7"), done.gist(), done.out == "over-tcp");
    let done = guest.sh(&format!("ping -c 3 -W 5 {address}"))?;
    let line = done.out.lines().find(|line| line.contains("received")).unwrap_or(done.gist()).to_owned();
    step.check(format!("ping {address}"), line, done.ok());
    guest.expect(&format!(
        "rm -f {at}/got {at}/ended; \
         (curl -sS -o {at}/got http://{address}:9000/endless 2>{at}/why; echo $? > {at}/ended) >/dev/null 2>&1 </dev/null &"
    ))?;
    let size = || -> Result<u64> {
        Ok(guest.expect(&format!("stat -c %s {at}/got 2>/dev/null || echo 0"))?.parse()?)
    };
    let mut before = 0;
    for _ in 0..40 {
        before = size()?;
        if before > 0 {
            break;
        }
        thread::sleep(Duration::from_millis(250));
    }
    step.check("a download runs", format!("{before} bytes so far"), before > 0);
    stage.api().remove_rule(&rule)?;
    let mut ended = String::new();
    for _ in 0..60 {
        ended = guest
            .expect(&format!("cat {at}/ended 2>/dev/null; cat {at}/why 2>/dev/null || true"))?
            .replace('\n', ": ");
        if !ended.is_empty() {
            break;
        }
        thread::sleep(Duration::from_millis(500));
    }
    let cut = !ended.is_empty() && !ended.starts_with('0');
    let seen = if ended.is_empty() { "it still runs".to_owned() } else { format!("curl ended with {ended}") };
    step.check("the rule is taken away", seen, cut);
    let done = guest.sh(&talk)?;
    let refused = !done.out.contains("over-tcp");
    step.check("TCP echo again", if refused { "refused" } else { "an answer" }, refused);
    Ok(())
}

/// Step 6.
pub fn warn(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let (name, ca) = (sites::OTHER.name, stage.world_ca());
    stage.api().mode("warn")?;
    let done = stage.guest()?.sh(&format!("curl -sS --max-time 30 --cacert {ca} https://{name}/"))?;
    stage.api().mode("enforce")?;
    step.check(
        format!("curl https://{name}/ (no rule, mode warn)"),
        done.gist(),
        done.out.contains("hello from"),
    );
    let events = super::audit::wait_for(stage, &format!("&host={name}"), |event| {
        event["mode"] == "warn" && event["protocol"] == "tls"
    })?;
    let event = events.last().context("the audit has no TLS event of it")?;
    let (verdict, allowed) = (&event["verdict"], &event["allowed"]);
    let told = format!("verdict {verdict}, allowed {allowed}");
    step.check("the audit's event", told, verdict == "denied" && *allowed == true);
    let done = stage.guest()?.sh(&format!("curl -sS --max-time 30 --cacert {ca} https://{name}/"))?;
    step.check("back in mode enforce, the same curl", done.gist(), refused(done.code));
    Ok(())
}

/// Whether curl failed, and not by waiting in vain.
pub fn refused(code: i32) -> bool {
    code != 0 && code != 28
}

fn fingerprint(text: &str) -> &str {
    text.trim().rsplit('=').next().unwrap_or("")
}

fn short(fingerprint: &str) -> String {
    let head: String = fingerprint.chars().take(29).collect();
    if head.is_empty() { "none".into() } else { format!("{head}…") }
}
