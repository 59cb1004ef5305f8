//! Cleaning: chunk borders change nothing, and no value is left.
#![no_main]

mod support;

use libfuzzer_sys::fuzz_target;
use tapgate_proxy::internal::{Cleaner, Patterns};

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let patterns = Patterns::new(&support::secrets(), Vec::new()).expect("secrets");
    let mut cleaner = Cleaner::new(patterns.clone());
    let mut out = Vec::new();
    for chunk in bytes.chunks(usize::from(size).max(1)) {
        out.extend(cleaner.feed(chunk));
    }
    out.extend(cleaner.finish());
    assert_eq!(out, patterns.clean_whole(bytes).unwrap_or_else(|| bytes.to_vec()));
    for (_, value) in support::VALUES {
        assert!(!out.windows(value.len()).any(|window| window == value.as_bytes()));
    }
});
