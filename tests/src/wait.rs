//! Waiting for what comes about by itself. Must never wait without end.

use std::{
    thread,
    time::{Duration, Instant},
};

/// Longer than anything takes that a test waits for.
const PATIENCE: Duration = Duration::from_secs(90);
const PAUSE: Duration = Duration::from_millis(100);

/// Looks until it is so.
///
/// # Panics
/// If it never is.
pub fn until(what: &str, mut is: impl FnMut() -> bool) {
    let started = Instant::now();
    while started.elapsed() < PATIENCE {
        if is() {
            return;
        }
        thread::sleep(PAUSE);
    }
    panic!("never: {what}");
}
