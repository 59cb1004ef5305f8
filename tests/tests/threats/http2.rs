//! HTTP/2 from a guest: floods, bombs, a thousand streams, trailers and requests that are malformed; in clear text and in TLS
//! that is opened. Each costs its own connection alone.

use super::{
    field::{Event, Field, Real, on_field, the_attacker_sees_what_comes},
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, GOAWAY, H2, HEADERS, RST_STREAM, fields, frame, get,
        length, post,
    },
    wire::{Offer, connect},
};
use std::{
    io::{Read, Write},
    net::SocketAddr,
};
use tapgate_e2e::sites::{ECHO, EVIL};

const VALUE: &str = "sk-live-http2-81f2d6a40c3b4957";
const REALS: &[Real] = &[Real { value: VALUE, sites: &[ECHO] }];
/// What a flood may make the daemon grow by; unbounded, each makes it some hundred MiB.
const GROWTH: u64 = 64 << 20;

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

/// A connection whose name is the allowed one; dialled at the attacker's address.
fn peer(secure: bool) -> H2<Box<dyn Stream>> {
    let stream = connect(SocketAddr::from((EVIL.v4, if secure { 443 } else { 80 })));
    H2::over(stream.and_then(|stream| {
        Ok(match secure {
            true => Box::new(Offer::alpn(&["h2"]).tls(ECHO.name, stream)?) as Box<dyn Stream>,
            false => Box::new(stream),
        })
    }))
}

#[test]
fn http2_costs_its_own_connection_alone() {
    on_field(REALS, |field| {
        field.api().rule("host", ECHO.name).unwrap();
        let key = field.api().secret("key", "KEY", VALUE, &[ECHO.name]).unwrap();
        let before = field.arrived(EVIL);
        for secure in [true, false] {
            floods(field, secure);
            a_thousand_streams(field, secure);
            malformed(field, secure, &key);
            trailers(field, secure, &key);
        }
        let arrived = field.arrived(EVIL) - before;
        field.check(arrived == 0, || format!("{arrived} packets came to the attacker"));
        the_attacker_sees_what_comes(field);
    });
}

fn scheme(secure: bool) -> &'static str {
    if secure { "https" } else { "http" }
}

/// The daemon's memory at its highest so far.
fn highest(field: &Field<'_>) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", field.stage.daemon().pid())).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

fn floods(field: &mut Field<'_>, secure: bool) {
    let (scheme, host) = (scheme(secure), ECHO.name);
    let ask = |n: u32, more: &[(&str, &str)]| get(2 * n + 1, scheme, host, "/flood", more);
    let cut = |n: u32| frame(HEADERS, END_STREAM, 2 * n + 1, &get(1, scheme, host, "/flood", &[])[9..]);
    let reset = |n: u32| frame(RST_STREAM, 0, 2 * n + 1, &[0, 0, 0, 8]);
    // One large field in the table, and a head of nothing but references to it.
    let large = "y".repeat(3900);
    let kept = [vec![0x40], length(1), b"x".to_vec(), length(large.len()), large.into_bytes()].concat();
    let bomb = [&get(1, scheme, host, "/flood", &[])[9..], &kept, &[0xbe].repeat(16_000)[..]].concat();
    let pieces: Vec<&[u8]> = bomb.chunks(16_000).collect();
    let bombed = [
        frame(HEADERS, END_STREAM, 1, pieces[0]),
        frame(CONTINUATION, END_HEADERS, 1, &pieces[1..].concat()),
    ]
    .concat();
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("rapid reset", (0..5000).flat_map(|n| [ask(n, &[]), reset(n)].concat()).collect()),
        (
            "resets that bad frames provoke",
            (0..5000)
                .flat_map(|n| {
                    [post(2 * n + 1, scheme, host, "/flood", &[]), frame(8, 0, 2 * n + 1, &[0; 4])].concat()
                })
                .collect(),
        ),
        (
            "CONTINUATION without end",
            [
                cut(0),
                (0..200_000).flat_map(|_| frame(CONTINUATION, 0, 1, &[0x40, 1, b'a', 1, b'b'])).collect(),
            ]
            .concat(),
        ),
        (
            "empty CONTINUATION without end",
            [cut(0), (0..200_000).flat_map(|_| frame(CONTINUATION, 0, 1, b"")).collect()].concat(),
        ),
        ("a bomb of references to one field", bombed.clone()),
        (
            "a head of 1 MiB",
            [
                cut(0),
                (0..64)
                    .flat_map(|_| frame(CONTINUATION, 0, 1, &fields(&[("x", &"y".repeat(16_000))])))
                    .collect(),
            ]
            .concat(),
        ),
        (
            "PING without end",
            [(0..20_000).flat_map(|_| frame(6, 0, 0, b"12345678")).collect(), ask(0, &[])].concat(),
        ),
        (
            "SETTINGS without end",
            [(0..20_000).flat_map(|_| frame(4, 0, 0, b"")).collect(), ask(0, &[])].concat(),
        ),
    ];
    for (what, bytes) in rows {
        let what = format!("{what}, {scheme}");
        let before = highest(field);
        field.guest(&what, || {
            let mut peer = peer(secure);
            peer.send(&bytes);
            // The end of the connection, or the answer to what is only much.
            peer.until(&[GOAWAY, RST_STREAM, HEADERS], 0);
            Vec::new()
        });
        let grown = highest(field).saturating_sub(before);
        field.check(grown < GROWTH, || format!("{what}: the daemon grew by {} MiB", grown >> 20));
        is_served(field, &what, secure);
    }
}

/// Another connection is served meanwhile.
fn is_served(field: &mut Field<'_>, what: &str, secure: bool) {
    let after = format!("after {what}");
    let from = field.world().journal().mark();
    field.guest(&after, || {
        let mut peer = peer(secure);
        peer.send(&get(1, scheme(secure), ECHO.name, "/after", &[]));
        peer.answers(&[1])
    });
    let seen = from.http(ECHO.name).unwrap();
    let served =
        seen.iter().any(|entry| entry["target"].as_str().is_some_and(|target| target.ends_with("/after")));
    field.check(served, || format!("{after}: {seen:?}"));
}

/// As many as are allowed are served, the others refused, and none is kept waiting for ever.
fn a_thousand_streams(field: &mut Field<'_>, secure: bool) {
    let what = format!("a thousand streams, {}", scheme(secure));
    let mut refused = false;
    field.guest(&what, || {
        let mut peer = peer(secure);
        let open = |n: u32| post(2 * n + 1, scheme(secure), ECHO.name, "/many", &[]);
        peer.send(&(0..1000).flat_map(open).collect::<Vec<u8>>());
        refused = peer.refused();
        Vec::new()
    });
    field.check(refused, || format!("{what}: all were taken"));
    is_served(field, &what, secure);
}

/// None of these becomes a request at the server, whole or as another's part.
fn malformed(field: &mut Field<'_>, secure: bool, key: &str) {
    let (scheme, host, evil) = (scheme(secure), ECHO.name, EVIL.name);
    let with = |more: &[(&str, &str)]| get(1, scheme, host, "/malformed", more);
    let named = |authority: &str| get(1, scheme, authority, "/malformed", &[("x-key", key)]);
    let path = |path: &str| get(1, scheme, host, path, &[("x-key", key)]);
    let raw = |all: &[(&str, &str)]| frame(HEADERS, END_STREAM | END_HEADERS, 1, &fields(all));
    let inner = format!("/malformed HTTP/1.1\r\nHost: {evil}\r\n\r\nGET /smuggled");
    let rows: Vec<(&str, Vec<u8>)> = vec![
        ("CR LF in a field's value", with(&[("x", "a\r\nx-evil: 1")])),
        ("CR LF in a field's name", with(&[("x\r\ny", "a")])),
        ("CR LF in the path", path(&inner)),
        ("a space in the path", path("/malformed HTTP/1.1")),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
        ("connection", with(&[("connection", "upgrade"), ("upgrade", "tcp")])),
        ("upper case", with(&[("X-Upper", "a")])),
        ("a colon in a name", with(&[("x:y", "a")])),
        ("a length that is not that of no body", with(&[("content-length", "5")])),
        ("two lengths", with(&[("content-length", "0"), ("content-length", "5")])),
        ("te that is not trailers", with(&[("te", "gzip")])),
        ("another scheme", get(1, "ftp", host, "/malformed", &[])),
        ("two authorities", with(&[(":authority", evil)])),
        ("two paths", with(&[(":path", "/smuggled")])),
        ("no path", raw(&[(":method", "GET"), (":scheme", scheme), (":authority", host)])),
        ("no method", raw(&[(":scheme", scheme), (":path", "/malformed"), (":authority", host)])),
        ("an unknown pseudo-field", with(&[(":evil", "1")])),
        ("userinfo in the authority", named(&format!("{host}@{evil}"))),
        ("a path in the authority", named(&format!("{evil}/{host}"))),
        ("CR LF in the authority", named(&format!("{host}\r\nHost: {evil}"))),
        ("an empty authority", named("")),
        ("CONNECT", raw(&[(":method", "CONNECT"), (":authority", &format!("{evil}:80"))])),
        (
            "extended CONNECT of an unknown protocol",
            raw(&[
                (":method", "CONNECT"),
                (":protocol", "connect-udp"),
                (":scheme", scheme),
                (":path", "/malformed"),
                (":authority", host),
            ]),
        ),
        (
            "a body longer than its length",
            [
                post(1, scheme, host, "/malformed", &[("content-length", "1")]),
                frame(DATA, END_STREAM, 1, b"GET /smuggled HTTP/1.1\r\n\r\n"),
            ]
            .concat(),
        ),
    ];
    let from = field.world().journal().mark();
    for (what, bytes) in rows {
        let what = format!("{what}, {scheme}");
        field.guest(&what, || {
            let mut peer = peer(secure);
            peer.send(&bytes);
            peer.answers(&[1])
        });
    }
    let seen = from.http(ECHO.name).unwrap();
    let came: Vec<_> = seen
        .iter()
        .filter(|entry| {
            entry["body"] != ""
                || entry["target"].as_str().is_some_and(|t| t.contains("malformed") || t.contains("smuggled"))
        })
        .collect();
    field.check(came.is_empty(), || format!("malformed requests came to the server, {scheme}: {came:#?}"));
}

/// Trailers say what only trailers may, and carry no value out that a head would not.
fn trailers(field: &mut Field<'_>, secure: bool, key: &str) {
    let what = format!("trailers, {}", scheme(secure));
    let from = field.world().journal().mark();
    let named = [
        ("host", EVIL.name),
        ("content-length", "5"),
        ("transfer-encoding", "chunked"),
        ("authorization", key),
        ("cookie", "a=b"),
        ("x-sum", "1"),
    ];
    for (name, value) in named {
        let got = field.guest(&what, || {
            let mut peer = peer(secure);
            let head = post(1, scheme(secure), ECHO.name, "/echo", &[]);
            let trailers = frame(HEADERS, END_STREAM | END_HEADERS, 1, &fields(&[(name, value)]));
            peer.send(&[head, frame(DATA, 0, 1, b"body"), trailers].concat());
            peer.answers(&[1])
        });
        field.check(!got.is_empty(), || format!("{what} of {name}: nothing came back"));
    }
    let seen = from.http(ECHO.name).unwrap();
    for entry in &seen {
        let trailers = entry["trailers"].to_string();
        let said: Vec<&str> =
            named[..5].iter().map(|(name, _)| *name).filter(|name| trailers.contains(*name)).collect();
        field.check(said.is_empty(), || format!("{what} said {said:?}: {entry}"));
    }
    let sum = seen.iter().any(|entry| entry["trailers"].to_string().contains("x-sum"));
    field.check(sum, || format!("{what}: what trailers may say did not come: {seen:?}"));
    field.attempt(&format!("{what}: the value's own"), &[Event::Passed("host")], || {
        let mut peer = peer(true);
        peer.send(&get(1, "https", ECHO.name, "/own", &[("x-key", key)]));
        peer.answers(&[1])
    });
}
