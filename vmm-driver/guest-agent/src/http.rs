//! As much HTTP as the guest service needs: one GET or PUT a connection, by address, with an entity tag. Bounded in size and
//! time.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::time::Duration;

/// The gateway's guest service.
pub const SERVICE: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::new(169, 254, 169, 254)), 80);

const CONNECT: Duration = Duration::from_secs(10);
/// The service holds a question for 30 s.
const READ: Duration = Duration::from_secs(60);
const MAX: u64 = 16 << 20;

/// An answer of the service.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer {
    /// 200, with its tag.
    New(String, Option<String>),
    /// 304.
    Same,
    /// 404.
    None,
}

/// Asks for a path; with a tag only for what differs from it.
pub fn get(path: &str, tag: Option<&str>) -> Result<Answer, String> {
    let tag = tag.map(|tag| format!("If-None-Match: {tag}\r\n")).unwrap_or_default();
    let head = format!("GET {path} HTTP/1.1\r\nHost: {}\r\n{tag}Connection: close\r\n\r\n", SERVICE.ip());
    parse(&exchange(head.as_bytes(), b"")?)
}

/// Sends a body; answers the status.
pub fn put(path: &str, body: &[u8], kind: &str) -> Result<u16, String> {
    let head = format!(
        "PUT {path} HTTP/1.1\r\nHost: {}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
        SERVICE.ip(),
        body.len()
    );
    let bytes = exchange(head.as_bytes(), body)?;
    let line = bytes.split(|byte| *byte == b'\r').next().unwrap_or_default();
    let status = std::str::from_utf8(line).ok().and_then(|line| line.split(' ').nth(1)?.parse().ok());
    status.ok_or_else(|| "the guest service's answer was cut".to_owned())
}

fn exchange(head: &[u8], body: &[u8]) -> Result<Vec<u8>, String> {
    let io = |e: std::io::Error| format!("the guest service: {e}");
    let mut stream = TcpStream::connect_timeout(&SERVICE, CONNECT).map_err(io)?;
    stream.set_read_timeout(Some(READ)).map_err(io)?;
    stream.set_write_timeout(Some(CONNECT)).map_err(io)?;
    stream.write_all(head).and_then(|()| stream.write_all(body)).map_err(io)?;
    let mut bytes = Vec::new();
    stream.take(MAX).read_to_end(&mut bytes).map_err(io)?;
    Ok(bytes)
}

fn parse(bytes: &[u8]) -> Result<Answer, String> {
    let text = std::str::from_utf8(bytes).map_err(|_| "the guest service's answer is not UTF-8")?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or("the guest service's answer was cut")?;
    let mut lines = head.split("\r\n");
    let status = lines.next().and_then(|line| line.split(' ').nth(1)).unwrap_or_default();
    let header = |wanted: &str| {
        lines.clone().find_map(|line| {
            let (name, value) = line.split_once(':')?;
            name.eq_ignore_ascii_case(wanted).then(|| value.trim())
        })
    };
    match status {
        "200" => {
            // Without a length nobody knows whether it is whole.
            let length: usize = header("content-length")
                .and_then(|value| value.parse().ok())
                .ok_or("an answer without a length")?;
            if body.len() != length {
                return Err("the guest service's answer was cut".into());
            }
            let tag = header("etag").filter(|tag| !tag.contains(char::is_control)).map(str::to_owned);
            Ok(Answer::New(body.to_owned(), tag))
        }
        "304" => Ok(Answer::Same),
        "404" => Ok(Answer::None),
        other => Err(format!("the guest service answered {other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_answers_are_taken_and_others_are_not() {
        let whole = b"HTTP/1.1 200 OK\r\nETag: \"a\"\r\ncontent-length: 2\r\n\r\nhi";
        assert_eq!(parse(whole).unwrap(), Answer::New("hi".into(), Some("\"a\"".into())));
        assert_eq!(parse(b"HTTP/1.1 404 Not Found\r\n\r\n").unwrap(), Answer::None);
        assert_eq!(parse(b"HTTP/1.1 304 Not Modified\r\n\r\n").unwrap(), Answer::Same);
        for broken in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n",
            b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
            b"\xff\xfe",
            b"",
        ] {
            assert!(parse(broken).is_err(), "{}", String::from_utf8_lossy(broken));
        }
    }
}
