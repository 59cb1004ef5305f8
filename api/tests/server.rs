//! Connections: TLS with a certificate that changes, plain HTTP, and an end that lets requests finish.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::TestApp;
use std::path::Path;
use std::sync::Arc;
use tapgate::http::server::{serve, serve_idling};
use tapgate::http::tls::Tls;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::rustls::pki_types::{CertificateDer, ServerName};
use tokio_rustls::rustls::{ClientConfig, RootCertStore, crypto::aws_lc_rs::default_provider};
use tokio_util::sync::CancellationToken;

fn write_certificate(folder: &Path) -> CertificateDer<'static> {
    let made = rcgen::generate_simple_self_signed(["api.example.com".to_owned()]).unwrap();
    std::fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    std::fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.der().clone()
}

async fn ask(stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, request: &str) -> String {
    let mut stream = stream;
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    // A server may end TLS without saying so.
    let _ = stream.read_to_end(&mut answer).await;
    String::from_utf8_lossy(&answer).into_owned()
}

const HEALTH: &str = "GET /healthz HTTP/1.1\r\nHost: api.example.com\r\nConnection: close\r\n\r\n";

#[tokio::test]
async fn a_new_certificate_is_taken_without_a_restart() {
    let app = TestApp::new();
    let folder = tempfile::tempdir().unwrap();
    let first = write_certificate(folder.path());
    let (cert, key) = (folder.path().join("cert.pem"), folder.path().join("key.pem"));
    let tls = Arc::new(Tls::load(cert.clone(), key).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve(listener, app.router.clone(), Some(tls), stop.clone()));

    let trusting = async |root: &CertificateDer<'static>| {
        let mut roots = RootCertStore::empty();
        roots.add(root.clone()).unwrap();
        let config = ClientConfig::builder_with_provider(Arc::new(default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("api.example.com").unwrap();
        let stream = TcpStream::connect(address).await.unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await.ok()?;
        Some(ask(stream, HEALTH).await)
    };
    let answer = trusting(&first).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with(r#"{"status":"ok"}"#), "{answer}");
    // Plain HTTP on the same port is no answer, and no harm.
    let stream = TcpStream::connect(address).await.unwrap();
    assert!(!ask(stream, HEALTH).await.contains("200"));

    // A broken file changes nothing.
    std::fs::write(&cert, "nonsense").unwrap();
    assert!(trusting(&first).await.is_some());
    let second = write_certificate(folder.path());
    assert!(trusting(&second).await.is_some());
    assert!(trusting(&first).await.is_none());

    // Others for the same key, brought with the times at which they were made: before the key was put there.
    let key =
        rcgen::KeyPair::from_pem(&std::fs::read_to_string(folder.path().join("key.pem")).unwrap()).unwrap();
    for seconds in [1_700_000_000, 1_710_000_000] {
        let mut params = rcgen::CertificateParams::new(["api.example.com".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, seconds.to_string());
        let next = params.self_signed(&key).unwrap();
        std::fs::write(&cert, next.pem()).unwrap();
        let made = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
        std::fs::File::options().append(true).open(&cert).unwrap().set_modified(made).unwrap();
        assert!(trusting(next.der()).await.is_some(), "{seconds}");
    }

    stop.cancel();
    server.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err());
    assert!(Tls::load(folder.path().join("none.pem"), folder.path().join("key.pem")).is_err());
}

#[tokio::test]
async fn headers_are_bounded() {
    let app = TestApp::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve(listener, app.router.clone(), None, stop.clone()));
    let request = async |headers: String| {
        let stream = TcpStream::connect(address).await.unwrap();
        ask(stream, &format!("GET /healthz HTTP/1.1\r\nHost: a\r\nConnection: close\r\n{headers}\r\n")).await
    };
    assert!(request(String::new()).await.starts_with("HTTP/1.1 200"));
    assert!(request("X: y\r\n".repeat(100)).await.starts_with("HTTP/1.1 431"));
    assert!(request(format!("X: {}\r\n", "y".repeat(20_000))).await.starts_with("HTTP/1.1 431"));
    stop.cancel();
    server.await.unwrap();
}

/// Waits as long as the server is patient: ten seconds for a head, fifteen for a body.
#[tokio::test]
async fn who_is_slow_is_cut_off() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let server = tokio::spawn(serve(listener, app.router.clone(), None, stop.clone()));
    let slow = async |request: String| ask(TcpStream::connect(address).await.unwrap(), &request).await;
    let body = format!(
        "PUT /v1/env/K HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n\
         Content-Length: 20\r\n\r\n{{"
    );
    let keyed =
        body.replace("PUT /v1/env/K ", "POST /v1/keys ").replace("Host: a", "Host: a\r\nIdempotency-Key: k");
    let form = "POST /activate HTTP/1.1\r\nHost: a\r\nContent-Type: application/x-www-form-urlencoded\r\nContent-Length: 9\r\n\r\nc=";
    let slowly = async {
        tokio::join!(
            slow(String::new()),
            slow("PRI * HTTP/2.0\r\n".to_owned()),
            slow("GET /healthz HTTP/1.1\r\nHost:".to_owned()),
            slow("GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n".to_owned()),
            slow(body),
            slow(keyed),
            slow(form.to_owned())
        )
    };
    let all = tokio::time::timeout(std::time::Duration::from_secs(60), slowly).await;
    let (silent, preface, head, idle, body, keyed, form) =
        all.expect("a slow client holds its connection for ever");
    assert_eq!(silent, "");
    assert!(!preface.contains("HTTP/1.1 200"), "{preface}");
    assert!(!head.contains("200"), "{head}");
    assert!(form.starts_with("HTTP/1.1 408"), "{form}");
    assert!(idle.starts_with("HTTP/1.1 200"), "answered, and then ended for want of another: {idle}");
    for body in [body, keyed] {
        assert!(body.starts_with("HTTP/1.1 408") && body.contains("request_timeout"), "{body}");
    }
    stop.cancel();
    server.await.unwrap();
}

/// Over HTTP/2 no head is waited for, so nothing else would end it.
#[tokio::test]
async fn a_connection_without_a_request_is_ended() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let idle = std::time::Duration::from_millis(500);
    let server = tokio::spawn(serve_idling(listener, app.router.clone(), None, stop.clone(), idle));
    let stream = TcpStream::connect(address).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let io = hyper_util::rt::TokioIo::new(stream);
    let (mut send, connection) = hyper::client::conn::http2::handshake(executor, io).await.unwrap();
    let mut connection = tokio::spawn(connection);
    let request = hyper::Request::get("http://a/v1/audit/egress?follow")
        .header("authorization", format!("Bearer {key}"))
        .body(axum::body::Body::empty());
    let answer = send.send_request(request.unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    // An answer that lasts is something that goes on.
    tokio::time::timeout(4 * idle, &mut connection).await.unwrap_err();
    drop(answer);
    tokio::time::timeout(40 * idle, connection).await.expect("the connection is left open").unwrap().unwrap();
    stop.cancel();
    server.await.unwrap();
}

/// Over HTTP/2 the socket takes everything, and the client's window nothing.
#[tokio::test]
async fn who_makes_no_room_for_an_answer_is_cut_off() {
    let app = TestApp::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let idle = std::time::Duration::from_millis(500);
    let server = tokio::spawn(serve_idling(listener, app.router.clone(), None, stop.clone(), idle));
    let io = hyper_util::rt::TokioIo::new(TcpStream::connect(address).await.unwrap());
    let mut http = hyper::client::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
    let (mut send, connection) = http.initial_stream_window_size(1).handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = hyper::Request::get("http://a/docs").body(axum::body::Body::empty());
    let answer = send.send_request(request.unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    let ended = tokio::time::timeout(20 * idle, connection).await;
    let _ = ended.expect("it is held for as long as the client likes");
    drop(answer);
    stop.cancel();
    server.await.unwrap();
}

/// The kernel's word for the server's side of a connection; `None` once it is gone.
fn state(server: std::net::SocketAddr, client: std::net::SocketAddr) -> Option<String> {
    let ends = [server, client].map(|end| format!(":{:04X}", end.port()));
    let table = std::fs::read_to_string("/proc/self/net/tcp").unwrap();
    let mut lines = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    lines
        .find(|line| line[1].ends_with(&ends[0]) && line[2].ends_with(&ends[1]))
        .map(|line| line[3].to_owned())
}

/// Whoever asks for much and takes nothing of it would hold a connection for ever, and there are only so many.
#[tokio::test]
async fn who_takes_nothing_of_the_answers_is_cut_off() {
    const ESTABLISHED: &str = "01";
    let app = TestApp::new();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let stop = CancellationToken::new();
    let idle = std::time::Duration::from_millis(500);
    let server = tokio::spawn(serve_idling(listener, app.router.clone(), None, stop.clone(), idle));
    let mut client = TcpStream::connect(address).await.unwrap();
    let many = "GET /docs HTTP/1.1\r\nHost: a\r\n\r\n".repeat(1000);
    client.write_all(many.as_bytes()).await.unwrap();
    let own = client.local_addr().unwrap();
    assert_eq!(state(address, own).as_deref(), Some(ESTABLISHED));
    for _ in 0..100 {
        if state(address, own).as_deref() != Some(ESTABLISHED) {
            break;
        }
        tokio::time::sleep(idle / 5).await;
    }
    assert_ne!(
        state(address, own).as_deref(),
        Some(ESTABLISHED),
        "it is held for as long as the client likes"
    );
    stop.cancel();
    server.await.unwrap();
}
