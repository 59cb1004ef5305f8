//! Applies a seed, step by step; a step that fails is reported and does not keep the others from being done.
//!
//! Order matters only where it says so: identity first (a restored disk must not keep another machine's keys).

use crate::{files, identity, init::say, net, seed, trust};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Present in /run once the seed was applied in this boot.
const DONE: &str = "/run/tapgate-applied";

/// Reads the seed disk and applies all of it, once a boot.
pub fn run() -> Result<(), String> {
    if Path::new(DONE).exists() {
        return Ok(());
    }
    let seed = seed::read()?;
    let mut failures = Vec::new();
    let mut step = |name: &str, result: Result<(), String>| {
        if let Err(error) = result {
            failures.push(format!("{name}: {error}"));
        }
    };
    step("identity", identity::apply(seed.instance_id()));
    step("hostname", identity::set_hostname(&seed.user));
    step("network", net::apply(&seed.network));
    for (name, result) in user_data(&seed.user) {
        step(name, result);
    }
    step("ssh host keys", identity::host_keys());
    step("disk", identity::grow_root());
    step("writing out", identity::settle(seed.instance_id()));
    if let Err(error) = fs::write(DONE, b"") {
        failures.push(format!("{DONE}: {error}"));
    }
    for failure in &failures {
        say(failure);
    }
    if failures.is_empty() { Ok(()) } else { Err(failures.join("; ")) }
}

/// Applies what can also change while the guest runs: keys, certificates, files.
pub fn user_data(user: &Value) -> Vec<(&'static str, Result<(), String>)> {
    vec![
        ("ssh keys", identity::authorized_keys(user)),
        ("certificates", trust::apply(user)),
        ("files", files::apply(user)),
    ]
}
