//! One HTTP/1 request head, read strictly: it has one meaning or none.
//!
//! Stricter than the HTTP library that serves it (RFC 9112 §2.2 lets a recipient be): whatever two parsers could read
//! differently is refused, so that nothing can be smuggled. Must never allow what the library would refuse.

use crate::http::authority::Authority;
use tapgate_model::Reason;

/// Most header fields of one request.
const MAX_FIELDS: usize = 100;

/// How long the body is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Framing {
    /// There is none, or it has this many octets.
    Length(u64),
    /// Chunks until the last.
    Chunked,
}

/// A head that has one meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// What follows it.
    pub framing: Framing,
    /// Whether the client asks to speak another protocol afterwards.
    pub upgrade: bool,
}

/// Why a head is refused: the reason for the audit, and a sentence for whoever sent it.
pub type Refused = (Reason, &'static str);

const fn bad(why: &'static str) -> Refused {
    (Reason::BadRequest, why)
}

/// Checks a whole head, from the method to the empty line.
pub fn check_head(bytes: &[u8]) -> Result<Head, Refused> {
    lines(bytes)?;
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    match request.parse(bytes) {
        Ok(httparse::Status::Complete(length)) if length == bytes.len() => {}
        Err(httparse::Error::TooManyHeaders) => return Err(bad("more than 100 header fields")),
        _ => return Err(bad("the request does not parse as HTTP/1")),
    }
    let (Some(method), Some(target), Some(version)) = (request.method, request.path, request.version) else {
        return Err(bad("the request line is not whole"));
    };
    let host = one(request.headers, "host", "more than one Host field")?;
    if host.is_none() && version == 1 {
        return Err(bad("an HTTP/1.1 request needs a Host field"));
    }
    check_target(method, target, host)?;
    // HTTP/1.0 knows no Upgrade: a recipient ignores it (RFC 9110 §7.8).
    let upgrade = upgrade(request.headers)? && version == 1;
    Ok(Head { framing: framing(request.headers, version)?, upgrade })
}

/// Line ends are CR LF, none is folded, and no octet is one that some parser would end a line at.
fn lines(bytes: &[u8]) -> Result<(), Refused> {
    let Some(body) = bytes.strip_suffix(b"\r\n\r\n") else {
        return Err(bad("the head does not end in an empty line"));
    };
    let mut rest = body;
    let mut first = true;
    loop {
        let end = rest.iter().position(|b| matches!(b, b'\r' | b'\n' | 0)).unwrap_or(rest.len());
        let (line, after) = rest.split_at(end);
        match line.first() {
            None => return Err(bad("an empty line inside the head")),
            Some(b' ' | b'\t') => return Err(bad("a folded header line")),
            Some(_) => {}
        }
        if first {
            let spaces = line.iter().filter(|b| matches!(b, b' ' | b'\t')).count();
            if spaces != 2 || line.contains(&b'\t') {
                return Err(bad("the request line is not three words with one space between"));
            }
            first = false;
        }
        match after {
            [] => return Ok(()),
            [b'\r', b'\n', after @ ..] => rest = after,
            _ => return Err(bad("a line that does not end in CR LF")),
        }
    }
}

/// The field's only value, if it is there.
fn one<'a>(
    fields: &[httparse::Header<'a>],
    name: &str,
    twice: &'static str,
) -> Result<Option<&'a [u8]>, Refused> {
    let mut values = fields.iter().filter(|field| field.name.eq_ignore_ascii_case(name));
    let value = values.next().map(|field| field.value);
    if values.next().is_some() { Err(bad(twice)) } else { Ok(value) }
}

fn check_target(method: &str, target: &str, host: Option<&[u8]>) -> Result<(), Refused> {
    if method == "CONNECT" {
        return Err((Reason::Tunnel, "CONNECT: the gate is no proxy to ask; connect to the host itself"));
    }
    if target.bytes().any(|b| !(b'!'..=b'~').contains(&b) || b == b'#') {
        return Err(bad("the request target holds a character that no URL has"));
    }
    if target.starts_with('/') || target == "*" && method == "OPTIONS" {
        return Ok(());
    }
    let lower = target.get(..8).unwrap_or(target).to_ascii_lowercase();
    let (rest, default_port) = match (lower.starts_with("http://"), lower.starts_with("https://")) {
        (true, _) => (&target[7..], 80),
        (_, true) => (&target[8..], 443),
        _ => return Err(bad("the request target is neither a path nor an http URL")),
    };
    let authority = rest.split(['/', '?']).next().unwrap_or_default();
    let same = |a: &Authority, b: &Authority| {
        a.same_host(b) && a.port.unwrap_or(default_port) == b.port.unwrap_or(default_port)
    };
    match host.map(|host| (Authority::parse(authority.as_bytes()), Authority::parse(host))) {
        Some((Ok(target), Ok(host))) if same(&target, &host) => Ok(()),
        Some(_) => {
            Err((Reason::NameMismatch, "the URL in the request line and the Host field name different hosts"))
        }
        None => Err(bad("a URL in the request line needs a Host field that says the same")),
    }
}

fn framing(fields: &[httparse::Header<'_>], version: u8) -> Result<Framing, Refused> {
    let length = one(fields, "content-length", "more than one Content-Length field")?;
    let encoding = one(fields, "transfer-encoding", "more than one Transfer-Encoding field")?;
    match (length, encoding) {
        (None, None) => Ok(Framing::Length(0)),
        (Some(_), Some(_)) => Err(bad("both Content-Length and Transfer-Encoding")),
        (Some(digits), None) => {
            let digits = std::str::from_utf8(digits).ok().filter(|d| !d.is_empty() && d.len() <= 18);
            let digits = digits.filter(|digits| digits.bytes().all(|b| b.is_ascii_digit()));
            let length = digits.and_then(|digits| digits.parse().ok());
            length.map(Framing::Length).ok_or(bad("Content-Length is not a number"))
        }
        (None, Some(coding)) if version == 1 && coding.eq_ignore_ascii_case(b"chunked") => {
            Ok(Framing::Chunked)
        }
        (None, Some(_)) => Err(bad("a Transfer-Encoding other than chunked")),
    }
}

/// WebSocket may follow; `h2c` and `TLS` are merely offers and are not passed on; nothing else is let through.
fn upgrade(fields: &[httparse::Header<'_>]) -> Result<bool, Refused> {
    match one(fields, "upgrade", "more than one Upgrade field")? {
        None => Ok(false),
        Some(value) if value.eq_ignore_ascii_case(b"websocket") => Ok(true),
        Some(value) if value.eq_ignore_ascii_case(b"h2c") || value.starts_with(b"TLS/") => Ok(false),
        Some(_) => Err((Reason::Tunnel, "an Upgrade to a protocol that the gate cannot read")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn head(text: &str) -> Result<Head, Refused> {
        check_head(text.as_bytes())
    }

    #[test]
    fn ordinary_requests_pass() {
        for (text, framing) in [
            ("GET / HTTP/1.1\r\nHost: a.example\r\n\r\n", Framing::Length(0)),
            ("GET /?q=a HTTP/1.0\r\n\r\n", Framing::Length(0)),
            ("POST /x HTTP/1.1\r\nHost: a.example:8080\r\nContent-Length: 12\r\n\r\n", Framing::Length(12)),
            ("POST /x HTTP/1.1\r\nhost: a\r\ntransfer-encoding: Chunked\r\n\r\n", Framing::Chunked),
            ("GET http://a.example/x HTTP/1.1\r\nHost: A.example.:80\r\n\r\n", Framing::Length(0)),
            ("OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", Framing::Length(0)),
            ("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n", Framing::Length(0)),
        ] {
            assert_eq!(head(text).map(|head| head.framing), Ok(framing), "{text:?}");
        }
        assert!(head("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\n\r\n").unwrap().upgrade);
        assert!(!head("GET / HTTP/1.0\r\nHost: a\r\nUpgrade: websocket\r\n\r\n").unwrap().upgrade);
    }

    #[test]
    fn what_could_be_read_in_two_ways_is_refused() {
        for text in [
            "",
            "GET / HTTP/1.1\r\n\r\n",
            "GET / HTTP/1.1\nHost: a\n\n",
            "GET / HTTP/1.1\r\nHost: a\n\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\rX: b\r\n\r\n",
            "\r\nGET / HTTP/1.1\r\nHost: a\r\n\r\n",
            " GET / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET  / HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET\t/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1 \r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n",
            "GET / HTTP/1.1\r\nHost : a\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nX: \0\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1, 1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: +1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x1\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length:\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n",
            "GET / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n",
            "GET /#a HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n",
            "GET http://a/ HTTP/1.0\r\n\r\n",
            "GET / HTTP/1.1\r\nHost: a\r\n\r\nX",
        ] {
            assert_eq!(head(text).unwrap_err().0, Reason::BadRequest, "{text:?}");
        }
        let many = (0..=MAX_FIELDS).map(|n| format!("X{n}: y\r\n")).collect::<String>();
        assert!(head(&format!("GET / HTTP/1.1\r\nHost: a\r\n{many}\r\n")).is_err());
    }

    #[test]
    fn other_names_and_tunnels_have_their_own_reason() {
        for (text, reason) in [
            ("GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", Reason::NameMismatch),
            ("GET http://a.example@b/ HTTP/1.1\r\nHost: a.example\r\n\r\n", Reason::NameMismatch),
            ("GET http://a:81/ HTTP/1.1\r\nHost: a\r\n\r\n", Reason::NameMismatch),
            ("GET http://a?/ HTTP/1.1\r\nHost: b\r\n\r\n", Reason::NameMismatch),
            ("CONNECT a.example:443 HTTP/1.1\r\nHost: a.example\r\n\r\n", Reason::Tunnel),
            ("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: socks\r\n\r\n", Reason::Tunnel),
            ("GET / HTTP/1.1\r\nHost: a\r\nUpgrade: websocket, x\r\n\r\n", Reason::Tunnel),
        ] {
            assert_eq!(head(text).unwrap_err().0, reason, "{text:?}");
        }
    }
}
