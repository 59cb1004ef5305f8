//! A rule that goes ends what it had let out, also where the guest reads nothing more and only sends.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, StreamBody, combinators::UnsyncBoxBody};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    convert::Infallible,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::{SERVER, World, world};
use tapgate_model::{Mode, Reason, Verdict};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    task::JoinHandle,
    time::{sleep, timeout},
};

const SECRET: &[(&str, &str, &[&str])] = &[("token", "ghp_realvalue0123456789", &["api.example"])];
const PIECE: &[u8] = &[b'x'; 16 * 1024];

trait Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static {}
impl<S: AsyncRead + AsyncWrite + Unpin + Send + 'static> Stream for S {}

/// Octets that moved at the upstream.
#[derive(Default)]
struct Moved {
    received: AtomicUsize,
    sent: AtomicUsize,
}

/// What never ends, counted.
fn endless(count: impl Fn(usize) + Send + 'static) -> UnsyncBoxBody<Bytes, Infallible> {
    let frames = futures_util::stream::repeat_with(move || {
        count(PIECE.len());
        Ok(Frame::data(Bytes::from_static(PIECE)))
    });
    StreamBody::new(frames).boxed_unsync()
}

/// Answers at once and without end, and reads on; ends when no more comes.
async fn upstream_http1(stream: impl Stream, moved: Arc<Moved>) {
    let (mut read, mut write) = tokio::io::split(stream);
    let mut buffer = vec![0; 64 * 1024];
    let _ = read.read(&mut buffer).await.unwrap();
    let sent = moved.clone();
    let writer = tokio::spawn(async move {
        let head = "HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n";
        write.write_all(head.as_bytes()).await.unwrap();
        while let Ok(length) = write.write(PIECE).await {
            sent.sent.fetch_add(length, Ordering::Relaxed);
        }
    });
    while let Ok(length @ 1..) = read.read(&mut buffer).await {
        moved.received.fetch_add(length, Ordering::Relaxed);
    }
    writer.abort();
}

async fn upstream_http2(stream: impl Stream, moved: Arc<Moved>) {
    let (ended, mut end) = tokio::sync::mpsc::unbounded_channel();
    let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
        let (moved, ended) = (moved.clone(), ended.clone());
        let sent = moved.clone();
        tokio::spawn(async move {
            let mut body = request.into_body();
            while let Some(Ok(frame)) = body.frame().await {
                moved.received.fetch_add(frame.into_data().unwrap().len(), Ordering::Relaxed);
            }
            ended.send(()).unwrap();
        });
        let body = endless(move |octets| {
            sent.sent.fetch_add(octets, Ordering::Relaxed);
        });
        async move { Ok::<_, Infallible>(Response::new(body)) }
    });
    let connection = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        _ = connection => {}
        _ = end.recv() => {}
    }
}

async fn upstream(w: &World, tls: bool, http2: bool) -> (Arc<Moved>, JoinHandle<()>) {
    let moved = Arc::<Moved>::default();
    let listener = TcpListener::bind((SERVER, if tls { 443 } else { 80 })).await.unwrap();
    let config = w.ca.server(&["api.example"], &[if http2 { "h2" } else { "http/1.1" }]);
    let counted = moved.clone();
    let task = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        match (tls, http2) {
            (false, false) => upstream_http1(stream, counted).await,
            (false, true) => upstream_http2(stream, counted).await,
            (true, _) => {
                let stream = tokio_rustls::TlsAcceptor::from(config).accept(stream).await.unwrap();
                match http2 {
                    false => upstream_http1(stream, counted).await,
                    true => upstream_http2(stream, counted).await,
                }
            }
        }
    });
    (moved, task)
}

/// Sends without end and reads nothing; ends with the connection.
async fn guest_http1(mut stream: impl Stream) {
    let head = "POST /u HTTP/1.1\r\nHost: api.example\r\nTransfer-Encoding: chunked\r\n\r\n";
    stream.write_all(head.as_bytes()).await.unwrap();
    let chunk = [format!("{:x}\r\n", PIECE.len()).as_bytes(), PIECE, b"\r\n"].concat();
    while stream.write_all(&chunk).await.is_ok() {}
}

async fn guest_http2(stream: impl Stream, scheme: &str) {
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::post(format!("{scheme}://api.example/u")).body(endless(|_| {})).unwrap();
    let _unread = sender.send_request(request).await.unwrap();
    let _ = connection.await.unwrap();
}

async fn guest(w: &World, tls: bool, http2: bool) -> JoinHandle<()> {
    if !tls {
        let stream = w.connect((SERVER, 80)).await;
        return match http2 {
            false => tokio::spawn(guest_http1(stream)),
            true => tokio::spawn(guest_http2(stream, "http")),
        };
    }
    let alpn = if http2 { "h2" } else { "http/1.1" };
    let stream = w.tls((SERVER, 443), "api.example", &[alpn]).await.unwrap();
    assert!(w.is_opened(&stream));
    match http2 {
        false => tokio::spawn(guest_http1(stream)),
        true => tokio::spawn(guest_http2(stream, "https")),
    }
}

fn an_upload_ends_with_its_rule(tls: bool, http2: bool) {
    world(move |mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], SECRET);
        let (moved, upstream) = upstream(&w, tls, http2).await;
        let guest = guest(&w, tls, http2).await;
        // Until the answer is at a standstill and the upload goes on all the same.
        let mut before = usize::MAX;
        while before == 0 || moved.sent.load(Ordering::Relaxed) != before {
            before = moved.sent.load(Ordering::Relaxed);
            sleep(Duration::from_millis(500)).await;
        }
        let received = moved.received.load(Ordering::Relaxed);
        sleep(Duration::from_millis(100)).await;
        assert!(moved.received.load(Ordering::Relaxed) > received, "the upload goes on");
        let received = moved.received.load(Ordering::Relaxed);
        w.rules(Mode::Enforce, &[], SECRET);
        timeout(Duration::from_secs(30), upstream).await.expect("nothing more comes upstream").unwrap();
        let more = moved.received.load(Ordering::Relaxed) - received;
        assert!(more < 32 << 20, "{more} octets after the rule had gone: more than was on the way");
        timeout(Duration::from_secs(30), guest).await.expect("the guest's connection ends").unwrap();
        let event = w.event().await;
        assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Revoked });
        assert!(event.bytes_out > 0 && event.bytes_in > 0);
    });
}

#[test]
fn an_upload_ends_with_its_rule_in_clear_text() {
    an_upload_ends_with_its_rule(false, false);
}

#[test]
fn an_upload_ends_with_its_rule_in_opened_tls() {
    an_upload_ends_with_its_rule(true, false);
}

#[test]
fn an_upload_ends_with_its_rule_over_http2_in_clear_text() {
    an_upload_ends_with_its_rule(false, true);
}

#[test]
fn an_upload_ends_with_its_rule_over_http2() {
    an_upload_ends_with_its_rule(true, true);
}
