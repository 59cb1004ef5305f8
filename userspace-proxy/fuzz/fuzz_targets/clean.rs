//! Cleaning: chunk borders change nothing, and no value is left.
#![no_main]

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "each target runs one")]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cases::clean(bytes));
