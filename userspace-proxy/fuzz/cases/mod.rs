//! What the parsers have to hold for any octets: run by the fuzz targets, and over the seeds and mutations of them by the
//! ordinary test `fuzz`.

mod policy;

use http::{HeaderMap, HeaderValue, header};
use std::io;
use tapgate_model::HostName;
use tapgate_proxy::internal::{
    Authority, Channel, Cleaner, GuardedIo, HelloReader, Named, Patterns, check_head, refuse_question,
    substitute_headers,
};
use tokio::io::AsyncReadExt as _;

async fn through(input: &[u8], size: usize) -> Vec<u8> {
    let chunks: Vec<io::Result<bytes::Bytes>> =
        input.chunks(size).map(|chunk| Ok(bytes::Bytes::copy_from_slice(chunk))).collect();
    let mut guarded = GuardedIo::new(tokio_util::io::StreamReader::new(futures_util::stream::iter(chunks)));
    let mut all = Vec::new();
    guarded.read_to_end(&mut all).await.expect("reading from memory");
    all
}

/// Host names: the name decided on is the name dialled, for every spelling that is let through.
pub fn authority(bytes: &[u8]) {
    if let Ok(Authority { host: Named::Name(name), port }) = Authority::parse(bytes) {
        assert_eq!(HostName::parse_wire(name.as_str().as_bytes()).as_ref(), Ok(&name));
        let uri = http::uri::Authority::try_from(bytes).expect("a stricter form of it");
        let host = uri.host().to_ascii_lowercase();
        assert_eq!(host.strip_suffix('.').unwrap_or(&host), name.as_str());
        assert_eq!(uri.port_u16(), port);
    }
}

/// Cleaning: chunk borders change nothing, and no value is left.
pub fn clean(input: &[u8]) {
    // The first octet says how the rest is split.
    let Some((size, bytes)) = input.split_first() else { return };
    let patterns = Patterns::new(policy::secrets().iter()).expect("few secrets").expect("secrets");
    let mut cleaner = Cleaner::new(patterns.clone());
    let mut out = Vec::new();
    for chunk in bytes.chunks(usize::from(*size).max(1)) {
        out.extend(cleaner.feed(chunk));
    }
    out.extend(cleaner.finish());
    assert_eq!(out, patterns.clean_whole(bytes).unwrap_or_else(|| bytes.to_vec()));
    for (_, value) in policy::VALUES {
        assert!(!out.windows(value.len()).any(|window| window == value.as_bytes()));
    }
}

/// DNS messages of a guest: never a panic; what is answered parses again and names what was asked.
pub fn dns(bytes: &[u8]) {
    if let Some(reply) = refuse_question(bytes) {
        assert!(reply.len() <= 1232);
        assert_eq!(reply[..2], bytes[..2], "the id is the question's");
        assert!(reply[2] & 0x80 != 0, "it is an answer");
    }
}

/// HTTP/1 framing: how the network splits a stream changes nothing of what the library sees.
pub fn guard(input: &[u8]) {
    // The first octet says how the rest is split.
    let Some((size, bytes)) = input.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        assert_eq!(through(bytes, bytes.len().max(1)).await, through(bytes, usize::from(*size).max(1)).await);
    });
}

/// An HTTP/1 head: what passes holds no line end but CR LF, and one Host.
pub fn head(bytes: &[u8]) {
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
}

/// A ClientHello: never a panic, and never an answer from a prefix that the whole would contradict.
pub fn hello(bytes: &[u8]) {
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
}

/// Substitution: without a placeholder nothing changes; what was put in is what is reported.
pub fn substitute(bytes: &[u8]) {
    let Ok(value) = HeaderValue::from_bytes(bytes) else { return };
    let mut headers = HeaderMap::new();
    headers.insert(header::AUTHORIZATION, value.clone());
    let host = "a.example".parse().expect("a name");
    let policy = policy::policy();
    let Ok(outcome) = substitute_headers(&mut headers, &policy, &host, Channel::Verified) else { return };
    assert_eq!(outcome.injected.is_empty(), headers[header::AUTHORIZATION] == value);
    let mut nowhere = HeaderMap::new();
    nowhere.insert(header::AUTHORIZATION, value.clone());
    let left = substitute_headers(&mut nowhere, &policy, &host, Channel::Nowhere).expect("nothing grows");
    assert!(left.injected.is_empty() && nowhere[header::AUTHORIZATION] == value);
    assert_eq!(left.withheld, outcome.injected);
}
