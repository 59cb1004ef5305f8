//! Hop-by-hop header fields (RFC 9110 §7.6.1): what belongs to one connection is not passed on to the next.

use http::{HeaderMap, HeaderName, HeaderValue, header};

/// Fields that are never passed on, in either direction.
const HOP_BY_HOP: [HeaderName; 7] = [
    header::CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("http2-settings"),
    header::TE,
];

/// What `Connection` may not take out: without these the message would mean something else.
fn vital(name: &HeaderName) -> bool {
    matches!(*name, header::HOST | header::CONTENT_LENGTH | header::CONTENT_ENCODING | header::CONTENT_TYPE)
}

/// Takes out what is hop-by-hop, and what `Connection` names. `TE: trailers` stays: gRPC asks for it.
pub(crate) fn strip_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(header::CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .filter(|name| !vital(name))
        .collect();
    let trailers =
        headers.get_all(header::TE).iter().any(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    for name in named.iter().chain(&HOP_BY_HOP) {
        headers.remove(name);
    }
    if trailers {
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
    }
}

/// Trailers may not say what only a header may (RFC 9110 §6.5.1): framing, routing, credentials.
pub(crate) fn strip_trailers(trailers: &mut HeaderMap) {
    strip_hop_by_hop(trailers);
    for name in [
        header::HOST,
        header::CONTENT_LENGTH,
        header::CONTENT_ENCODING,
        header::CONTENT_TYPE,
        header::CONTENT_RANGE,
        header::TRAILER,
        header::TE,
        header::AUTHORIZATION,
        header::PROXY_AUTHORIZATION,
        header::COOKIE,
        header::SET_COOKIE,
        header::EXPECT,
        header::MAX_FORWARDS,
    ] {
        trailers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_connection_names_goes_too_except_what_is_vital() {
        let mut headers = HeaderMap::new();
        for (name, value) in [
            ("connection", "close, X-Own, host"),
            ("x-own", "1"),
            ("x-other", "2"),
            ("host", "a"),
            ("keep-alive", "1"),
            ("te", "Trailers"),
            ("upgrade", "h2c"),
            ("http2-settings", "x"),
        ] {
            headers.append(HeaderName::from_static(name), HeaderValue::from_static(value));
        }
        strip_hop_by_hop(&mut headers);
        let mut left: Vec<_> = headers.keys().map(HeaderName::as_str).collect();
        left.sort_unstable();
        assert_eq!(left, ["host", "te", "x-other"]);
        strip_trailers(&mut headers);
        assert_eq!(headers.len(), 1);
    }
}
