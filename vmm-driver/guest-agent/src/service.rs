//! The resident part: listens for the power button and keeps what the boot had no time for.

use crate::{apply, power, trust};

/// Applies the seed if nothing has yet, then stays.
pub fn run() -> Result<(), String> {
    if let Err(error) = apply::run() {
        eprintln!("seed: {error}");
    }
    power::listen();
    if let Err(error) = trust::apply_java() {
        eprintln!("java: {error}");
    }
    loop {
        std::thread::park();
    }
}
