//! Whether a connection begins with something that a server of HTTP could take for a request.
//!
//! What is no HTTP passes by its address, unread. So the question is not whether a line is a good request line but whether it could be
//! one to anybody: servers skip empty lines before it (RFC 9112 §2.2) and take other whitespace for a space (§3), some take any word
//! for a method, a request without a version (HTTP/0.9) or of a protocol made after HTTP, and some take off a header that tells the
//! client's address first. All of these take a token for a method, and a path or a URL, or a version, after it: what has neither in
//! its first line is another protocol (SSH, mail, IRC, Redis), and so is what does not begin with a token (every binary protocol).
//! Must never call something unlike HTTP before its first line is there.

/// What the bytes up to the first line end look like.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Line {
    /// An HTTP/1.x request line, well enough formed for its head to be read.
    Request,
    /// Something that only a lenient server takes for a request.
    Malformed,
    /// No request line.
    Unlike,
    /// It could become one.
    Partial,
}

/// What the PROXY protocol's second version begins with; its first is a line of text.
const PROXY: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";

/// Tells whether a connection begins with a request.
pub(crate) fn first_line(bytes: &[u8]) -> Line {
    if bytes.starts_with(PROXY) {
        return Line::Malformed;
    }
    if PROXY.starts_with(bytes) {
        return Line::Partial;
    }
    let Some(start) = bytes.iter().position(|b| !is_space(*b)) else { return Line::Partial };
    let text = &bytes[start..];
    let method = text.iter().position(|b| !is_token(*b)).unwrap_or(text.len());
    let (method, rest) = text.split_at(method);
    match rest.first() {
        None => return Line::Partial,
        Some(after) if method.is_empty() || !is_space(*after) => return Line::Unlike,
        Some(_) => {}
    }
    let Some(end) = rest.iter().position(|b| *b == b'\n') else {
        return if is_git(method) && rest.contains(&0) { Line::Unlike } else { Line::Partial };
    };
    let line = &rest[..end];
    if start == 0 && ends_in_version(line) {
        return Line::Request;
    }
    if could_be_request(method, line) { Line::Malformed } else { Line::Unlike }
}

/// As it is written, after a space.
fn ends_in_version(line: &[u8]) -> bool {
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    line.starts_with(b" ")
        && matches!(line.last_chunk(), Some([b' ', b'H', b'T', b'T', b'P', b'/', b'1', b'.', b'0'..=b'9']))
}

fn could_be_request(method: &[u8], line: &[u8]) -> bool {
    let mut words = line.split(|b| is_space(*b)).filter(|word| !word.is_empty());
    let target = words.next().unwrap_or_default();
    let made_after = |word: &[u8]| begins(word, b"RTSP/") || begins(word, b"ICE/");
    target.starts_with(b"/")
        || holds(target, b"://")
        || holds(line, b"HTTP/")
        || words.any(made_after)
        || method == b"PROXY" && (begins(target, b"TCP") || begins(target, b"UNKNOWN"))
}

/// A request of git's own protocol has no line end: a length, the service, a path, then a NUL, which no target may hold.
fn is_git(word: &[u8]) -> bool {
    word.split_first_chunk::<4>().is_some_and(|(length, service)| {
        length.iter().all(u8::is_ascii_hexdigit) && service.starts_with(b"git-")
    })
}

fn begins(word: &[u8], with: &[u8]) -> bool {
    word.get(..with.len()).is_some_and(|start| start.eq_ignore_ascii_case(with))
}

fn holds(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window.eq_ignore_ascii_case(part))
}

/// What some reader or other takes for a space (C's `isspace`).
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r')
}

fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_could_be_a_request_is_told_from_what_could_not() {
        for (text, line) in [
            ("", Line::Partial),
            ("GE", Line::Partial),
            ("GET /index.html", Line::Partial),
            ("\r\n\r\n", Line::Partial),
            ("\r\n\r\n\0\r\nQUI", Line::Partial),
            ("ruok", Line::Partial),
            ("GET / HTTP/1.1\r\n", Line::Request),
            ("GET / HTTP/1.0\n", Line::Request),
            ("get / HTTP/1.1\r\n", Line::Request),
            ("\r\nGET / HTTP/1.1\r\n", Line::Malformed),
            ("\u{b}GET / HTTP/1.1\r\n", Line::Malformed),
            ("GET\t/ HTTP/1.1\r\n", Line::Malformed),
            ("GET / HTTP/1.1 \r\n", Line::Malformed),
            ("GET / HTTP/2.0\r\n", Line::Malformed),
            ("GET / http/1.1\r\n", Line::Malformed),
            ("GET x HTTP/1\r\n", Line::Malformed),
            ("PRI * HTTP/2.0\r\n", Line::Malformed),
            ("GET /\r\n", Line::Malformed),
            ("get http://a/\n", Line::Malformed),
            ("OPTIONS * RTSP/1.0\r\n", Line::Malformed),
            ("SOURCE /live ICE/1.0\r\n", Line::Malformed),
            ("EHLO a\rGET / HTTP/1.1\r\n", Line::Request),
            ("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n", Line::Malformed),
            ("PROXY UNKNOWN\r\n", Line::Malformed),
            ("\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", Line::Malformed),
            ("0033git-upload-pack / HTTP/1.1\r\n", Line::Request),
            ("0033git-upload-pack /a.git\0host=a\0", Line::Unlike),
            ("GET /a\0", Line::Partial),
            ("EHLO a.example\r\n", Line::Unlike),
            ("SSH-2.0-OpenSSH_9.2p1 Debian-2\r\n", Line::Unlike),
            ("EHLO a\rGET / HTTP/1.1 \r\n", Line::Malformed),
            ("PING\r\n", Line::Unlike),
            ("*1\r\n$4\r\nPING\r\n", Line::Unlike),
            ("NICK a\r\n", Line::Unlike),
            ("a1 LIST \"\" *\r\n", Line::Unlike),
            ("subscribe service/a\r\n", Line::Unlike),
            ("INVITE sip:a@b SIP/2.0\r\n", Line::Unlike),
            ("{\"id\":", Line::Unlike),
            ("<stream:stream", Line::Unlike),
            ("G\0\0\0", Line::Unlike),
            ("\n\u{8}", Line::Unlike),
        ] {
            assert_eq!(first_line(text.as_bytes()), line, "{text:?}");
        }
    }
}
