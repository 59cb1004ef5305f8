//! DNS messages of a guest: never a panic; what is answered parses again and names what was asked.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tapgate_proxy::internal::refuse_question;

fuzz_target!(|bytes: &[u8]| {
    if let Some(reply) = refuse_question(bytes) {
        assert!(reply.len() <= 1232);
        assert_eq!(reply[..2], bytes[..2], "the id is the question's");
        assert!(reply[2] & 0x80 != 0, "it is an answer");
    }
});
