//! Answers that come before an answer (RFC 9110 §15.2), whatever the guest and the server speak.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use h2::client::SendRequest;
use http::{HeaderMap, Request, Response};
use std::{future::poll_fn, pin::Pin, sync::Arc, time::Duration};
use support::{SERVER, World, world};
use tapgate_model::Mode;
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::TcpListener,
    sync::Notify,
    time::timeout,
};

const VALUE: &str = "ghp_realvalue0123456789";
/// For what otherwise never comes.
const PATIENCE: Duration = Duration::from_secs(20);

/// What a server says before its answer, by the path that is asked for.
fn before(path: &str) -> Vec<Response<()>> {
    let head = |status: u16, fields: &[(&'static str, &str)]| {
        let mut head = Response::builder().status(status).body(()).unwrap();
        for (name, value) in fields {
            head.headers_mut().append(*name, value.parse().unwrap());
        }
        head
    };
    let hint = || {
        let fields = [("link", "</a.css>; rel=preload"), ("x-echo", VALUE), ("alt-svc", "h3")];
        head(103, &fields)
    };
    match path {
        "/hints" => {
            vec![head(100, &[]), hint(), head(103, &[("x", &"x".repeat(20_000))]), head(102, &[])]
        }
        "/many" => (0..20).map(|_| head(102, &[])).collect(),
        "/slow" => vec![hint()],
        _ => Vec::new(),
    }
}

async fn http1(mut stream: impl AsyncRead + AsyncWrite + Unpin) {
    loop {
        let request = until(&mut stream, "\r\n\r\n").await;
        let Some(path) = request.split(' ').nth(1) else { return };
        let mut all = String::new();
        for head in before(path) {
            all += &format!("HTTP/1.1 {}\r\n", head.status().as_u16());
            for (name, value) in head.headers() {
                all += &format!("{name}: {}\r\n", value.to_str().unwrap());
            }
            all += "Connection: x-own\r\nX-Own: 1\r\n\r\n";
        }
        all += "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<end>";
        stream.write_all(all.as_bytes()).await.unwrap();
    }
}

async fn http2(stream: impl AsyncRead + AsyncWrite + Unpin, slow: Arc<Notify>) {
    let mut connection = h2::server::handshake(stream).await.unwrap();
    while let Some(Ok((request, mut respond))) = connection.accept().await {
        let slow = slow.clone();
        tokio::spawn(async move {
            let path = request.uri().path().to_owned();
            if path == "/slow" {
                slow.notified().await;
            }
            for head in before(&path) {
                respond.send_informational(head).unwrap();
            }
            let mut body = respond.send_response(Response::new(()), false).unwrap();
            body.send_data(Bytes::from_static(b"<end>"), true).unwrap();
        });
    }
}

/// Serves over TLS what was negotiated, and in clear text HTTP/2.
async fn serve(w: &World, port: u16, alpn: Option<&str>) -> Arc<Notify> {
    let tls = alpn.map(|alpn| w.ca.server(&["api.example"], &[alpn]));
    let listener = TcpListener::bind((SERVER, port)).await.unwrap();
    let slow = Arc::<Notify>::default();
    let notified = slow.clone();
    let one = alpn == Some("http/1.1");
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (tls, slow) = (tls.clone(), slow.clone());
            tokio::spawn(async move {
                let Some(tls) = tls else { return http2(stream, slow).await };
                let stream = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await.unwrap();
                if one { http1(stream).await } else { http2(stream, slow).await }
            });
        }
    });
    notified
}

fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
}

async fn until<S: AsyncRead + Unpin>(stream: &mut S, end: &str) -> String {
    let mut all = Vec::new();
    while !all.ends_with(end.as_bytes()) {
        match timeout(PATIENCE, stream.read_u8()).await.expect("it comes") {
            Ok(octet) => all.push(octet),
            Err(_) => break,
        }
    }
    String::from_utf8(all).unwrap()
}

async fn begin<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) -> SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(stream).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

fn get(uri: &str) -> Request<()> {
    Request::get(uri).header("authorization", "Bearer IRONSH_PROXY_token").body(()).unwrap()
}

/// A head by its status and fields.
type Head = (u16, Vec<(String, String)>);

fn head(status: u16, fields: &HeaderMap) -> Head {
    let fields = fields.iter().filter(|(name, _)| *name != "date");
    (status, fields.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned())).collect())
}

/// What comes before an answer over HTTP/2, and the answer's content.
async fn heard(mut answer: h2::client::ResponseFuture) -> (Vec<Head>, String) {
    let mut heads = Vec::new();
    let talk = async {
        while let Some(one) = poll_fn(|cx| answer.poll_informational(cx)).await {
            let one = one.unwrap();
            heads.push(head(one.status().as_u16(), one.headers()));
        }
        let answer = poll_fn(|cx| Pin::new(&mut answer).poll(cx)).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut body = answer.into_body();
        let mut text = String::new();
        while let Some(data) = body.data().await {
            let data = data.unwrap();
            text += std::str::from_utf8(&data).unwrap();
            body.flow_control().release_capacity(data.len()).unwrap();
        }
        text
    };
    let text = timeout(PATIENCE, talk).await.expect("it is answered");
    (heads, text)
}

/// The same over HTTP/1.
async fn asked<S: AsyncRead + AsyncWrite + Unpin>(stream: &mut S, path: &str) -> Vec<Head> {
    let get = format!(
        "GET {path} HTTP/1.1\r\nHost: api.example\r\nAuthorization: Bearer IRONSH_PROXY_token\r\n\r\n"
    );
    stream.write_all(get.as_bytes()).await.unwrap();
    let all = until(stream, "<end>\r\n0\r\n\r\n").await;
    let mut heads = Vec::new();
    for text in all.split("\r\n\r\n") {
        let mut lines = text.lines();
        let status: u16 = lines.next().unwrap().split(' ').nth(1).unwrap().parse().unwrap();
        let fields: HeaderMap = lines
            .map(|line| line.split_once(": ").unwrap())
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
            .collect();
        if status == 200 {
            return heads;
        }
        heads.push(head(status, &fields));
    }
    panic!("no answer: {all}");
}

/// What a guest has to hear before the answer to `/hints`.
fn hints() -> Vec<Head> {
    let field = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let hint = vec![field("link", "</a.css>; rel=preload"), field("x-echo", "IRONSH_PROXY_token")];
    vec![(103, hint), (102, Vec::new())]
}

/// A guest that speaks HTTP/2.
async fn hears_over_http2(mut sender: SendRequest<Bytes>, scheme: &str) {
    for (path, heads) in
        [("/hints", hints()), ("/none", Vec::new()), ("/many", vec![(102, Vec::new()); 8]), ("/none", vec![])]
    {
        let request = get(&format!("{scheme}://api.example{path}"));
        let (answer, _) = sender.send_request(request, true).unwrap();
        assert_eq!(heard(answer).await, (heads, "<end>".to_owned()), "{path}");
    }
}

#[test]
fn from_http2_to_http2() {
    world(|mut w| async move {
        start(&mut w);
        let slow = serve(&w, 80, None).await;
        let mut sender = begin(w.connect((SERVER, 80)).await).await;
        hears_over_http2(sender.clone(), "http").await;
        // Two at a time: each hears its own, however long another's answer is there already.
        let (late, _) = sender.send_request(get("http://api.example/slow"), true).unwrap();
        let (answer, _) = sender.send_request(get("http://api.example/none"), true).unwrap();
        assert_eq!(heard(answer).await, (Vec::new(), "<end>".to_owned()));
        slow.notify_one();
        assert_eq!(heard(late).await, (hints()[..1].to_vec(), "<end>".to_owned()));
        assert_eq!(w.events(6).await.len(), 6);
    });
}

#[test]
fn from_http1_to_http2() {
    world(|mut w| async move {
        start(&mut w);
        serve(&w, 443, Some("http/1.1")).await;
        let sender = begin(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        hears_over_http2(sender, "https").await;
    });
}

#[test]
fn from_http2_to_http1() {
    world(|mut w| async move {
        start(&mut w);
        // Nothing listens yet, so that HTTP/1.1 is agreed on with the guest.
        let mut stream = w.tls((SERVER, 443), "api.example", &["h2", "http/1.1"]).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        serve(&w, 443, Some("h2")).await;
        assert_eq!(asked(&mut stream, "/hints").await, hints());
        assert_eq!(asked(&mut stream, "/none").await, []);
        assert_eq!(asked(&mut stream, "/many").await, vec![(102, Vec::new()); 8]);
        // HTTP/1.0 knows of none.
        stream.write_all(b"GET /hints HTTP/1.0\r\nHost: api.example\r\n\r\n").await.unwrap();
        let answer = until(&mut stream, "<end>").await;
        assert!(answer.starts_with("HTTP/1.0 200") && answer.matches("HTTP/1").count() == 1, "{answer}");
    });
}

#[test]
fn from_http1_to_http1() {
    world(|mut w| async move {
        start(&mut w);
        serve(&w, 443, Some("http/1.1")).await;
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        assert_eq!(asked(&mut stream, "/hints").await, hints());
        assert_eq!(asked(&mut stream, "/none").await, []);
        assert_eq!(asked(&mut stream, "/many").await, vec![(102, Vec::new()); 8]);
    });
}

#[test]
fn a_body_over_http2_is_asked_for_where_it_waits_for_that() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], &[]);
        w.serve((SERVER, 80), None).await;
        let mut sender = begin(w.connect((SERVER, 80)).await).await;
        let request = Request::post("http://api.example/").header("expect", "100-continue").body(()).unwrap();
        let (mut answer, mut body) = sender.send_request(request, false).unwrap();
        let asked = timeout(PATIENCE, poll_fn(|cx| answer.poll_informational(cx))).await;
        assert_eq!(asked.expect("it is asked for").unwrap().unwrap().status(), 100);
        body.send_data(Bytes::from_static(b"content"), true).unwrap();
        let (heads, echo) = heard(answer).await;
        assert!(heads.is_empty() && echo.ends_with("content"), "{heads:?} {echo}");
        assert!(!echo.contains("expect"), "{echo}");
        // One that is refused is not asked for.
        let request = Request::post("http://b.example/").header("expect", "100-continue").body(()).unwrap();
        let (mut answer, _body) = sender.send_request(request, false).unwrap();
        assert!(poll_fn(|cx| answer.poll_informational(cx)).await.is_none());
        assert_eq!(answer.await.unwrap().status(), 403);
    });
}
