//! A ClientHello: never a panic, and never an answer from a prefix that the whole would contradict.
#![no_main]

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "each target runs one")]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cases::hello(bytes));
