//! HTTP/2 on both sides, driven frame by frame rather than through the library that serves HTTP/1, which neither hears nor sends
//! what comes before an answer. One task a connection reads and writes; each stream has a task of its own.
//!
//! Must never hold more of a stream than its window lets out, nor keep a stream whose other side is gone.

mod body;
pub(super) mod client;
mod outbox;
mod ping;
mod pipe;
pub(super) mod server;
mod tunnel;

pub(super) use body::Streamed;
pub(super) use tunnel::{Promise, Tunnel};

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Largest frame that is taken, the protocol's own.
const MAX_FRAME: u32 = 16 * 1024;

/// Takes out what belongs to a connection of HTTP/1 (RFC 9113 §8.2.2). What `Connection` names went before.
fn strip_connection(headers: &mut HeaderMap) {
    for name in [
        header::CONNECTION,
        HeaderName::from_static("keep-alive"),
        HeaderName::from_static("proxy-connection"),
        header::TRANSFER_ENCODING,
        header::UPGRADE,
    ] {
        headers.remove(name);
    }
}

/// The length that a head announces, if it announces one.
fn content_length(headers: &HeaderMap) -> Option<u64> {
    let mut length = None;
    for value in headers.get_all(header::CONTENT_LENGTH) {
        for one in value.to_str().ok()?.split(',') {
            let one = one.trim();
            let one = one.bytes().all(|octet| octet.is_ascii_digit()).then(|| one.parse().ok())??;
            if *length.get_or_insert(one) != one {
                return None;
            }
        }
    }
    length
}

fn set_content_length(headers: &mut HeaderMap, length: u64) {
    headers.entry(header::CONTENT_LENGTH).or_insert_with(|| HeaderValue::from(length));
}
