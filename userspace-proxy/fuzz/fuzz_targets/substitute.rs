//! Substitution: without a placeholder nothing changes; what was put in is what is reported.
#![no_main]

mod support;

use http::{HeaderMap, HeaderValue, header};
use libfuzzer_sys::fuzz_target;
use tapgate_proxy::internal::{Channel, substitute_headers};

fuzz_target!(|bytes: &[u8]| {
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return };
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, value.clone());
    let host = "a.example".parse().expect("a name");
    let policy = support::policy();
    let Ok(outcome) = substitute_headers(&mut headers, &policy, &host, Channel::Verified) else { return };
    assert_eq!(outcome.injected.is_empty(), headers[header::AUTHORIZATION] == value);
    let mut nowhere = HeaderMap::new();
    nowhere.insert(header::AUTHORIZATION, value.clone());
    let left = substitute_headers(&mut nowhere, &policy, &host, Channel::Nowhere).expect("nothing grows");
    assert!(left.injected.is_empty() && nowhere[header::AUTHORIZATION] == value);
    assert_eq!(left.withheld, outcome.injected);
});
