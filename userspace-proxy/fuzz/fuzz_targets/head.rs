//! An HTTP/1 head: what passes holds no line end but CR LF, and one Host.
#![no_main]

#[path = "../cases/mod.rs"]
#[allow(dead_code, reason = "each target runs one")]
mod cases;

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| cases::head(bytes));
