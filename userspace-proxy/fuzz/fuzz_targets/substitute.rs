//! Substitution: without a placeholder nothing changes; what was put in is what is reported.
#![no_main]

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "each target runs one")]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cases::substitute(bytes));
