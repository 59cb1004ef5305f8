//! An HTTP/1 head: what passes holds no line end but CR LF, and one Host.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tapgate_proxy::internal::check_head;

fuzz_target!(|bytes: &[u8]| {
    if check_head(bytes).is_ok() {
        let mut last = 0;
        for byte in bytes {
            assert_eq!(*byte == b'\n', last == b'\r', "a line ends in CR LF");
            assert_ne!(*byte, 0);
            last = *byte;
        }
        let text = String::from_utf8_lossy(bytes).to_ascii_lowercase();
        assert!(text.matches("\r\nhost:").count() <= 1);
        assert!(!(text.contains("\r\ncontent-length:") && text.contains("\r\ntransfer-encoding:")));
    }
});
