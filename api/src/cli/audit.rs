//! `tapgate audit`: what VMs tried to reach, as a table, JSON, or a stream of lines.

use super::exit::{Done, Exit, Failure};
use super::output::{cell, line, rows};
use super::{Api, Options};
use serde_json::Value;
use std::collections::HashMap;
use std::num::NonZeroUsize;
use std::path::PathBuf;
use std::time::Duration;

const COLUMNS: &[(&str, &str)] = &[
    ("TIME", "timestamp"),
    ("VM", "vm_id"),
    ("PROTOCOL", "protocol"),
    ("DESTINATION", "destination"),
    ("VERDICT", "verdict"),
    ("PASSED", "allowed"),
    ("MODE", "mode"),
    ("REASON", "reason"),
    ("REQUEST", "request"),
    ("SECRETS", "secrets"),
];
const POLL: Duration = Duration::from_secs(1);
/// Events of different parts are written a little out of order: following looks back this far.
const OVERLAP: jiff::SignedDuration = jiff::SignedDuration::from_secs(5);

/// `tapgate audit`.
#[derive(clap::Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Of this VM (ID or name)
    #[arg(long)]
    vm: Option<String>,
    /// allowed or denied
    #[arg(long)]
    verdict: Option<String>,
    /// Whether it passed: true or false
    #[arg(long)]
    allowed: Option<bool>,
    /// enforce or warn
    #[arg(long)]
    mode: Option<String>,
    /// To this host
    #[arg(long)]
    host: Option<String>,
    /// To an address in this range
    #[arg(long)]
    cidr: Option<String>,
    /// http, tls, tcp, udp, icmp or dns
    #[arg(long)]
    protocol: Option<String>,
    /// After this time: 2026-02-28T12:00:00Z, or so long ago: 90s, 10m, 2h, 7d
    #[arg(long)]
    since: Option<String>,
    /// Before this time
    #[arg(long)]
    until: Option<String>,
    /// Events at most
    #[arg(long, default_value = "50")]
    limit: NonZeroUsize,
    /// Go on with new events as they come; with --json one a line
    #[arg(short, long, conflicts_with = "until")]
    follow: bool,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Subcommand, Debug)]
enum Command {
    /// On the daemon's host: check the log for changes made outside of tapgate
    Verify {
        /// Where the daemon's state lives
        #[arg(long, env = "TAPGATE_DATA_DIR", value_name = "DIR", default_value = "/var/lib/tapgate")]
        data_dir: PathBuf,
    },
}

impl Args {
    pub(super) fn run(self) -> Done {
        if let Some(Command::Verify { data_dir }) = self.command {
            let done = crate::admin::verify(data_dir);
            return done.map_err(|error| Failure::new(Exit::Other, format!("{error:#}")));
        }
        let api = Api::new(&self.options)?;
        let mut query: Vec<(&str, String)> = Vec::new();
        if let Some(vm) = &self.vm {
            query.push(("vm_id", api.vm_id(vm)?));
        }
        for (name, given) in [
            ("verdict", self.verdict.clone()),
            ("allowed", self.allowed.map(|allowed| allowed.to_string())),
            ("mode", self.mode.clone()),
            ("host", self.host.clone()),
            ("cidr", self.cidr.clone()),
            ("protocol", self.protocol.clone()),
            ("since", self.since.as_deref().map(moment).transpose()?),
            ("until", self.until.as_deref().map(moment).transpose()?),
        ] {
            query.extend(given.map(|given| (name, given)));
        }
        let page = u32::try_from(self.limit.get().min(500)).unwrap_or(500);
        let mut events = api.list("/v1/audit/egress", &query, page, self.limit.get())?;
        // The newest were asked for; people read downwards.
        events.reverse();
        if !self.follow {
            if !api.json {
                events.iter_mut().for_each(shape);
            }
            return rows(api.json, COLUMNS, events);
        }
        let began = events.last().and_then(|event| event["timestamp"].as_str()).map(str::to_owned);
        let mut seen = HashMap::new();
        print(&api, events, &mut seen)?;
        follow(&api, query, began, seen)
    }
}

/// Prints what was not printed yet.
fn print(api: &Api, events: Vec<Value>, seen: &mut HashMap<String, String>) -> Done {
    for mut event in events {
        let field = |name: &str| event[name].as_str().unwrap_or_default().to_owned();
        if seen.insert(field("id"), field("timestamp")).is_some() {
            continue;
        }
        if api.json {
            line(&event.to_string())?;
        } else {
            shape(&mut event);
            let cells: Vec<_> = COLUMNS.iter().map(|(_, field)| cell(&event[*field])).collect();
            line(&cells.join("  "))?;
        }
    }
    Ok(())
}

fn follow(
    api: &Api,
    mut query: Vec<(&str, String)>,
    began: Option<String>,
    mut seen: HashMap<String, String>,
) -> Done {
    let now = || format!("{:.6}", jiff::Timestamp::now());
    let mut newest = began.unwrap_or_else(now);
    query.push(("order", "asc".into()));
    loop {
        std::thread::sleep(POLL);
        let since = newest.parse::<jiff::Timestamp>().ok().and_then(|time| time.checked_sub(OVERLAP).ok());
        let since = since.map_or_else(|| newest.clone(), |time| format!("{time:.6}"));
        query.retain(|(name, _)| *name != "since");
        query.push(("since", since.clone()));
        let events = api.list("/v1/audit/egress", &query, 500, usize::MAX)?;
        if let Some(last) = events.last().and_then(|event| event["timestamp"].as_str()) {
            newest = newest.max(last.to_owned());
        }
        print(api, events, &mut seen)?;
        seen.retain(|_, timestamp| *timestamp >= since);
    }
}

/// Folds several fields into the two that people look at.
fn shape(event: &mut Value) {
    let mut destination = match (&event["host"], &event["address"]) {
        (Value::String(host), _) => host.clone(),
        (_, Value::String(address)) if address.contains(':') => format!("[{address}]"),
        (_, Value::String(address)) => address.clone(),
        _ => "-".to_owned(),
    };
    if let Some(port) = event["port"].as_u64() {
        destination.push_str(&format!(":{port}"));
    }
    let parts = ["method", "path", "status"].map(|name| match &event[name] {
        Value::Null => String::new(),
        given => cell(given),
    });
    let request = parts.join(" ").trim().to_owned();
    event["destination"] = destination.into();
    event["request"] = if request.is_empty() { Value::Null } else { request.into() };
    if event["count"].as_u64().unwrap_or(1) > 1 {
        let protocol = format!("{} x{}", cell(&event["protocol"]), event["count"]);
        event["protocol"] = protocol.into();
    }
}

/// A time, or so long ago.
fn moment(text: &str) -> Done<String> {
    let wrong = || {
        Failure::usage(format!(
            "`{text}` is neither a time like 2026-02-28T12:00:00Z nor like 90s, 10m, 2h, 7d"
        ))
    };
    if let Ok(time) = text.parse::<jiff::Timestamp>() {
        return Ok(format!("{time:.6}"));
    }
    let unit = text.chars().last().ok_or_else(wrong)?;
    let number: i64 = text[..text.len() - unit.len_utf8()].parse().map_err(|_| wrong())?;
    let seconds = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let ago = number.checked_mul(seconds).filter(|ago| *ago >= 0).ok_or_else(wrong)?;
    let time =
        jiff::Timestamp::now().checked_sub(jiff::SignedDuration::from_secs(ago)).map_err(|_| wrong())?;
    Ok(format!("{time:.6}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_times_or_ages() {
        assert_eq!(moment("2026-02-28T12:00:00Z").unwrap(), "2026-02-28T12:00:00.000000Z");
        assert!(moment("10m").unwrap() < moment("1s").unwrap());
        for wrong in ["", "m", "-5m", "10x", "yesterday", "10\u{e9}"] {
            assert!(moment(wrong).is_err(), "{wrong}");
        }
    }
}
