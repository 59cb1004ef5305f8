//! DNS messages of a guest: never a panic; what is answered parses again and names what was asked.
#![no_main]

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "each target runs one")]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cases::dns(bytes));
