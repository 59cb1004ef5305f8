//! What streams, switches or waits: WebSocket, 100-continue, event streams, large bodies, early answers, limits.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::time::Duration;
use support::{SERVER, World, unchunk, world};
use tapgate_model::{Mode, Reason, Verdict};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};

const VALUE: &str = "ghp_realvalue0123456789";
const BEARER: &str = "Authorization: Bearer IRONSH_PROXY_token\r\n";

async fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
}

async fn until<S: AsyncRead + Unpin>(stream: &mut S, end: &str) -> String {
    let mut all = Vec::new();
    while !String::from_utf8_lossy(&all).contains(end) {
        let byte = stream.read_u8().await;
        all.push(byte.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&all))));
    }
    String::from_utf8_lossy(&all).into_owned()
}

#[test]
fn websockets_pass_after_an_allowed_upgrade_and_are_cut_with_the_rule() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        let upgrade = format!(
            "GET /ws HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n{BEARER}\r\n"
        );
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        stream.write_all(upgrade.as_bytes()).await.unwrap();
        let head = until(&mut stream, "\r\n\r\n").await.to_lowercase();
        assert!(head.starts_with("http/1.1 101") && head.contains("upgrade: websocket"), "{head}");
        stream.write_all(b"\x81\x04ping").await.unwrap();
        assert_eq!(until(&mut stream, "ping").await, "\u{fffd}\x04ping");
        let seen = w.log.seen().remove(0);
        assert_eq!(seen.header("authorization"), Some(format!("Bearer {VALUE}").as_str()));
        assert_eq!(seen.header("sec-websocket-key"), Some("x"));
        w.rules(Mode::Enforce, &[], &[]);
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        let event = w.event().await;
        assert_eq!((event.status, event.verdict), (Some(101), Verdict::Deny { reason: Reason::Revoked }));
        assert_eq!((event.bytes_out, event.bytes_in), (6, 6));
    });
}

#[test]
fn what_a_server_says_on_a_websocket_is_cleaned_under_the_secrets_of_the_moment() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        let upgrade = format!(
            "GET /ws HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\nSec-WebSocket-Extensions: permessage-deflate\r\n{BEARER}\r\n"
        );
        let begin = async |w: &World| {
            let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
            stream.write_all(upgrade.as_bytes()).await.unwrap();
            assert!(until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 101"));
            stream
        };
        // The server repeats what it is told: a message in two frames, the second in two pieces.
        let mut stream = begin(&w).await;
        assert_eq!(w.log.seen().remove(0).header("sec-websocket-extensions"), None, "nothing hides a value");
        let (one, two) = VALUE.split_at(9);
        let part =
            |first: u8, text: &str| [&[first, u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
        let frames = [part(1, &format!("a {one}")), part(0x80, &format!("{two} b"))].concat();
        let (first, second) = frames.split_at(frames.len() - 7);
        stream.write_all(first).await.unwrap();
        stream.flush().await.unwrap();
        tokio::time::sleep(Duration::from_millis(100)).await;
        stream.write_all(second).await.unwrap();
        let mut heard = Vec::new();
        while !heard.ends_with(b" b") {
            assert_ne!(stream.read_buf(&mut heard).await.unwrap(), 0);
        }
        let heard = String::from_utf8_lossy(&heard);
        assert!(!heard.contains(VALUE) && heard.contains("IRONSH_PROXY_token"), "{heard:?}");
        // A value that comes to apply while it lasts.
        let other = "another-real-value-0123";
        let secrets = [("token", VALUE, &["api.example"][..]), ("other", other, &["api.example"])];
        w.rules(Mode::Enforce, &["api.example"], &secrets);
        stream.write_all(&[part(1, other), part(1, "x")].concat()).await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        // That a message begins inside of another is no server's doing: it ends there.
        let rest = String::from_utf8_lossy(&rest);
        assert!(!rest.contains(other), "{rest:?}");
        let event = w.event().await;
        assert_eq!((event.status, event.verdict), (Some(101), Verdict::Deny { reason: Reason::Unreachable }));
        let mut stream = begin(&w).await;
        stream.write_all(&[part(1, other), part(0x80, ".")].concat()).await.unwrap();
        assert!(until(&mut stream, ".").await.contains("IRONSH_PROXY_other"));
    });
}

#[test]
fn a_websocket_to_a_host_that_a_secret_comes_to_be_for_is_cut() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], &[]);
        w.serve((SERVER, 80), None).await;
        let mut stream = w.connect((SERVER, 80)).await;
        let upgrade = "GET /ws HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";
        stream.write_all(upgrade.as_bytes()).await.unwrap();
        assert!(until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 101"));
        stream.write_all(b"as it is").await.unwrap();
        assert_eq!(until(&mut stream, "as it is").await, "as it is");
        w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
        stream.write_all(VALUE.as_bytes()).await.unwrap();
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        assert_eq!(String::from_utf8_lossy(&rest), "");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Revoked });
    });
}

#[test]
fn a_refused_upgrade_opens_no_unguarded_way() {
    world(|mut w| async move {
        start(&mut w).await;
        let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            until(&mut stream, "\r\n\r\n").await;
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nno").await.unwrap();
            let mut rest = String::new();
            let _ = stream.read_to_string(&mut rest).await;
            assert_eq!(rest, "", "nothing follows what was to be another protocol");
        });
        let request =
            "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\n";
        let smuggled = "GET /smuggled HTTP/1.1\r\nHost: api.example\r\nHost: x\r\n\r\n";
        let answer = w.http((SERVER, 80), &[request, smuggled].concat()).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("no"), "{answer}");
        assert!(answer.to_lowercase().contains("connection: close"));
    });
}

#[test]
fn an_upgrade_that_reaches_no_upstream_opens_no_unguarded_way() {
    world(|mut w| async move {
        start(&mut w).await;
        w.zone.set("down.example", &[support::OTHER]);
        w.serve((SERVER, 80), None).await;
        w.rules(Mode::Enforce, &["api.example", "down.example"], &[("token", VALUE, &["api.example"])]);
        let upgrade = |host: &str, version: &str| {
            format!(
                "GET /{host} HTTP/{version}\r\nHost: {host}\r\nConnection: upgrade, keep-alive\r\nUpgrade: websocket\r\n\r\n"
            )
        };
        // The library would take this; the guard does not.
        let smuggled = "GET /smuggled HTTP/1.1\nHost: api.example\nConnection: close\n\n";
        for (request, status) in
            [(upgrade("evil.example", "1.1"), "403"), (upgrade("down.example", "1.1"), "502")]
        {
            let answer = w.http((SERVER, 80), &[&request, smuggled].concat()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{answer}");
            assert!(answer.to_lowercase().contains("connection: close"), "{answer}");
            assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
        }
        // HTTP/1.0 has no Upgrade: what follows is a request, and checked like one.
        let answer = w.http((SERVER, 80), &[&upgrade("evil.example", "1.0"), smuggled].concat()).await;
        assert!(answer.starts_with("HTTP/1.0 403") && answer.contains("HTTP/1.1 400"), "{answer}");
        assert!(w.log.seen().is_empty());
    });
}

#[test]
fn a_body_waits_for_100_continue_and_is_streamed() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        let head = "PUT /x HTTP/1.1\r\nHost: api.example\r\nExpect: 100-continue\r\nContent-Length: 5\r\nConnection: close\r\n\r\n";
        stream.write_all(head.as_bytes()).await.unwrap();
        assert!(until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 100"));
        let answer = support::talk(stream, "hello").await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.ends_with("hello"), "{answer}");
        // Refused without asking for the body.
        let answer =
            w.http((SERVER, 80), &head.replace("api.example", "evil.example").replace("PUT", "POST")).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
    });
}

#[test]
fn events_arrive_one_by_one_and_cleaned() {
    world(|mut w| async move {
        start(&mut w).await;
        let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
        let (next, mut wanted) = tokio::sync::mpsc::channel::<()>(1);
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            until(&mut stream, "\r\n\r\n").await;
            let head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n";
            stream.write_all(head.as_bytes()).await.unwrap();
            for n in 0.. {
                stream.write_all(format!("data: {n} {VALUE}\n\ngh").as_bytes()).await.unwrap();
                if wanted.recv().await.is_none() {
                    return;
                }
            }
        });
        let mut stream = w.connect((SERVER, 80)).await;
        let request =
            format!("GET / HTTP/1.1\r\nHost: api.example\r\nAccept: text/event-stream\r\n{BEARER}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        for n in 0..5 {
            // The next is sent only when this one was read, so nothing may be held back: not even an end that a value
            // could begin with.
            let text = until(&mut stream, &format!("data: {n} IRONSH_PROXY_token\n\n")).await;
            assert!(until(&mut stream, "gh").await.len() < 16, "it comes in a chunk of its own");
            assert!(!text.contains(VALUE));
            next.send(()).await.unwrap();
        }
    });
}

#[test]
fn large_bodies_pass_both_ways_and_an_early_answer_is_heard() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        let body = "0123456789abcdef".repeat(256 * 1024);
        let head = format!(
            "POST /length HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nContent-Length: {}\r\n\r\n",
            body.len()
        );
        let (mut read, mut write) = tokio::io::split(&mut stream);
        let ((), all) = tokio::join!(
            async {
                write.write_all(head.as_bytes()).await.unwrap();
                write.write_all(body.as_bytes()).await.unwrap();
            },
            async {
                let mut all = Vec::new();
                let _ = read.read_to_end(&mut all).await;
                all
            }
        );
        assert!(unchunk(&all).ends_with(&body));
        let event = w.event().await;
        assert_eq!(event.bytes_out, body.len() as u64);
        assert!(event.bytes_in > body.len() as u64);
    });
}

/// The most memory that this process ever had, in octets.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
}

#[test]
fn bodies_far_larger_than_what_is_kept_pass_both_ways() {
    world(|mut w| async move {
        start(&mut w).await;
        let octets: usize = if std::env::var_os("TAPGATE_LONG").is_some() { 2 << 30 } else { 96 << 20 };
        let tls = w.ca.server(&["api.example"], &["http/1.1"]);
        let listener = TcpListener::bind((SERVER, 443)).await.unwrap();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let mut stream = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await.unwrap();
            until(&mut stream, "\r\n\r\n").await;
            let mut buffer = vec![0; 64 * 1024];
            let mut got = 0;
            while got < octets {
                got += stream.read(&mut buffer).await.unwrap();
            }
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {octets}\r\n\r\n");
            stream.write_all(head.as_bytes()).await.unwrap();
            for _ in 0..octets / buffer.len() {
                stream.write_all(&buffer).await.unwrap();
            }
            stream.flush().await.unwrap();
            let _ = stream.read_u8().await;
        });
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        let head =
            format!("PUT /x HTTP/1.1\r\nHost: api.example\r\n{BEARER}Content-Length: {octets}\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut buffer = vec![b'x'; 64 * 1024];
        let before = peak();
        for _ in 0..octets / buffer.len() {
            stream.write_all(&buffer).await.unwrap();
        }
        stream.flush().await.unwrap();
        assert!(until(&mut stream, "\r\n\r\n").await.starts_with("HTTP/1.1 200"));
        let mut got = 0;
        while got < octets {
            let length = stream.read(&mut buffer).await.unwrap();
            assert!(length > 0, "the answer broke off after {got}");
            got += length;
        }
        let grown = peak() - before;
        assert!(grown < 48 << 20, "{octets} octets each way took {grown} octets of memory");
        drop(stream);
        let event = w.event().await;
        assert_eq!((event.bytes_out, event.bytes_in), (octets as u64, octets as u64));
    });
}

#[test]
fn a_vm_at_its_limit_is_refused_and_others_are_not() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 80), None).await;
        // A ClientHello that never ends holds its connection until the deadline.
        let mut held = Vec::new();
        for _ in 0..support::CONNECTIONS {
            let mut stream = w.connect((SERVER, 80)).await;
            stream.write_all(b"\x16\x03").await.unwrap();
            held.push(stream);
        }
        assert!(w.connect((SERVER, 80)).await.read_u8().await.is_err());
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Limit });
        // Another VM, at the same moment.
        let other = tapgate_model::VmPolicy { vm: tapgate_model::VmId::generate(), ..(*w.policy).clone() };
        let net = tapgate_model::GuestNet::new(1, [10, 214, 0, 0].into(), None);
        w.table.insert(net, w.vm_ca.clone(), std::sync::Arc::new(other));
        let request = "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n";
        let stream = w.connect_as(net.v4, (SERVER, 80)).await;
        assert!(support::talk(stream, request).await.starts_with("HTTP/1.1 200"));
        // A place is given back with its connection.
        drop(held);
        w.events(support::CONNECTIONS).await;
        assert!(w.http((SERVER, 80), request).await.starts_with("HTTP/1.1 200"));
    });
}

#[test]
fn a_client_that_is_slow_inside_opened_tls_is_served_all_the_same() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 8443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        // Without ALPN, anything may follow; this is silent for longer than a server that speaks first is waited for.
        let mut stream = w.tls((SERVER, 8443), "api.example", &[]).await.unwrap();
        tokio::time::sleep(Duration::from_millis(400)).await;
        for number in 0..2 {
            let request = format!("GET /{number} HTTP/1.1\r\nHost: api.example:8443\r\n{BEARER}\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let answer = until(&mut stream, "\r\n0\r\n\r\n").await;
            assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains(VALUE), "{answer}");
            let seen = w.log.seen().pop().unwrap();
            assert_eq!(seen.header("authorization"), Some(format!("Bearer {VALUE}").as_str()));
            let event = w.event().await;
            assert_eq!((event.protocol, event.status), (tapgate_model::Protocol::Http, Some(200)));
            assert_eq!(event.secrets, ["token"]);
        }
    });
}

#[test]
fn what_is_not_http_inside_opened_tls_is_passed_on_verified() {
    world(|mut w| async move {
        start(&mut w).await;
        let tls = w.ca.server(&["api.example"], &[]);
        let listener = TcpListener::bind((SERVER, 7000)).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = tokio_rustls::TlsAcceptor::from(tls.clone()).accept(stream).await.unwrap();
                // The server speaks first.
                stream.write_all(b"+OK ready\r\n").await.unwrap();
                let _ = until(&mut stream, "\r\n").await;
                stream.write_all(b"+OK bye\r\n").await.unwrap();
                stream.shutdown().await.unwrap();
            }
        });
        let mut stream = w.tls((SERVER, 7000), "api.example", &[]).await.unwrap();
        assert!(w.is_opened(&stream));
        assert_eq!(until(&mut stream, "\r\n").await, "+OK ready\r\n");
        assert_eq!(support::talk(stream, "USER x\r\n").await, "+OK bye\r\n");
        let event = w.event().await;
        assert_eq!((event.protocol, event.verdict.reason()), (tapgate_model::Protocol::Tls, Reason::Host));
        assert_eq!((event.bytes_out, event.bytes_in), (8, 20));
        // Opened, and nothing asked: one event as well.
        drop(w.tls((SERVER, 7000), "api.example", &["http/1.1"]).await.unwrap());
        assert_eq!(w.event().await.protocol, tapgate_model::Protocol::Tls);
    });
}

#[test]
fn a_request_on_the_connection_used_before_leaves_those_at_rest_alone() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.example"], &[]);
        let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
        let (began, mut connections) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                began.send(()).unwrap();
                tokio::spawn(async move {
                    while let Ok(1..) = stream.read(&mut [0; 4096]).await {
                        if stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.is_err()
                        {
                            return;
                        }
                    }
                });
            }
        });
        let ask = async |stream: &mut TcpStream| {
            stream.write_all(b"GET / HTTP/1.1\r\nHost: api.example\r\n\r\n").await.unwrap();
            until(stream, "\r\n\r\nok").await;
        };
        let mut first = w.connect((SERVER, 80)).await;
        ask(&mut first).await;
        let mut second = w.connect((SERVER, 80)).await;
        ask(&mut second).await;
        // Its upstream is at rest when it has ended.
        second.shutdown().await.unwrap();
        let _ = second.read_to_end(&mut Vec::new()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
        ask(&mut first).await;
        ask(&mut w.connect((SERVER, 80)).await).await;
        connections.close();
        let mut count = 0;
        while connections.recv().await.is_some() {
            count += 1;
        }
        assert_eq!(count, 2);
    });
}

/// Answers each request of one connection with what it is told to.
async fn answers(parts: Vec<String>) {
    let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        for part in parts {
            until(&mut stream, "\r\n\r\n").await;
            stream.write_all(part.as_bytes()).await.unwrap();
        }
        let _ = stream.read_u8().await;
    });
}

#[test]
fn heads_before_an_answer_are_passed_on_cleaned() {
    world(|mut w| async move {
        w.zone.set("api.example", &[SERVER]);
        // Named, so that the value goes there in clear text too.
        w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
        let hint = format!(
            "HTTP/1.1 103 {VALUE}\r\nLink: </a.css>; rel=preload\r\nX-Echo: {VALUE}\r\nConnection: x-own\r\nX-Own: 1\r\nAlt-Svc: h3\r\n\r\n"
        );
        let long = format!("HTTP/1.1 103 Early Hints\r\nX: {}\r\n\r\n", "x".repeat(20_000));
        let other = "HTTP/1.1 102 Processing\r\n\r\n".to_owned();
        let done = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n<end>";
        let first = ["HTTP/1.1 100 Continue\r\n\r\n", &hint, &long, &other, done].concat();
        answers(vec![
            first,
            done.to_owned(),
            [other.repeat(20).as_str(), done].concat(),
            [&hint, done].concat(),
        ])
        .await;
        let mut stream = w.connect((SERVER, 80)).await;
        let get = format!("GET / HTTP/1.1\r\nHost: api.example\r\n{BEARER}\r\n");
        stream.write_all(get.as_bytes()).await.unwrap();
        let heads = until(&mut stream, "<end>\r\n0\r\n\r\n").await;
        let heads: Vec<&str> = heads.split("\r\n\r\n").collect();
        assert_eq!(
            heads[0],
            "HTTP/1.1 103 Early Hints\r\nlink: </a.css>; rel=preload\r\nx-echo: IRONSH_PROXY_token"
        );
        assert_eq!(heads[1], "HTTP/1.1 102 Processing");
        assert!(heads[2].starts_with("HTTP/1.1 200 OK") && heads[3].contains("<end>"), "{heads:?}");
        // The next request's answer has none, and a server that sends them without end is not followed.
        for count in [0, 8] {
            stream.write_all(get.as_bytes()).await.unwrap();
            let answer = until(&mut stream, "<end>\r\n0\r\n\r\n").await;
            assert_eq!(answer.matches("HTTP/1.1 102 Processing\r\n\r\n").count(), count, "{answer}");
            assert_eq!(answer.matches("HTTP/1.1 200 OK").count(), 1, "{answer}");
        }
        // HTTP/1.0 knows of none.
        stream.write_all(get.replace("HTTP/1.1", "HTTP/1.0").as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.0 200 OK") && !answer.contains("103"), "{answer}");
    });
}

#[test]
fn a_request_on_which_nothing_moves_is_ended_and_one_that_moves_is_not() {
    world(|mut w| async move {
        start(&mut w).await;
        let mut config = support::config(&w.ca);
        config.timeouts.idle = Duration::from_secs(2);
        w.restart(config);
        let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let request = until(&mut stream, "\r\n\r\n").await;
                    let head = "HTTP/1.1 200 OK\r\nContent-Length: 60\r\n\r\n";
                    if !request.starts_with("GET /silent") {
                        stream.write_all(head.as_bytes()).await.unwrap();
                        stream.write_all(b"first").await.unwrap();
                    }
                    for _ in 0..55 {
                        if !request.starts_with("GET /slow") {
                            break;
                        }
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        stream.write_all(b".").await.unwrap();
                    }
                    let _ = stream.read_u8().await;
                });
            }
        });
        let get =
            |path: &str| format!("GET /{path} HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n");
        let (silent, half, slow) = (get("silent"), get("half"), get("slow"));
        let all = async {
            tokio::join!(
                w.http((SERVER, 80), &silent),
                w.http((SERVER, 80), &half),
                w.http((SERVER, 80), &slow)
            )
        };
        let (silent, half, slow) = tokio::time::timeout(Duration::from_secs(60), all).await.expect("all end");
        assert!(silent.starts_with("HTTP/1.1 502") && silent.contains("for too long"), "{silent}");
        assert!(half.starts_with("HTTP/1.1 200") && half.ends_with("first"), "{half}");
        assert!(slow.starts_with("HTTP/1.1 200") && slow.ends_with(&".".repeat(55)), "{slow}");
        let mut seen: Vec<_> = w.events(3).await.iter().map(|event| event.verdict.reason()).collect();
        seen.sort_unstable_by_key(|reason| reason.word());
        assert_eq!(seen.len(), 3);
        assert!(!seen.contains(&Reason::Revoked) && seen.contains(&Reason::Unreachable), "{seen:?}");
    });
}
