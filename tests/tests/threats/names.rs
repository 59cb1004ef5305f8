//! The name and the address: spellings of hosts, fronting, shared addresses, names that lead elsewhere.

use super::{
    field::{Event, Field, Real, on_field, the_attacker_sees_what_comes},
    frames::{self, H2},
    wire::{self, Offer, has_status, https, tcp},
};
use std::net::{Ipv4Addr, SocketAddr};
use tapgate_e2e::sites::{self, API, ECHO, EVIL, OTHER, UNTRUSTED};

const VALUE: &str = "sk-live-names-77d1e0c6b2f94a5c";
const REALS: &[Real] = &[Real { value: VALUE, sites: &[ECHO] }];
const HTTP: u16 = 80;
const HTTPS: u16 = 443;

fn at(address: Ipv4Addr, port: u16) -> SocketAddr {
    (address, port).into()
}

/// The rest of a head, with the placeholder.
fn rest(key: &str) -> String {
    format!("X-Key: {key}\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n\r\n")
}

fn prepare(field: &mut Field<'_>) -> String {
    field.api().rule("host", ECHO.name).unwrap();
    field.api().rule("host", API.name).unwrap();
    field.api().secret("key", "KEY", VALUE, &[ECHO.name]).unwrap()
}

#[test]
fn no_name_brings_a_value_to_another_address() {
    on_field(REALS, |field| {
        let key = prepare(field);
        let before = field.arrived(EVIL);
        the_address_is_not_what_was_dialled(field, &key);
        fronting(field, &key);
        one_name_at_a_shared_address(field);
        let arrived = field.arrived(EVIL) - before;
        field.check(arrived == 0, || format!("{arrived} packets came to the attacker"));
        an_upstream_is_who_it_says(field, &key);
        the_attacker_sees_what_comes(field);
    });
}

/// An allowed name written to an address of one's own: it goes to the name's server, and never to that address.
fn the_address_is_not_what_was_dialled(field: &mut Field<'_>, key: &str) {
    let passed = [Event::Passed("host")];
    let request = |host: &str| format!("GET /own HTTP/1.1\r\nHost: {host}\r\n{}", rest(key));
    for to in [EVIL, OTHER] {
        for (site, port) in [(ECHO, HTTP), (API, HTTP)] {
            let what = format!("{} in clear text, at the address of {}", site.name, to.name);
            let got = field.attempt(&what, &passed, || tcp(at(to.v4, port), request(site.name).as_bytes()));
            field.check(has_status(&got, 404), || format!("{what}: {}", String::from_utf8_lossy(&got)));
        }
        for site in [ECHO, API] {
            let what = format!("{} in TLS, at the address of {}", site.name, to.name);
            let got = field.attempt(&what, &passed, || {
                https(at(to.v4, HTTPS), site.name, request(site.name).as_bytes())
            });
            field.check(has_status(&got, 404), || format!("{what}: {}", String::from_utf8_lossy(&got)));
        }
        let what = format!("{} at the IPv6 address of {}", ECHO.name, to.name);
        let to = SocketAddr::from((to.v6, HTTPS));
        let got = field.attempt(&what, &passed, || https(to, ECHO.name, request(ECHO.name).as_bytes()));
        field.check(has_status(&got, 404), || format!("{what}: {}", String::from_utf8_lossy(&got)));
    }
}

/// One name outside, another inside; also as the second request, by HTTP/2's coalescing, and in the request's target.
fn fronting(field: &mut Field<'_>, key: &str) {
    let (echo, evil, api) = (ECHO.name, EVIL.name, API.name);
    let rest = rest(key);
    let first = format!("GET /first HTTP/1.1\r\nHost: {echo}\r\n\r\n");
    let other = [Event::Refused("name_mismatch")];
    for inside in [evil, api] {
        let rows = [
            ("Host", format!("GET /f HTTP/1.1\r\nHost: {inside}\r\n{rest}"), false),
            ("target", format!("GET https://{inside}/f HTTP/1.1\r\nHost: {echo}\r\n{rest}"), false),
            (
                "target and Host",
                format!("GET https://{inside}/f HTTP/1.1\r\nHost: {inside}\r\n{rest}"),
                false,
            ),
            ("second request", format!("{first}GET /f HTTP/1.1\r\nHost: {inside}\r\n{rest}"), true),
        ];
        for (how, request, second) in rows {
            let what = format!("SNI {echo}, {how} {inside}");
            let wanted = if second { vec![Event::Passed("host"), other[0]] } else { other.to_vec() };
            let got = field.attempt(&what, &wanted, || https(at(EVIL.v4, HTTPS), echo, request.as_bytes()));
            let text = String::from_utf8_lossy(&got);
            field.check(text.contains("HTTP/1.1 421"), || format!("{what}: {text}"));
        }
        let what = format!("SNI {echo}, :authority {inside}");
        field.attempt(&what, &other, || {
            let mut peer =
                H2::over(Offer::alpn(&["h2"]).tls(echo, wire::connect(at(EVIL.v4, HTTPS)).unwrap()));
            peer.send(&frames::get(1, "https", inside, "/f", &[("x-key", key)]));
            peer.answers(&[1])
        });
        let what = format!("coalescing: a stream for {echo}, then one for {inside}");
        field.attempt(&what, &[Event::Passed("host"), other[0]], || {
            let mut peer =
                H2::over(Offer::alpn(&["h2"]).tls(echo, wire::connect(at(EVIL.v4, HTTPS)).unwrap()));
            peer.send(&frames::get(1, "https", echo, "/f", &[("x-key", key)]));
            peer.send(&frames::get(3, "https", inside, "/f", &[("x-key", key)]));
            peer.answers(&[1, 3])
        });
        let what = format!(":authority {echo}, host {inside}");
        field.attempt(&what, &[Event::Refused("name_mismatch")], || {
            let mut peer =
                H2::over(Offer::alpn(&["h2"]).tls(echo, wire::connect(at(EVIL.v4, HTTPS)).unwrap()));
            peer.send(&frames::get(1, "https", echo, "/f", &[("host", inside), ("x-key", key)]));
            peer.answers(&[1])
        });
    }
    // In clear text each request is decided by its own name: the second is refused for what it is.
    let what = "a second request for another host, in clear text";
    let both = [Event::Passed("host"), Event::Refused("no_rule")];
    let request = format!("{first}GET /f HTTP/1.1\r\nHost: {evil}\r\n{rest}");
    field.attempt(what, &both, || tcp(at(ECHO.v4, HTTP), request.as_bytes()));
    field.attempt("the same by HTTP/2 without TLS", &both, || {
        let mut peer = H2::over(wire::connect(at(EVIL.v4, HTTP)));
        peer.send(&frames::get(1, "http", echo, "/f", &[("x-key", key)]));
        peer.send(&frames::get(3, "http", evil, "/f", &[("x-key", key)]));
        peer.answers(&[1, 3])
    });
}

/// An address that an allowed name shares is no way to its neighbours; nor is no name, or an address for one.
fn one_name_at_a_shared_address(field: &mut Field<'_>) {
    let request = format!("GET /n HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n", OTHER.name);
    for site in [ECHO, API] {
        let what = format!("a neighbour at the address of {}", site.name);
        let refused = [Event::Refused("no_rule")];
        field.attempt(&what, &refused, || tcp(at(site.v4, HTTP), request.as_bytes()));
        field.attempt(&what, &refused, || wire::dribble(at(site.v4, HTTP), request.as_bytes(), 1));
        field.attempt(&what, &refused, || https(at(site.v4, HTTPS), OTHER.name, request.as_bytes()));
        let what = format!("TLS without a name at the address of {}", site.name);
        let address = site.v4.to_string();
        field.attempt(&what, &[Event::Refused("no_name")], || {
            https(at(site.v4, HTTPS), &address, request.as_bytes())
        });
    }
}

/// The name resolves to a server that has no certificate for it that anybody vouches for.
fn an_upstream_is_who_it_says(field: &mut Field<'_>, key: &str) {
    let name = UNTRUSTED.name;
    field.api().rule("host", name).unwrap();
    field.api().secret("second", "SECOND", VALUE, &[name]).unwrap();
    let request = format!("GET /u HTTP/1.1\r\nHost: {name}\r\n{}", rest(&key.replace("key", "second")));
    let got =
        field.attempt("a server whose certificate does not verify", &[Event::Refused("unverified")], || {
            https(at(UNTRUSTED.v4, HTTPS), name, request.as_bytes())
        });
    field.check(has_status(&got, 502), || format!("unverified: {}", String::from_utf8_lossy(&got)));
}

/// Hosts as they may be written, and what becomes of each in `Host`, and in an absolute target beside the allowed `Host`.
const SPELLINGS: &[&str] = &[
    "evil.example.net",
    "echo.example.com@evil.example.net",
    "evil.example.net@echo.example.com",
    "echo.example.com:80@evil.example.net",
    "evil.example.net#echo.example.com",
    "evil.example.net?echo.example.com",
    "evil.example.net/echo.example.com",
    "evil.example.net\\@echo.example.com",
    "echo.example.com.evil.example.net",
    "echo.example.com\u{3002}evil.example.net",
    "echo\u{ff0e}example\u{ff0e}com",
    "\u{435}cho.example.com",
    "xn--a",
    "xn--cho-qdd.example.com",
    "echo.example.com\0.evil.example.net",
    "echo.example.com\0",
    "echo.example.com%00",
    "echo.example.com%2eevil.example.net",
    "echo%2eexample.com",
    "echo.example.com evil.example.net",
    "echo.example.com,evil.example.net",
    "echo.example.com;evil.example.net",
    "echo.example.com:99999",
    "echo.example.com:",
    "echo.example.com:8o",
    "echo.example.com:80:80",
    "echo.example.com..",
    "echo..example.com",
    ".echo.example.com",
    "-echo.example.com",
    "*",
    "*.example.com",
    "",
    "198.51.100.66",
    "198.51.100.66.",
    "198.51.25666",
    "198.3367010",
    "0xc6336442",
    "0xc6.0x33.0x64.0x42",
    "0306.063.0144.0102",
    "3325256770",
    "[::ffff:198.51.100.66]",
    "[::ffff:c633:6442]",
    "[2001:db8:113::66]",
    "[2001:db8:113::66",
    "[2001:db8:113::66%25eth0]",
    "2001:db8:113::66",
    "[v1.evil]",
];

#[test]
fn no_spelling_of_a_host_brings_a_value_elsewhere() {
    on_field(REALS, |field| {
        let key = prepare(field);
        let before = field.arrived(EVIL);
        let echo = ECHO.name;
        let rest = rest(&key);
        for host in SPELLINGS {
            for (how, head) in [
                ("Host", format!("GET /h HTTP/1.1\r\nHost: {host}\r\n{rest}")),
                ("target", format!("GET http://{host}/h HTTP/1.1\r\nHost: {echo}\r\n{rest}")),
                ("Host beside a target", format!("GET http://{echo}/h HTTP/1.1\r\nHost: {host}\r\n{rest}")),
                ("two Hosts", format!("GET /h HTTP/1.1\r\nHost: {echo}\r\nHost: {host}\r\n{rest}")),
                ("leading CRLF", format!("\r\nGET /h HTTP/1.1\r\nHost: {host}\r\n{rest}")),
            ] {
                let what = format!("{how} {host:?}");
                let got = field.guest(&what, || tcp(at(EVIL.v4, HTTP), head.as_bytes()));
                field.expect_refusal(
                    &what,
                    &["no_rule", "bad_name", "bad_request", "address_literal", "name_mismatch"],
                );
                let text = String::from_utf8_lossy(&got);
                field.check(text.starts_with("HTTP/1.1 4"), || format!("{what}: {text}"));
            }
        }
        let arrived = field.arrived(EVIL) - before;
        field.check(arrived == 0, || format!("{arrived} packets came to the attacker"));
        // These are the allowed name, and go to it.
        for host in ["ECHO.Example.com", "echo.example.com.", "echo.example.com:80"] {
            let head = format!("GET /h HTTP/1.1\r\nHost: {host}\r\n{rest}");
            let what = format!("Host {host:?}");
            let got =
                field.attempt(&what, &[Event::Passed("host")], || tcp(at(EVIL.v4, HTTP), head.as_bytes()));
            field.check(has_status(&got, 404), || format!("{what}: {}", String::from_utf8_lossy(&got)));
        }
        the_attacker_sees_what_comes(field);
    });
}

/// The address of the name changes between the look and the dial; its answers are good for no time.
#[test]
fn a_name_that_is_bound_anew_leads_nowhere_inside() {
    on_field(REALS, |field| {
        let key = prepare(field);
        field.api().rule("host", sites::REBIND).unwrap();
        let request = format!("GET /echo HTTP/1.1\r\nHost: {}\r\n{}", sites::REBIND, rest(&key));
        let first =
            field.guest("rebinding, the harmless answer", || tcp(at(ECHO.v4, HTTP), request.as_bytes()));
        field.check(has_status(&first, 200), || String::from_utf8_lossy(&first).into_owned());
        field.expect_events("rebinding, the harmless answer", &[Event::Passed("host")]);
        // To another port it has to be dialled anew. What was found out is kept for a moment; after that every look leads inside.
        let request =
            request.replace(&format!("Host: {}", sites::REBIND), &format!("Host: {}:8080", sites::REBIND));
        let turned = (0..60).any(|_| {
            std::thread::sleep(std::time::Duration::from_millis(500));
            let got = field.guest("rebinding", || tcp(at(ECHO.v4, 8080), request.as_bytes()));
            has_status(&got, 403)
        });
        field.check(turned, || "the second answer was never asked for".into());
        field.expect_events("rebinding", &[Event::Refused("rebinding")]);
        let own = format!("GET /own HTTP/1.1\r\nHost: {}\r\n{}", ECHO.name, rest(&key));
        field.attempt("the value's own host", &[Event::Passed("host")], || {
            https(at(ECHO.v4, HTTPS), ECHO.name, own.as_bytes())
        });
    });
}
