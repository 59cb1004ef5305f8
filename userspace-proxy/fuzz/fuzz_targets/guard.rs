//! HTTP/1 framing: how the network splits a stream changes nothing of what the library sees.
#![no_main]

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "each target runs one")]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cases::guard(bytes));
