//! One HTTP request over a Unix socket: how Firecracker and Cloud Hypervisor are spoken to.
//!
//! The other side is a VMM that a guest may have taken over: answers are bounded and every request has a deadline.

use crate::spec::VmmError;
use http_body_util::{BodyExt as _, Full, Limited};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use std::os::unix::net::UnixStream as StdUnixStream;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::time::timeout;

const MAX_ANSWER: usize = 1 << 20;
/// The longest time that a VMM may think about one request.
pub const DEADLINE: Duration = Duration::from_secs(10);

/// A request as data.
#[derive(Clone, Debug, PartialEq)]
pub struct Request {
    /// `GET`, `PUT` or `PATCH`.
    pub method: &'static str,
    /// The path.
    pub path: String,
    /// The body, if it has one.
    pub body: Option<Value>,
}

impl Request {
    /// A question.
    pub fn get(path: &str) -> Self {
        Self { method: "GET", path: path.into(), body: None }
    }

    /// A `PUT` with a body.
    pub fn put(path: &str, body: Value) -> Self {
        Self { method: "PUT", path: path.into(), body: Some(body) }
    }

    /// A `PUT` without one.
    pub fn act(path: &str) -> Self {
        Self { method: "PUT", path: path.into(), body: None }
    }

    /// A `PATCH`.
    pub fn patch(path: &str, body: Value) -> Self {
        Self { method: "PATCH", path: path.into(), body: Some(body) }
    }
}

/// Sends the request and answers the answer's body. What is refused is an error with the VMM's own words.
pub async fn send(stream: StdUnixStream, request: &Request) -> Result<Value, VmmError> {
    let what = format!("{} {}", request.method, request.path);
    match timeout(DEADLINE, exchange(stream, request, &what)).await {
        Ok(result) => result,
        Err(_) => Err(VmmError::Silent(format!("no answer to {what} within {} s", DEADLINE.as_secs()))),
    }
}

async fn exchange(stream: StdUnixStream, request: &Request, what: &str) -> Result<Value, VmmError> {
    let failed = |error: &dyn std::fmt::Display| VmmError::Control(format!("{what}: {error}"));
    stream.set_nonblocking(true).map_err(|e| failed(&e))?;
    let stream = TokioIo::new(UnixStream::from_std(stream).map_err(|e| failed(&e))?);
    let (mut sender, connection) =
        hyper::client::conn::http1::handshake(stream).await.map_err(|e| failed(&e))?;
    let body = request.body.as_ref().map(Value::to_string).unwrap_or_default();
    let mut message = hyper::Request::builder()
        .method(request.method)
        .uri(request.path.as_str())
        .header("host", "localhost")
        .header("accept", "application/json");
    if request.body.is_some() {
        message = message.header("content-type", "application/json");
    }
    let message = message.body(Full::new(bytes::Bytes::from(body))).map_err(|e| failed(&e))?;
    let answer = async {
        let answer = sender.send_request(message).await.map_err(|e| failed(&e))?;
        let status = answer.status();
        let body =
            Limited::new(answer.into_body(), MAX_ANSWER).collect().await.map_err(|e| failed(&e))?.to_bytes();
        if !status.is_success() {
            let words: String =
                String::from_utf8_lossy(&body).chars().filter(|c| !c.is_control()).take(500).collect();
            return Err(failed(&format!("{status} {words}")));
        }
        if body.is_empty() {
            return Ok(Value::Null);
        }
        serde_json::from_slice(&body).map_err(|_| failed(&"its answer is not JSON"))
    };
    tokio::pin!(connection);
    tokio::pin!(answer);
    tokio::select! {
        result = &mut answer => result,
        // The VMM may close the connection behind its answer: what it sent before is still read.
        result = &mut connection => match result {
            Ok(()) => answer.await,
            Err(error) => Err(failed(&error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::io::{Read as _, Write as _};

    async fn answered(bytes: &'static [u8]) -> Result<Value, VmmError> {
        let (ours, mut theirs) = StdUnixStream::pair().unwrap();
        std::thread::spawn(move || {
            let mut request = [0u8; 4096];
            let n = theirs.read(&mut request).unwrap();
            let text = String::from_utf8_lossy(&request[..n]).into_owned();
            assert!(text.starts_with("PUT /actions HTTP/1.1\r\n") && text.ends_with("{\"a\":1}"), "{text}");
            let _ = theirs.write_all(bytes);
        });
        send(ours, &Request::put("/actions", json!({"a": 1}))).await
    }

    #[tokio::test]
    async fn answers_are_read_and_refusals_keep_their_words() {
        assert_eq!(answered(b"HTTP/1.1 204 \r\nServer: x\r\n\r\n").await.unwrap(), Value::Null);
        let body = b"HTTP/1.1 200 \r\nContent-Length: 7\r\n\r\n{\"b\":2}";
        assert_eq!(answered(body).await.unwrap(), json!({"b": 2}));
        let refused = b"HTTP/1.1 400 \r\nContent-Length: 3\r\n\r\nbad";
        assert!(answered(refused).await.unwrap_err().to_string().ends_with("bad"));
        assert!(answered(b"rubbish\r\n\r\n").await.is_err());
        assert!(answered(b"").await.is_err());
    }
}
