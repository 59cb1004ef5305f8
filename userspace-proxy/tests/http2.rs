//! HTTP/2 on both sides, with ALPN carried through, and without TLS by prior knowledge.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use http_body_util::{BodyExt as _, Empty, StreamBody, combinators::UnsyncBoxBody};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use support::{ATTACKER, OTHER, SERVER, World, world};
use tapgate_model::{Mode, Protocol, Reason, Verdict};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

const VALUE: &str = "ghp_realvalue0123456789";

type Body = UnsyncBoxBody<Bytes, Infallible>;

async fn begin<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) -> SendRequest<Body> {
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(uri: &str) -> Request<Body> {
    Request::get(uri)
        .header("authorization", "Bearer IRONSH_PROXY_token")
        .body(Empty::new().boxed_unsync())
        .unwrap()
}

async fn text(response: Response<hyper::body::Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

async fn start(w: &mut World, alpn: &[&str]) {
    w.zone.set("api.example", &[SERVER]);
    w.zone.set("b.example", &[OTHER]);
    w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], alpn))).await;
    w.serve((SERVER, 80), None).await;
    w.serve((OTHER, 80), None).await;
    w.serve((ATTACKER, 443), Some(w.ca.server(&["evil.example"], alpn))).await;
    w.rules(Mode::Enforce, &["api.example", "b.example"], &[("token", VALUE, &["api.example"])]);
}

#[test]
fn alpn_is_carried_through() {
    world(|mut w| async move {
        start(&mut w, &["h2", "http/1.1"]).await;
        let stream = w.tls((SERVER, 443), "api.example", &["h2", "http/1.1"]).await.unwrap();
        assert!(w.is_opened(&stream));
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
        let mut sender = begin(stream).await;
        // Many at a time, on one connection to the upstream.
        let answers: Vec<_> =
            (0..20).map(|n| sender.send_request(get(&format!("https://api.example/{n}")))).collect();
        for answer in futures_util::future::join_all(answers).await {
            let answer = answer.unwrap();
            assert_eq!(answer.headers()["x-echo"], "Bearer IRONSH_PROXY_token");
            assert!(!text(answer).await.contains(VALUE));
        }
        let seen = w.log.seen();
        assert_eq!(seen.len(), 20);
        assert!(seen.iter().all(|s| s.header("authorization") == Some(&format!("Bearer {VALUE}")[..])));
        assert!(
            seen.iter().all(|s| s.line.ends_with("HTTP/2.0") && s.header("host").is_none()),
            "{:?}",
            seen[0]
        );
        let events = w.events(20).await;
        assert!(events.iter().all(|event| event.secrets == ["token"] && event.protocol == Protocol::Http));
    });
}

#[test]
fn an_upstream_without_http2_gets_what_it_speaks() {
    world(|mut w| async move {
        start(&mut w, &["http/1.1"]).await;
        let stream = w.tls((SERVER, 443), "api.example", &["h2", "http/1.1"]).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"http/1.1"[..]));
        let answer =
            support::talk(stream, "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n").await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    });
}

#[test]
fn a_stream_does_not_wait_for_the_answer_of_another_where_the_upstream_speaks_http1() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
        let tls = w.ca.server(&["api.example"], &["http/1.1"]);
        let listener = tokio::net::TcpListener::bind((SERVER, 443)).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let tls = tokio_rustls::TlsAcceptor::from(tls.clone());
                tokio::spawn(async move {
                    let mut stream = tls.accept(stream).await.unwrap();
                    let mut head = Vec::new();
                    while let Ok(byte) = stream.read_u8().await {
                        head.push(byte);
                        if !head.ends_with(b"\r\n\r\n") {
                            continue;
                        }
                        let answer = match head.starts_with(b"GET /events ") {
                            // Events without end.
                            true => "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n",
                            false => "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
                        };
                        stream.write_all(answer.as_bytes()).await.unwrap();
                        head.clear();
                    }
                });
            }
        });
        let mut sender = begin(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        let mut events = sender.send_request(get("https://api.example/events")).await.unwrap();
        assert_eq!(events.frame().await.unwrap().unwrap().into_data().unwrap(), "ok");
        for _ in 0..2 {
            let answer = sender.send_request(get("https://api.example/"));
            let answer = tokio::time::timeout(std::time::Duration::from_secs(20), answer).await;
            assert_eq!(text(answer.expect("it waits for the events").unwrap()).await, "ok");
        }
    });
}

#[test]
fn another_authority_on_the_connection_is_misdirected() {
    world(|mut w| async move {
        start(&mut w, &["h2"]).await;
        w.rules(Mode::Enforce, &["*"], &[("token", VALUE, &["*"])]);
        let mut sender = begin(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        for uri in ["https://evil.example/", "https://api.example:8443/", "https://192.0.2.10/"] {
            let answer = sender.send_request(get(uri)).await.unwrap();
            assert_eq!(answer.status(), 421, "{uri}");
            let _ = text(answer).await;
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::NameMismatch });
        }
        let mut two = get("https://api.example/");
        two.headers_mut().insert("host", "evil.example".parse().unwrap());
        let answer = sender.send_request(two).await.unwrap();
        assert_eq!(answer.status(), 421);
        let answer = sender.send_request(get("https://api.example/")).await.unwrap();
        assert_eq!(answer.status(), 200, "the connection serves its own name on");
        assert_eq!(w.log.seen().len(), 1);
        assert!(!w.log.attacker_got("api.example"));
    });
}

#[test]
fn trailers_pass_cleaned_and_say_only_what_trailers_may() {
    world(|mut w| async move {
        start(&mut w, &["h2"]).await;
        let mut sender = begin(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        let trailers: HeaderMap =
            [("x-more", "1"), ("authorization", "IRONSH_PROXY_token"), ("host", "evil.example")]
                .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()))
                .into_iter()
                .collect();
        let frames = [Ok(Frame::data(Bytes::from("body"))), Ok(Frame::trailers(trailers))];
        let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let mut request = get("https://api.example/trailers").map(|_| body);
        *request.method_mut() = http::Method::POST;
        request.headers_mut().insert("te", "trailers".parse().unwrap());
        let all = sender.send_request(request).await.unwrap().into_body().collect().await.unwrap();
        assert_eq!(all.trailers().unwrap()["x-sum"], "Bearer IRONSH_PROXY_token");
        let echo = String::from_utf8(all.to_bytes().to_vec()).unwrap();
        assert!(echo.contains("trailer x-more: 1\n") && echo.ends_with("body"), "{echo}");
        assert!(!echo.contains("trailer authorization") && !echo.contains("trailer host"), "{echo}");
        assert!(echo.contains("te: trailers\n"), "{echo}");
    });
}

#[test]
fn prior_knowledge_is_decided_request_by_request() {
    world(|mut w| async move {
        start(&mut w, &["h2"]).await;
        let mut sender = begin(w.connect((ATTACKER, 80)).await).await;
        for (uri, status) in [
            ("http://api.example/1", 200),
            ("http://b.example/2", 200),
            ("http://evil.example/3", 403),
            ("https://api.example/4", 400),
        ] {
            assert_eq!(sender.send_request(get(uri)).await.unwrap().status(), status, "{uri}");
        }
        let seen: Vec<_> = w.log.seen().into_iter().map(|s| (s.server, s.line)).collect();
        assert_eq!(seen.len(), 2);
        assert_eq!(seen[0], (SERVER, "GET http://api.example/1 HTTP/2.0".to_owned()));
        assert_eq!(seen[1].0, OTHER);
        assert_eq!(w.log.seen()[1].header("authorization"), Some("Bearer IRONSH_PROXY_token"));
    });
}

#[test]
fn who_offers_http2_alone_is_told_what_became_of_the_upstream() {
    world(|mut w| async move {
        start(&mut w, &["http/1.1"]).await;
        for (name, at) in [("down.example", OTHER), ("evil2.example", ATTACKER)] {
            w.zone.set(name, &[at]);
        }
        let names = ["api.example", "down.example", "evil2.example"];
        w.rules(Mode::Enforce, &names, &[("token", VALUE, &names)]);
        for (name, status, reason) in [
            ("down.example", 502, Reason::Unreachable),
            ("evil2.example", 502, Reason::Unverified),
            ("api.example", 200, Reason::Host),
        ] {
            let mut sender = begin(w.tls((SERVER, 443), name, &["h2"]).await.unwrap()).await;
            let answer = sender.send_request(get(&format!("https://{name}/"))).await.unwrap();
            assert_eq!(answer.status(), status, "{name}");
            assert!(!text(answer).await.contains(VALUE));
            let event = w.event().await;
            assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Http, reason), "{name}");
        }
    });
}

/// An extended CONNECT (RFC 8441 §4).
/// What a server says that it did not look at, clients send again by themselves, whatever it is (RFC 9113 §8.7).
#[test]
fn that_an_upstream_did_not_look_at_a_request_is_passed_on() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
        let listener = tokio::net::TcpListener::bind((SERVER, 443)).await.unwrap();
        let tls = tokio_rustls::TlsAcceptor::from(w.ca.server(&["api.example"], &["h2"]));
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let tls = tls.clone();
                tokio::spawn(async move {
                    let stream = tls.accept(stream).await.unwrap();
                    let mut connection = h2::server::handshake(stream).await.unwrap();
                    while let Some(Ok((_, mut respond))) = connection.accept().await {
                        respond.send_reset(h2::Reason::REFUSED_STREAM);
                    }
                });
            }
        });
        let body = || StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, Infallible>>());
        let request = || Request::post("https://api.example/").body(body().boxed_unsync()).unwrap();
        let mut sender = begin(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        let error = sender.send_request(request()).await.unwrap_err();
        let reason = std::error::Error::source(&error).and_then(|inner| inner.downcast_ref::<h2::Error>());
        assert_eq!(reason.and_then(h2::Error::reason), Some(h2::Reason::REFUSED_STREAM), "{error:?}");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Unreachable });
        let ask = "POST / HTTP/1.1\r\nHost: api.example\r\nContent-Length: 9\r\n\r\nbegin";
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        stream.write_all(ask.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 502");
    });
}

fn extended(path: &str, protocol: &'static str) -> Request<Body> {
    Request::connect(format!("https://api.example{path}"))
        .header("authorization", "Bearer IRONSH_PROXY_token")
        .header("sec-websocket-version", "13")
        .extension(hyper::ext::Protocol::from_static(protocol))
        .body(Empty::new().boxed_unsync())
        .unwrap()
}

#[test]
fn websockets_pass_by_extended_connect_and_are_cut_with_the_rule() {
    world(|mut w| async move {
        start(&mut w, &["h2", "http/1.1"]).await;
        let mut sender = begin(w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap()).await;
        assert_eq!(sender.send_request(get("https://api.example/")).await.unwrap().status(), 200);
        let mut granted = sender.send_request(extended("/chat", "websocket")).await.unwrap();
        assert_eq!(granted.status(), 200);
        assert!(!granted.headers().contains_key("sec-websocket-accept"));
        let mut socket = TokioIo::new(hyper::upgrade::on(&mut granted).await.unwrap());
        let mut echo = [0; 7];
        for word in [b"\x81\x05hello", b"\x82\x05again"] {
            socket.write_all(word).await.unwrap();
            socket.read_exact(&mut echo).await.unwrap();
            assert_eq!(&echo, word);
        }
        let seen = w.log.seen().pop().unwrap();
        assert_eq!(seen.line, "GET /chat");
        assert_eq!(seen.header("authorization"), Some(&format!("Bearer {VALUE}")[..]));
        assert_eq!(seen.header("upgrade"), Some("websocket"));
        // Other requests share the connection all the while; other protocols, and answers that are none, do not pass.
        assert_eq!(sender.send_request(get("https://api.example/2")).await.unwrap().status(), 200);
        for (path, protocol) in
            [("/a", "connect-udp"), ("/no-websocket", "websocket"), ("/wrong-accept", "websocket")]
        {
            let refused = sender.send_request(extended(path, protocol)).await.unwrap();
            assert_eq!(refused.status(), 403, "{path}");
            assert_eq!(refused.headers()["x-tapgate-reason"], "tunnel", "{path}");
        }
        w.rules(Mode::Enforce, &["b.example"], &[("token", VALUE, &["api.example"])]);
        assert!(!matches!(socket.read(&mut echo).await, Ok(1..)), "cut with its rule");
        let events = w.events(6).await;
        let talk = events.iter().find(|event| event.path.as_deref() == Some("/chat")).unwrap();
        assert_eq!(talk.verdict, Verdict::Deny { reason: Reason::Revoked });
        assert_eq!((talk.bytes_out, talk.bytes_in), (14, 14));
    });
}

#[test]
fn a_wish_for_websocket_that_announces_content_reaches_nobody() {
    world(|mut w| async move {
        start(&mut w, &["h2", "http/1.1"]).await;
        // By hand: a client of the other library does not let it out.
        let stream = w.tls((SERVER, 443), "api.example", &["h2"]).await.unwrap();
        let (mut sender, connection) = h2::client::handshake(stream).await.unwrap();
        tokio::spawn(connection);
        let first = get("https://api.example/1").map(|_| ());
        assert_eq!(sender.send_request(first, true).unwrap().0.await.unwrap().status(), 200);
        let wish = Request::connect("https://api.example/chat")
            .header("content-length", "30")
            .header("sec-websocket-version", "13")
            .extension(h2::ext::Protocol::from_static("websocket"))
            .body(())
            .unwrap();
        let (answer, mut body) = sender.send_request(wish, false).unwrap();
        body.send_data(Bytes::from_static(b"GET /own HTTP/1.1\r\nHost: a\r\n\r\n"), true).unwrap();
        let refused = tokio::time::timeout(std::time::Duration::from_secs(20), answer).await.unwrap();
        assert_eq!(refused.unwrap_err().reason(), Some(h2::Reason::PROTOCOL_ERROR));
        // The connection goes on.
        let next = get("https://api.example/2").map(|_| ());
        assert_eq!(sender.send_request(next, true).unwrap().0.await.unwrap().status(), 200);
        assert!(w.log.seen().iter().all(|seen| !seen.line.contains("chat") && !seen.line.contains("own")));
    });
}

/// A frame of HTTP/2 (RFC 9113 §4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

#[test]
fn floods_end_the_connection() {
    world(|mut w| async move {
        start(&mut w, &["h2"]).await;
        let preface = [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(4, 0, 0, b"")].concat();
        // GET http://b.example/ in HPACK: indexed fields, and a literal authority.
        let head = [&[0x82, 0x86, 0x84, 0x41, 9][..], b"b.example"].concat();
        let resets: Vec<u8> = (0..5000u32)
            .flat_map(|n| [frame(1, 5, 2 * n + 1, &head), frame(3, 0, 2 * n + 1, &[0, 0, 0, 8])].concat())
            .collect();
        let first = frame(1, 1, 1, &head);
        let continuations =
            [first, (0..20_000).flat_map(|_| frame(9, 0, 1, &[0x40, 1, b'a', 1, b'b'])).collect()].concat();
        // A kilobyte of table entry, referred to thousands of times.
        let mut bomb =
            [&[0x82, 0x86, 0x84, 0x41, 9][..], b"b.example", &[0x40, 1, b'x', 0x7f, 0xa1, 0x1e]].concat();
        bomb.extend([b'y'; 4000]);
        bomb.extend([0xbe; 12_000]);
        let bombs: Vec<u8> = (0..64u32).flat_map(|n| frame(1, 5, 2 * n + 1, &bomb)).collect();
        for flood in [resets, continuations, bombs] {
            let mut stream = w.connect((OTHER, 80)).await;
            let (mut read, mut write) = stream.split();
            let bytes = [preface.clone(), flood].concat();
            let (_, answer) = tokio::join!(write.write_all(&bytes), async {
                let mut all = Vec::new();
                let _ = read.read_to_end(&mut all).await;
                all
            });
            // It ended: read_to_end returned. A GOAWAY frame says so, unless the close overtook it.
            assert!(answer.len() < 4 * 1024 * 1024);
        }
        // Others notice nothing.
        let mut sender = begin(w.connect((OTHER, 80)).await).await;
        assert_eq!(sender.send_request(get("http://b.example/")).await.unwrap().status(), 200);
    });
}

/// Answers one request without end, as far as it is let: gives the largest windows that it was offered, of the stream and of
/// the connection.
async fn send_ahead(mut stream: tokio::net::TcpStream, octets: i64) -> (i64, i64) {
    let mut preface = [0; 24];
    stream.read_exact(&mut preface).await.unwrap();
    stream.write_all(&frame(4, 0, 0, b"")).await.unwrap();
    let (mut initial, mut ours, mut all) = (65_535, None, 65_535);
    let (mut most, mut sent, mut asked) = ((0, 0), 0, None::<Vec<u8>>);
    while sent < octets && most.1 <= 4 << 20 {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        let number = |bytes: &[u8]| i64::from(u32::from_be_bytes(bytes.try_into().unwrap()));
        match (head[3], head[4] & 1, number(&head[5..])) {
            (4, 0, _) => {
                let window = payload.chunks(6).find(|setting| setting[..2] == [0, 4]);
                let new = window.map_or(initial, |setting| number(&setting[2..]));
                // A stream that is open gets the difference.
                ours = ours.map(|window| window + new - initial);
                initial = new;
                stream.write_all(&frame(4, 1, 0, b"")).await.unwrap();
            }
            (1, ..) => {
                ours = Some(initial);
                stream.write_all(&frame(1, 4, 1, &[0x88])).await.unwrap();
            }
            (8, _, 0) => all += number(&payload),
            (8, ..) => ours = ours.map(|window| window + number(&payload)),
            _ => {}
        }
        let Some(window) = &mut ours else { continue };
        most = (most.0.max(*window), most.1.max(all));
        while all.min(*window) > 0 {
            let length = all.min(*window).min(16_384);
            let data = frame(0, 0, 1, &vec![0; usize::try_from(length).unwrap()]);
            stream.write_all(&data).await.unwrap();
            (all, *window, sent) = (all - length, *window - length, sent + length);
        }
        // Only then is what was asked before answered: as over a path that takes long and carries much.
        if let Some(payload) = asked.take() {
            stream.write_all(&frame(6, 1, 0, &payload)).await.unwrap();
        }
        asked = ((head[3], head[4] & 1) == (6, 0)).then_some(payload);
    }
    most
}

#[test]
fn what_an_upstream_may_send_ahead_is_bounded() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], &[]);
        let listener = tokio::net::TcpListener::bind((SERVER, 80)).await.unwrap();
        let upstream =
            tokio::spawn(async move { send_ahead(listener.accept().await.unwrap().0, 256 << 20).await });
        let mut sender = begin(w.connect((SERVER, 80)).await).await;
        let mut body = sender.send_request(get("http://api.example/")).await.unwrap().into_body();
        // It is read on, so that whatever grows with what is read would grow.
        let reading = tokio::spawn(async move { while let Some(Ok(_)) = body.frame().await {} });
        let (stream, connection) = upstream.await.unwrap();
        // All of it for the first connections, and no more however it is read.
        assert_eq!((stream, connection), (1 << 20, 2 << 20));
        reading.await.unwrap();
    });
}

#[test]
fn a_connection_without_requests_is_ended_and_one_that_waits_for_an_answer_is_not() {
    world(|mut w| async move {
        start(&mut w, &["h2"]).await;
        let mut config = support::config(&w.ca);
        config.timeouts.keep_alive = std::time::Duration::from_millis(500);
        w.restart(config);
        let stream = TokioIo::new(w.connect((SERVER, 80)).await);
        let (mut sender, connection) =
            hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
        let connection = tokio::spawn(connection);
        for path in ["", "late", ""] {
            let answer = sender.send_request(get(&format!("http://api.example/{path}"))).await.unwrap();
            assert!(text(answer).await.contains("authorization"));
        }
        let end = std::time::Duration::from_secs(30);
        tokio::time::timeout(end, connection).await.expect("nothing is asked on it").unwrap().unwrap();
        assert!(sender.send_request(get("http://api.example/")).await.is_err());
    });
}
