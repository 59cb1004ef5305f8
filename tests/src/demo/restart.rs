//! Step 7: the daemon is killed without warning. A loop in the guest goes on trying meanwhile; its notes are read when
//! there is a way in again.

use super::{Step, stage::Stage};
use crate::sites;
use anyhow::{Context as _, Result};
use std::{thread, time::Duration};

/// Step 7.
pub fn killed(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let (name, ca) = (sites::API.name, stage.world_ca());
    let (notes, pid) = (format!("{}/notes", stage.scratch()), format!("{}/loop", stage.scratch()));
    let vm = stage.vm()?.to_owned();
    let boot = "cat /proc/sys/kernel/random/boot_id";
    let guest = stage.guest()?.clone();
    let boot_before = guest.expect(boot)?;
    let request =
        format!("curl -sS -o /dev/null -w %{{http_code}} --max-time 5 --cacert {ca} https://{name}/");
    guest.expect(&format!(
        "rm -f {notes}; nohup sh -c 'while sleep 0.5; do {request} >> {notes} 2>&1; echo >> {notes}; done' \
         >/dev/null 2>&1 </dev/null & echo $! > {pid}"
    ))?;
    let mut before = String::new();
    for _ in 0..40 {
        before = guest.expect(&format!("tail -n 1 {notes} 2>/dev/null || true"))?;
        if before == "200" {
            break;
        }
        thread::sleep(Duration::from_millis(500));
    }
    step.check("a loop in the guest, before", before.clone(), before == "200");

    stage.daemon_mut().kill()?;
    guest.hang_up();
    // What was under way when it died may still be on the wire.
    thread::sleep(Duration::from_secs(2));
    let (counters, journal) = (stage.world().counters()?, stage.world().journal().mark());
    thread::sleep(Duration::from_secs(8));
    let arrived = stage.world().counters()?.since(&counters);
    step.check("packets in the internet while it is dead", arrived.any().to_string(), arrived.any() == 0);
    let seen = journal.entries()?.len();
    step.check("what the servers saw meanwhile", format!("{seen} entries"), seen == 0);

    stage.daemon_mut().start_again().context("starting the daemon again")?;
    let states = stage.api().wait_ready(&vm)?;
    step.check("the VM after the daemon's start", states.join(" → "), true);
    stage.enter(vm)?;
    let guest = stage.guest()?;
    let told = guest.expect(&format!("kill $(cat {pid}); cat {notes}"))?;
    let failures = told.lines().filter(|line| line.contains("curl:")).count();
    let last = told.lines().rfind(|line| line.contains("curl:")).unwrap_or("none");
    step.check("the loop, while it was dead", format!("{failures} failures: {last}"), failures > 0);
    let boot_after = guest.expect(boot)?;
    let same = boot_before == boot_after;
    step.check("the guest was booted again", if same { "no" } else { "yes" }, same);
    let done = guest.sh(&format!("curl -sS --max-time 30 --cacert {ca} https://{name}/"))?;
    step.check(format!("curl https://{name}/"), done.gist(), done.out.contains("hello from"));
    Ok(())
}
