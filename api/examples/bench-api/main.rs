//! Measures the REST API and its store against the bars of the design and prints Markdown: `cargo xtask bench api`.
//!
//! A real daemon with the namespace driver in a network namespace of its own, asked over loopback at a fixed rate; and the
//! audit log, filled and read in this process. `--long` fills it with ten million events; `audit` or `daemon` measures that alone.
#![allow(clippy::unwrap_used, reason = "a measurement fails by panicking")]

mod audit;
mod load;
mod place;

use std::time::Duration;

/// How thoroughly.
struct Extent {
    /// Of each load.
    load: Duration,
    events: u32,
    vms: usize,
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|first| first == "load") {
        return load::run(&args[1..]);
    }
    let extent = match args.iter().any(|arg| arg == "--long") {
        true => Extent { load: Duration::from_secs(15), events: 10_000_000, vms: 50 },
        false => Extent { load: Duration::from_secs(5), events: 300_000, vms: 10 },
    };
    let only = |part: &str| args.iter().any(|arg| arg == part);
    if !only("audit") {
        place::measure(extent.load, extent.vms);
    }
    if !only("daemon") {
        audit::measure(extent.events);
    }
}

/// One line of a table that says whether a bar is met.
fn bar(what: &str, measured: &str, bar: &str, met: bool) {
    println!("| {what} | {measured} | {bar} | {} |", if met { "yes" } else { "**no**" });
}
