//! Host names: the name decided on is the name dialled, for every spelling that is let through.
#![no_main]

use libfuzzer_sys::fuzz_target;
use tapgate_model::HostName;
use tapgate_proxy::internal::{Authority, Named};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Authority { host: Named::Name(name), port }) = Authority::parse(bytes) {
        assert_eq!(HostName::parse_wire(name.as_str().as_bytes()).as_ref(), Ok(&name));
        let uri = http::uri::Authority::try_from(bytes).expect("a stricter form of it");
        let host = uri.host().to_ascii_lowercase();
        assert_eq!(host.strip_suffix('.').unwrap_or(&host), name.as_str());
        assert_eq!(uri.port_u16(), port);
    }
});
