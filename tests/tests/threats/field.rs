//! The field that attacks are tried on: a world, the daemon, a guest's namespace; what the guest received and what went wrong.
//! Attacks go on after one that succeeds, so that a test's end names all of them.

use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::Value;
use std::{
    collections::{BTreeMap, HashSet},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    api::Client,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    sites::{self, Site},
};
use tapgate_netns::Netns;

/// A real value, and whose servers may see it.
pub struct Real {
    pub value: &'static str,
    pub sites: &'static [Site],
}

/// What the audit has to say of an attempt.
#[derive(Clone, Copy, Debug)]
pub enum Event {
    /// It was let through, for this reason.
    Passed(&'static str),
    /// It was denied and let through all the same (mode `warn`).
    Tolerated(&'static str),
    /// It was refused, for this reason.
    Refused(&'static str),
}

impl Event {
    fn is(self, event: &Value) -> bool {
        let (verdict, allowed, reason) = match self {
            Self::Passed(reason) => ("allowed", true, reason),
            Self::Tolerated(reason) => ("denied", true, reason),
            Self::Refused(reason) => ("denied", false, reason),
        };
        event["verdict"] == verdict && event["allowed"] == allowed && event["reason"] == reason
    }
}

pub struct Field<'world> {
    pub stage: Stage<'world>,
    guest: Netns,
    told: HashSet<String>,
    received: Vec<(String, Vec<u8>)>,
    failures: Vec<String>,
    reals: &'static [Real],
}

/// Makes a field, runs the attacks, and asserts that none succeeded.
pub fn on_field(reals: &'static [Real], attacks: impl FnOnce(&mut Field<'_>)) {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let prefix = format!("{}-", world.names().egress());
    let name = std::fs::read_dir("/run/netns")
        .unwrap()
        .filter_map(|entry| entry.unwrap().file_name().into_string().ok())
        .find(|name| name.starts_with(&prefix));
    let guest = Netns::open(&name.expect("the guest's namespace")).unwrap();
    let mut field =
        Field { stage, guest, told: HashSet::new(), received: Vec::new(), failures: Vec::new(), reals };
    attacks(&mut field);
    field.conclude();
}

impl<'world> Field<'world> {
    pub fn api(&self) -> &Client<'world> {
        self.stage.api()
    }

    pub fn world(&self) -> &'world World {
        self.stage.world()
    }

    /// Runs a client in the guest; what it received is kept.
    pub fn guest(&mut self, what: &str, client: impl FnOnce() -> Vec<u8> + Send) -> Vec<u8> {
        let got = self.guest.run(client).unwrap();
        self.received.push((what.to_owned(), got.clone()));
        got
    }

    /// What the guest received last.
    pub fn last_received(&self) -> &[u8] {
        self.received.last().map_or(&[], |(_, bytes)| bytes)
    }

    /// Runs a client in the guest and waits for what the audit has to say of it; nothing else may have passed.
    pub fn attempt(
        &mut self,
        what: &str,
        wanted: &[Event],
        client: impl FnOnce() -> Vec<u8> + Send,
    ) -> Vec<u8> {
        let got = self.guest(what, client);
        self.expect_events(what, wanted);
        got
    }

    /// Waits for events that were not told yet; nothing else may have passed.
    pub fn expect_events(&mut self, what: &str, wanted: &[Event]) {
        let fresh =
            self.fresh_events(|fresh| wanted.iter().all(|wanted| fresh.iter().any(|event| wanted.is(event))));
        let said: Vec<String> = fresh.iter().map(gist).collect();
        for wanted in wanted {
            let came = fresh.iter().any(|event| wanted.is(event));
            self.check(came, || format!("{what}: no event {wanted:?}, but {said:?}"));
        }
        let stray = |event: &Value| event["allowed"] == true && !wanted.iter().any(|wanted| wanted.is(event));
        self.check(!fresh.iter().any(stray), || format!("{what}: passed: {said:?}"));
    }

    /// Waits until an attempt is told of, which has to be refused for one of these reasons.
    pub fn expect_refusal(&mut self, what: &str, among: &[&str]) {
        let fresh = self.fresh_events(|fresh| !fresh.is_empty());
        let right = |event: &Value| {
            event["allowed"] == false && among.iter().any(|reason| event["reason"] == *reason)
        };
        let said: Vec<String> = fresh.iter().map(gist).collect();
        self.check(!fresh.is_empty() && fresh.iter().all(right), || {
            format!("{what}: {said:?}, not {among:?}")
        });
    }

    /// Events that were not told yet, once they are enough; as they are, if that does not come.
    fn fresh_events(&mut self, enough: impl Fn(&[Value]) -> bool) -> Vec<Value> {
        let mut fresh: Vec<Value> = Vec::new();
        for _ in 0..100 {
            let path = format!("/v1/audit/egress?vm_id={}&limit=100&order=desc", self.stage.vm().unwrap());
            let page = self.api().get(&path).unwrap().expect(200).unwrap();
            for event in page["data"].as_array().unwrap() {
                if self.told.insert(event["id"].as_str().unwrap().to_owned()) {
                    fresh.push(event.clone());
                }
            }
            if enough(&fresh) {
                break;
            }
            thread::sleep(Duration::from_millis(50));
        }
        fresh
    }

    /// Notes a failure unless this holds.
    pub fn check(&mut self, holds: bool, failure: impl FnOnce() -> String) {
        if !holds {
            let failure = failure();
            eprintln!("FAILED {failure}");
            self.failures.push(failure);
        }
    }

    /// What this site's servers kept of every connection, octet by octet, and of every request.
    pub fn kept_by(&self, site: Site) -> String {
        kept(&self.world().journal().entries().unwrap()).remove(site.name).unwrap_or_default()
    }

    /// How many packets went to the site so far.
    pub fn arrived(&self, site: Site) -> u64 {
        self.world().counters().unwrap().of(site)
    }

    fn conclude(mut self) {
        let entries = self.world().journal().entries().unwrap();
        let kept = kept(&entries);
        let events = self.api().audit(self.stage.vm().unwrap(), "").unwrap();
        let told = Value::from(events).to_string() + &self.stage.daemon().log();
        let mut leaks = Vec::new();
        for real in self.reals {
            let spellings = spellings(real.value);
            let holds = |text: &str| spellings.iter().any(|spelling| text.contains(spelling));
            for (site, text) in &kept {
                if !real.sites.iter().any(|allowed| allowed.name == site) && holds(text) {
                    leaks.push(format!("{} is in what {site} got", real.value));
                }
            }
            for (what, bytes) in &self.received {
                if holds(&latin(bytes)) {
                    leaks.push(format!("{what}: the guest received {}", real.value));
                }
            }
            if holds(&told) {
                leaks.push(format!("{} is in the audit or the log", real.value));
            }
            // Where nothing arrives, nothing is shown.
            let arrived = |site: &Site| kept.get(site.name).is_some_and(|text| text.contains(real.value));
            if !real.sites.iter().any(arrived) {
                leaks.push(format!("{} never arrived where it may", real.value));
            }
        }
        self.failures.append(&mut leaks);
        let failures = std::mem::take(&mut self.failures);
        assert!(failures.is_empty(), "{} attacks:\n{}", failures.len(), failures.join("\n"));
        self.stage.clear().unwrap();
    }
}

/// An event in a few words.
fn gist(event: &Value) -> String {
    let target = event["host"].as_str().or(event["cidr"].as_str()).unwrap_or("-");
    let passed = if event["allowed"] == true { "passed" } else { "refused" };
    format!("{} {target} {passed} {}", event["protocol"], event["reason"])
}

/// By site, and `dns` for the name server.
fn kept(entries: &[Value]) -> BTreeMap<String, String> {
    let mut streams: BTreeMap<(String, String), String> = BTreeMap::new();
    for entry in entries {
        let site = entry["site"].as_str().unwrap_or("dns").to_owned();
        // A connection's octets one after another, else a value could hide across two reads.
        match entry["octets"].as_str() {
            Some(octets) => {
                let stream = format!("{}{}{}", entry["local"], entry["peer"], entry["layer"]);
                streams.entry((site, stream)).or_default().push_str(octets);
            }
            None => {
                let all = streams.entry((site, String::new())).or_default();
                all.push_str(&entry.to_string());
                all.push('\n');
            }
        }
    }
    let mut sites: BTreeMap<String, String> = BTreeMap::new();
    for ((site, _), text) in streams {
        let all = sites.entry(site).or_default();
        all.push_str(&text);
        all.push('\n');
    }
    sites
}

/// A value as it is, as it stands in URLs, HTML and JSON, and in Base64, wherever it begins there.
fn spellings(value: &str) -> Vec<String> {
    let url = |octet: u8| match octet {
        b'-' | b'_' | b'.' | b'0'..=b'9' | b'A'..=b'Z' | b'a'..=b'z' => char::from(octet).to_string(),
        _ => format!("%{octet:02X}"),
    };
    let html = value.replace('&', "&amp;").replace('<', "&lt;");
    let json = value.replace('/', "\\/");
    let mut all = vec![value.to_owned(), value.bytes().map(url).collect(), html, json];
    for skip in 0..3 {
        let coded = STANDARD.encode(["x".repeat(skip).as_bytes(), value.as_bytes()].concat());
        // What the octets around it change is left off at both ends.
        let first = (skip * 8).div_ceil(6);
        let last = (skip + value.len()) * 8 / 6;
        all.push(coded[first..last].to_owned());
    }
    all
}

/// Each octet as one character.
pub fn latin(bytes: &[u8]) -> String {
    bytes.iter().map(|octet| char::from(*octet)).collect()
}

/// Whether the sensor works: what comes to the attacker's server is found in what it kept.
pub fn the_attacker_sees_what_comes(field: &mut Field<'_>) {
    let rule = field.api().rule("host", sites::EVIL.name).unwrap();
    let name = sites::EVIL.name;
    for (scheme, mark) in [("http", "mark-in-clear"), ("https", "mark-in-tls")] {
        // A secret for any host has it opened.
        let done = field.stage.sh(&format!("curl -sSk --max-time 20 {scheme}://{name}/{mark}")).unwrap();
        let kept = field.kept_by(sites::EVIL);
        field.check(kept.contains(mark), || {
            format!("the attacker's server does not see what comes: {done:?}")
        });
        field.expect_events(mark, &[Event::Passed("host")]);
    }
    field.api().remove_rule(&rule).unwrap();
}
