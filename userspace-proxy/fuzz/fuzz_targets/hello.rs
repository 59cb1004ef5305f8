//! A ClientHello: never a panic, and never an answer from a prefix that the whole would contradict.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tapgate_proxy::internal::HelloReader;

fuzz_target!(|bytes: &[u8]| {
    let whole = HelloReader::default().advance(bytes);
    let mut reader = HelloReader::default();
    for end in 0..=bytes.len() {
        match reader.advance(&bytes[..end]) {
            Ok(Some(hello)) => {
                assert_eq!(whole.ok().flatten(), Some(hello));
                return;
            }
            Ok(None) => {}
            Err(_) => return,
        }
    }
});
