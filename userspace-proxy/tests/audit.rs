//! The audit's promise over every way that an attempt can take: one event, no more and no fewer, with what moved, and with the
//! id that a refusal shows.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use support::{ATTACKER, OTHER, SERVER, World, talk, world};
use tapgate_model::{AuditEvent, Mode, Protocol, Reason};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

/// Waits for the event, and for whatever might follow it: an attempt of another name goes after it, all the way.
async fn only(w: &World, what: &str) -> AuditEvent {
    w.events(1).await;
    let last =
        w.http((SERVER, 80), "GET /last HTTP/1.1\r\nHost: last.example\r\nConnection: close\r\n\r\n").await;
    assert!(last.starts_with("HTTP/1.1 403"), "{last}");
    let mut events = w.events(2).await;
    w.sink.forget();
    assert_eq!(events.len(), 2, "{what}: {events:#?}");
    let last = events.iter().position(|event| event.path.as_deref() == Some("/last")).unwrap();
    events.remove(1 - last)
}

fn get(host: &str) -> String {
    format!("GET /p HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n")
}

/// The id that a refusal shows, in its head and in its body.
fn shown(answer: &str) -> String {
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let in_head = head
        .lines()
        .find_map(|line| line.to_ascii_lowercase().strip_prefix("x-tapgate-event: ").map(str::to_owned));
    let body: serde_json::Value = serde_json::from_str(body).unwrap();
    let in_body = body["error"]["event_id"].as_str().unwrap().to_owned();
    assert!(in_head.is_none_or(|id| id == in_body), "{answer}");
    in_body
}

#[test]
fn every_way_leaves_one_event_with_sizes_and_the_id_that_was_shown() {
    world(|mut w| async move {
        for (name, at) in [("a.example", SERVER), ("s.example", OTHER), ("down.example", ATTACKER)] {
            w.zone.set(name, &[at]);
        }
        w.serve((SERVER, 80), None).await;
        w.serve((SERVER, 443), Some(w.ca.server(&["a.example"], &["http/1.1"]))).await;
        w.serve((OTHER, 443), Some(w.ca.server(&["s.example"], &["http/1.1"]))).await;
        w.rules(
            Mode::Enforce,
            &["a.example", "s.example", "down.example", "gone.example"],
            &[("t", "ghp_realvalue", &["s.example", "down.example"])],
        );
        // What is refused in HTTP, in clear text and opened: the id is in the answer.
        let posted =
            "POST /p HTTP/1.1\r\nHost: no.example\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
        for (what, to, request, reason, moved) in [
            ("no rule", SERVER, get("no.example"), Reason::NoRule, 0),
            ("with a body", SERVER, posted.to_owned(), Reason::NoRule, 5),
            ("unreachable", ATTACKER, get("down.example"), Reason::Unreachable, 0),
            ("unresolved", SERVER, get("gone.example"), Reason::Unresolved, 0),
            ("two hosts", SERVER, get("a.example\r\nHost: b.example"), Reason::BadRequest, 0),
            ("no name", SERVER, get("a_b@c"), Reason::BadName, 0),
            (
                "a tunnel",
                SERVER,
                "CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443\r\n\r\n".into(),
                Reason::Tunnel,
                0,
            ),
        ] {
            let answer = w.http((to, 80), &request).await;
            let event = only(&w, what).await;
            assert_eq!(event.verdict.reason(), reason, "{what}: {answer}");
            assert_eq!(shown(&answer), event.id.unwrap().as_str(), "{what}");
            let body = answer.split_once("\r\n\r\n").unwrap().1.len() as u64;
            assert_eq!((event.bytes_out, event.bytes_in), (moved, body), "{what}");
        }
        let answer = w.https((OTHER, 443), "s.example", &get("a.example")).await;
        let event = only(&w, "another name inside").await;
        assert_eq!((event.verdict.reason(), event.protocol), (Reason::NameMismatch, Protocol::Http));
        assert_eq!(shown(&answer), event.id.unwrap().as_str());
        let answer = w.https((ATTACKER, 443), "down.example", &get("down.example")).await;
        let event = only(&w, "opened, unreachable").await;
        assert_eq!(event.verdict.reason(), Reason::Unreachable);
        assert_eq!(shown(&answer), event.id.unwrap().as_str());

        // What passes: what moved is what is said to have moved.
        let post =
            "POST /length HTTP/1.1\r\nHost: a.example\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello";
        let answer = w.http((SERVER, 80), post).await;
        let body = answer.split_once("\r\n\r\n").unwrap().1.len() as u64;
        let event = only(&w, "clear text").await;
        assert_eq!((event.status, event.bytes_out, event.bytes_in), (Some(200), 5, body), "{answer}");
        w.https((OTHER, 443), "s.example", &get("s.example")).await;
        let event = only(&w, "opened").await;
        assert_eq!((event.protocol, event.status), (Protocol::Http, Some(200)));
        let waits = std::time::Duration::from_millis(30);
        let mut stream = w.tls((SERVER, 443), "a.example", &["http/1.1"]).await.unwrap();
        tokio::time::sleep(waits).await;
        talk(&mut stream, &get("a.example")).await;
        drop(stream);
        let event = only(&w, "spliced").await;
        assert_eq!(event.protocol, Protocol::Tls);
        assert!(event.bytes_out > 300 && event.bytes_in > 300 && event.duration_ms >= 30, "{event:?}");
        drop(w.tls((OTHER, 443), "s.example", &["http/1.1"]).await.unwrap());
        let event = only(&w, "opened, nothing asked").await;
        assert!(event.verdict.is_allowed() && event.protocol == Protocol::Tls);

        // What begins as HTTP and never becomes a request: closed, or stalled until it is given up.
        let mut config = support::config(&w.ca);
        config.timeouts.keep_alive = std::time::Duration::from_millis(200);
        w.restart(config);
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
        for (what, bytes, closed) in [
            ("half a head", &b"GET / HTTP/1.1\r\n"[..], true),
            ("half a head, and silence", b"GET / HTTP/1.1\r\nHost: a.example\r\n", false),
            ("a preface alone", preface, true),
        ] {
            let mut stream = w.connect((SERVER, 80)).await;
            stream.write_all(bytes).await.unwrap();
            if closed {
                stream.shutdown().await.unwrap();
            }
            let _ = stream.read_to_end(&mut Vec::new()).await;
            let event = only(&w, what).await;
            assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Http, Reason::NoName), "{what}");
        }

        // What is refused before HTTP.
        assert!(w.tls((SERVER, 443), "no.example", &[]).await.is_err());
        assert_eq!(only(&w, "an alert").await.verdict.reason(), Reason::NoRule);
        for (what, port, bytes, reason) in [
            ("a broken hello", 443, &b"\x16\x03\x01\0\x05hello"[..], Reason::BadHello),
            ("another protocol", 22, b"SSH-2.0-x\r\n", Reason::NoName),
            ("no request", 80, b"GET / HTT", Reason::BadRequest),
            ("nothing", 9, b"", Reason::NoName),
        ] {
            let mut stream = w.connect((SERVER, port)).await;
            stream.write_all(bytes).await.unwrap();
            stream.shutdown().await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
            let event = only(&w, what).await;
            assert_eq!((event.verdict.reason(), event.bytes_out), (reason, bytes.len() as u64), "{what}");
        }
    });
}
