//! Reading the audit log: for the steps that look for an event, and as the table at the end.

use super::{Step, stage::Stage};
use crate::sites;
use anyhow::Result;
use serde_json::Value;
use std::{fs, thread, time::Duration};

/// Writing is batched: how often we look again, five times a second.
const TRIES: usize = 50;
/// Rows of the table that are shown.
const ROWS: usize = 60;

/// The VM's events, once they are as wanted; as they are, if that does not come.
pub fn wait_until(stage: &Stage<'_>, wanted: impl Fn(&[Value]) -> bool) -> Result<Vec<Value>> {
    let mut events = Vec::new();
    for _ in 0..TRIES {
        events = stage.api().audit(stage.vm()?, "")?;
        if wanted(&events) {
            break;
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(events)
}

/// The VM's events of this filter that are as wanted, once there is one.
pub fn wait_for(stage: &Stage<'_>, filter: &str, wanted: impl Fn(&Value) -> bool) -> Result<Vec<Value>> {
    for _ in 0..TRIES {
        let events = stage.api().audit(stage.vm()?, filter)?;
        let fitting: Vec<Value> = events.into_iter().filter(&wanted).collect();
        if !fitting.is_empty() {
            return Ok(fitting);
        }
        thread::sleep(Duration::from_millis(200));
    }
    Ok(Vec::new())
}

/// An event in a few words.
pub fn gist(event: &Value) -> String {
    let word = |key: &str| event[key].as_str().unwrap_or("-").to_owned();
    format!("{}, allowed {}, reason {}", word("verdict"), event["allowed"], word("reason"))
}

/// Step 8.
pub fn table(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let events = stage.api().audit(stage.vm()?, "")?;
    for row in rows(&events) {
        step.check("", row, true);
    }
    let count = |wanted: fn(&Value) -> bool| events.iter().filter(|event| wanted(event)).count();
    let allowed = count(|event| event["verdict"] == "allowed");
    let tolerated = count(|event| event["verdict"] == "denied" && event["allowed"] == true);
    let denied = count(|event| event["verdict"] == "denied" && event["allowed"] == false);
    let told = format!("{allowed} allowed, {tolerated} tolerated, {denied} denied");
    step.check("in all", told, allowed > 0 && tolerated > 0 && denied > 0);
    let host = |name: &str| events.iter().any(|event| event["host"] == name && event["verdict"] == "allowed");
    for name in [sites::API.name, sites::ECHO.name, sites::GIT.name] {
        step.check(format!("{name} allowed"), if host(name) { "yes" } else { "no event" }, host(name));
    }
    let text = Value::from(events).to_string();
    let told = stage.secrets.iter().any(|secret| text.contains(secret));
    step.check("a secret in the audit", if told { "yes" } else { "none" }, !told);
    let log = stage.daemon().log();
    let told = stage.secrets.iter().any(|secret| log.contains(secret));
    step.check("a secret in the daemon's log", if told { "yes" } else { "none" }, !told);
    let holds =
        |bytes: &[u8], secret: &String| bytes.windows(secret.len()).any(|part| part == secret.as_bytes());
    let files = stage.daemon().state_files();
    let clear = files.iter().find(|file| {
        fs::read(file).is_ok_and(|bytes| stage.secrets.iter().any(|secret| holds(&bytes, secret)))
    });
    let told =
        clear.map_or_else(|| format!("none in {} files", files.len()), |file| file.display().to_string());
    step.check("a secret in clear in the daemon's state", told, clear.is_none());
    Ok(())
}

/// The events as a table, the same ones after one another counted.
fn rows(events: &[Value]) -> Vec<String> {
    let mut rows: Vec<(String, u64)> = Vec::new();
    for event in events {
        let word = |key: &str| match &event[key] {
            Value::String(text) => text.clone(),
            Value::Null => "-".to_owned(),
            other => other.to_string(),
        };
        let target = if event["host"].is_string() { word("host") } else { word("cidr") };
        let row = format!(
            "{:<5} {:<32} {:>5}  {:<8} {:<7} {:<6} {}",
            word("protocol"),
            target,
            word("port"),
            word("verdict"),
            if event["allowed"] == true { "passed" } else { "held" },
            word("mode"),
            word("reason"),
        );
        let count = event["count"].as_u64().unwrap_or(1);
        match rows.last_mut() {
            Some((last, times)) if *last == row => *times += count,
            _ => rows.push((row, count)),
        }
    }
    let more = rows.len().saturating_sub(ROWS);
    let mut lines: Vec<String> = rows
        .into_iter()
        .take(ROWS)
        .map(|(row, times)| if times > 1 { format!("{row}  × {times}") } else { row })
        .collect();
    if more > 0 {
        lines.push(format!("… and {more} more"));
    }
    lines
}
