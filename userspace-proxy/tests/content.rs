//! Bodies where none is usual, and answers whose form says one thing and whose octets another: nothing is lost, and no value
//! comes back in what the form says is not there.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use http::{Method, Request};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty, StreamBody, combinators::UnsyncBoxBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{convert::Infallible, sync::Arc};
use support::{SERVER, World, world};
use tapgate_model::{Mode, Reason, Verdict};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
};

const VALUE: &str = "ghp_realvalue0123456789";
const BEARER: &str = "Bearer IRONSH_PROXY_token";

// Frame types and flags (RFC 9113 §6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const SETTINGS: u8 = 4;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

type Body = UnsyncBoxBody<Bytes, Infallible>;

async fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
}

/// A server on SERVER of which each connection is this function's.
async fn upstream<F: Future<Output = ()> + Send + 'static>(
    w: &World,
    port: u16,
    alpn: &[&str],
    serve: impl Fn(tokio_rustls::server::TlsStream<tokio::net::TcpStream>) -> F + Send + 'static,
) {
    let tls = w.ca.server(&["api.example"], alpn);
    let listener = TcpListener::bind((SERVER, port)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let stream = tokio_rustls::TlsAcceptor::from(tls.clone()).accept(stream).await.unwrap();
            tokio::spawn(serve(stream));
        }
    });
}

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals without indexing, no Huffman code (RFC 7541 §6.2.2).
fn fields(all: &[(&str, &str)]) -> Vec<u8> {
    let short = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    all.iter().flat_map(|(name, value)| [vec![0], short(name), short(value)].concat()).collect()
}

/// Answers the request on stream 1 with these frames.
async fn answer_http2<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, answer: Vec<u8>) {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await.unwrap();
    stream.write_all(&frame(SETTINGS, 0, 0, b"")).await.unwrap();
    loop {
        let mut head = [0; 9];
        if stream.read_exact(&mut head).await.is_err() {
            return;
        }
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        let reply = match head[3] {
            SETTINGS if head[4] & ACK == 0 => frame(SETTINGS, ACK, 0, b""),
            HEADERS => answer.clone(),
            _ => continue,
        };
        stream.write_all(&reply).await.unwrap();
    }
}

async fn http2<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
) -> hyper::client::conn::http2::SendRequest<Body> {
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn request(method: Method, port: u16, body: Body) -> Request<Body> {
    let builder = Request::builder().method(method).uri(format!("https://api.example:{port}/"));
    builder.header("authorization", BEARER).body(body).unwrap()
}

fn empty() -> Body {
    Empty::new().boxed_unsync()
}

#[test]
fn an_answer_without_a_body_has_none_whatever_comes() {
    world(|mut w| async move {
        start(&mut w).await;
        let head = |status: &str| frame(HEADERS, END_HEADERS, 1, &fields(&[(":status", status)]));
        let data = frame(DATA, END_STREAM, 1, VALUE.as_bytes());
        let trailers = frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&[("x-sum", VALUE)]));
        let cases = [
            (Method::GET, "204", &data),
            (Method::GET, "204", &trailers),
            (Method::GET, "304", &data),
            (Method::GET, "304", &trailers),
            (Method::HEAD, "200", &trailers),
        ];
        for ((method, status, rest), port) in cases.into_iter().zip(9001..) {
            let answer = [&head(status)[..], rest].concat();
            upstream(&w, port, &["h2"], move |stream| answer_http2(stream, answer.clone())).await;
            let mut sender = http2(w.tls((SERVER, port), "api.example", &["h2"]).await.unwrap()).await;
            let answer = sender.send_request(request(method.clone(), port, empty())).await.unwrap();
            assert_eq!(answer.status().as_str(), status);
            let all = answer.into_body().collect().await.unwrap();
            assert_eq!(all.trailers(), None, "{method} {status}");
            assert_eq!(all.to_bytes(), "", "{method} {status}");
        }
    });
}

#[test]
fn a_granted_upgrade_says_nothing_of_the_servers_own() {
    world(|mut w| async move {
        start(&mut w).await;
        upstream(&w, 443, &["http/1.1"], |mut stream| async move {
            let _ = stream.read_buf(&mut Vec::new()).await;
            let head = format!("HTTP/1.1 101 {VALUE}\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n");
            stream.write_all(&[head.as_bytes(), b"\x81\x05hello"].concat()).await.unwrap();
            let _ = stream.read_u8().await;
        })
        .await;
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        let head = format!(
            "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\nAuthorization: {BEARER}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        while !all.ends_with(b"hello") {
            assert_ne!(stream.read_buf(&mut all).await.unwrap(), 0);
        }
        let all = String::from_utf8_lossy(&all);
        assert!(all.starts_with("HTTP/1.1 101 ") && !all.contains(VALUE), "{all}");
    });
}

const SMUGGLED: &str = "GET /smuggled HTTP/1.1\r\nHost: api.example\r\n\r\n";

#[test]
fn a_body_of_unknown_length_goes_with_any_method() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        // HTTP/1 in chunks, the next request behind it.
        for method in ["GET", "HEAD", "DELETE", "POST"] {
            let both = format!(
                "{method} /one HTTP/1.1\r\nHost: api.example\r\nTransfer-Encoding: chunked\r\n\r\n{:x}\r\n{SMUGGLED}\r\n0\r\n\r\nGET /two HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n",
                SMUGGLED.len()
            );
            let answer = w.https((SERVER, 443), "api.example", &both).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{method}: {answer}");
            let seen: Vec<_> = w.log.seen().into_iter().map(|seen| (seen.line, seen.body)).collect();
            let expected = [
                (format!("{method} /one HTTP/1.1"), Bytes::from(SMUGGLED)),
                ("GET /two HTTP/1.1".to_owned(), Bytes::new()),
            ];
            assert_eq!(seen, expected);
            w.log.forget();
        }
        // HTTP/2, which needs no ALPN, to an upstream that has no HTTP/2.
        let mut sender = http2(w.tls((SERVER, 443), "api.example", &[]).await.unwrap()).await;
        for method in [Method::GET, Method::HEAD, Method::POST] {
            let frames = [SMUGGLED, "more"].map(|text| Ok(Frame::data(Bytes::from(text))));
            let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
            let answer = sender.send_request(request(method.clone(), 443, body)).await.unwrap();
            assert_eq!(answer.status(), 200);
            let _ = answer.into_body().collect().await.unwrap();
            let answer = sender.send_request(request(Method::GET, 443, empty())).await.unwrap();
            assert_eq!(answer.status(), 200);
            let seen = w.log.seen();
            assert_eq!(seen[0].line, format!("{method} / HTTP/1.1"));
            assert_eq!(seen[0].body, [SMUGGLED, "more"].concat(), "{method}");
            assert_eq!(seen.len(), 2, "{seen:?}");
            assert_eq!(seen[1].header("transfer-encoding"), None);
            w.log.forget();
        }
    });
}

#[test]
fn an_empty_answer_in_a_coding_is_an_empty_answer() {
    world(|mut w| async move {
        start(&mut w).await;
        // None by its length, by its chunks, and by the end of the connection.
        let endings: [&str; 3] =
            ["Content-Length: 0\r\n\r\n", "Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "\r\n"];
        let codings = ["gzip", "deflate", "br", "zstd", "gzip, br"];
        let mut ports = 9001..;
        for coding in codings {
            for (ending, port) in endings.into_iter().zip(&mut ports) {
                let head = Arc::new(format!("HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\n{ending}"));
                upstream(&w, port, &["http/1.1"], move |mut stream| {
                    let head = head.clone();
                    async move {
                        let _ = stream.read_buf(&mut Vec::new()).await;
                        stream.write_all(head.as_bytes()).await.unwrap();
                        let _ = stream.shutdown().await;
                    }
                })
                .await;
                let stream = w.tls((SERVER, port), "api.example", &["http/1.1"]).await.unwrap();
                let (mut sender, connection) =
                    hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
                tokio::spawn(connection);
                let request = Request::get("/").header("host", format!("api.example:{port}"));
                let answer = sender.send_request(request.body(empty()).unwrap()).await.unwrap();
                assert_eq!(answer.status(), 200);
                let all = answer.into_body().collect().await;
                assert_eq!(all.unwrap().to_bytes(), "", "{coding} {ending:?}");
            }
        }
        let frames = [
            frame(HEADERS, END_HEADERS, 1, &fields(&[(":status", "200"), ("content-encoding", "gzip")])),
            frame(DATA, END_STREAM, 1, b""),
        ]
        .concat();
        upstream(&w, 443, &["h2"], move |stream| answer_http2(stream, frames.clone())).await;
        let mut sender = http2(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        let answer = sender.send_request(request(Method::GET, 443, empty())).await.unwrap();
        assert_eq!(answer.into_body().collect().await.unwrap().to_bytes(), "");
    });
}

#[test]
fn what_cannot_be_looked_for_is_not_passed_unlooked() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        // Far more than an account may have, in characters that are the longest when they are spelled out.
        let values: Vec<_> =
            (10..40).map(|n| (format!("s{n}"), format!("{n}{}", "\"".repeat(16_000)))).collect();
        let hosts: &[&str] = &["api.example"];
        let secrets: Vec<_> = values.iter().map(|(name, value)| (&name[..], &value[..], hosts)).collect();
        w.rules(Mode::Enforce, &["api.example"], &secrets);
        for credentials in ["Bearer IRONSH_PROXY_s10", "Basic eDpJUk9OU0hfUFJPWFlfczEw"] {
            let request = format!(
                "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nAuthorization: {credentials}\r\n\r\n"
            );
            let answer = w.https((SERVER, 443), "api.example", &request).await;
            assert!(answer.starts_with("HTTP/1.1 502"), "{}", &answer[..200]);
            let event = w.event().await;
            assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Fault });
            assert!(event.secrets.is_empty(), "nothing went out");
        }
        assert!(w.log.seen().is_empty());
    });
}
