//! `cargo xtask bench datapath`: what the datapath costs, in Markdown on stdout. Needs root.
//!
//! Everything happens in network namespaces of its own. `--long` measures a thousand VMs and for longer; without it the
//! same in small, to show that everything runs.
#![allow(clippy::unwrap_used, reason = "a measurement that fails may panic")]

#[path = "../../tests/common/mod.rs"]
mod common;
#[path = "../../../common/tests/frames/mod.rs"]
mod frames;

mod changes;
mod empty;
mod forwarding;
mod packets;

fn main() {
    let long = std::env::args().any(|argument| argument == "--long");
    let only = std::env::var("BENCH_ONLY").ok();
    let wanted = |part: &str| only.as_deref().is_none_or(|only| only == part);
    if wanted("packets") {
        packets::measure(long);
    }
    if wanted("forwarding") {
        forwarding::measure(long);
    }
    if wanted("changes") {
        changes::measure(long);
    }
}

/// The middle one.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
