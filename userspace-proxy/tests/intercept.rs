//! Opened TLS end to end: real values upstream, placeholders in the guest, one name throughout.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use rustls::{
    ClientConfig, NamedGroup,
    client::{ClientSessionStore, Resumption, Tls12ClientSessionValue, Tls13ClientSessionValue},
};
use rustls_pki_types::ServerName;
use std::{net::Ipv4Addr, sync::Arc};
use support::{ATTACKER, GUEST, OTHER, SERVER, World, world};
use tapgate_model::{GuestNet, Mode, Protocol, Reason, Verdict, VmId, VmPolicy};

const VALUE: &str = "ghp_realvalue0123456789";

/// `api.example` at SERVER with a secret, `other.example` at OTHER without.
async fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.zone.set("other.example", &[OTHER]);
    w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
    w.serve((OTHER, 443), Some(w.ca.server(&["other.example"], &["http/1.1"]))).await;
    w.serve((ATTACKER, 443), Some(w.ca.server(&["evil.example"], &["http/1.1"]))).await;
    w.rules(Mode::Enforce, &["api.example", "other.example"], &[("token", VALUE, &["api.example"])]);
}

fn get(host: &str, path: &str, extra: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{extra}\r\n")
}

const BEARER: &str = "Authorization: Bearer IRONSH_PROXY_token\r\n";

#[test]
fn the_server_gets_the_value_and_the_guest_never_sees_it() {
    world(|mut w| async move {
        start(&mut w).await;
        let answer = w.https((SERVER, 443), "api.example", &get("api.example", "/echo?q=1", BEARER)).await;
        let seen = w.log.seen();
        assert_eq!(seen[0].header("authorization"), Some(format!("Bearer {VALUE}").as_str()));
        assert_eq!(seen[0].header("host"), Some("api.example"));
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(!answer.contains(VALUE), "{answer}");
        assert!(answer.contains("authorization: Bearer IRONSH_PROXY_token\n"), "the body: {answer}");
        assert!(answer.contains("x-echo: Bearer IRONSH_PROXY_token\r\n"), "a header: {answer}");
        assert!(answer.contains("/?t=Bearer IRONSH_PROXY_token\r\n"), "a redirect: {answer}");
        assert!(!answer.contains("alt-svc"));
        let event = w.event().await;
        assert_eq!((event.protocol, event.status), (Protocol::Http, Some(200)));
        assert_eq!(event.host.unwrap().as_str(), "api.example");
        assert_eq!((event.method.as_deref(), event.path.as_deref()), (Some("GET"), Some("/echo")));
        assert_eq!(event.secrets, ["token"]);
        assert_eq!(event.verdict.reason(), Reason::Host);
        assert!(event.verdict.rule().is_some() && event.bytes_in > 0);
    });
}

#[test]
fn every_coding_is_cleaned() {
    world(|mut w| async move {
        start(&mut w).await;
        for coding in ["gzip", "deflate", "br", "zstd", "identity"] {
            let request = get(
                "api.example",
                &format!("/coded/{coding}"),
                &format!("{BEARER}Accept-Encoding: gzip, br, dcz\r\n"),
            );
            let answer = w.https((SERVER, 443), "api.example", &request).await;
            assert!(answer.contains("authorization: Bearer IRONSH_PROXY_token\n"), "{coding}: {answer}");
            assert!(!answer.contains(VALUE));
            assert!(!answer.to_lowercase().contains("content-length"), "{answer}");
        }
        assert_eq!(w.log.seen()[0].header("accept-encoding"), Some("gzip, br"));
        // One that cannot be read is not passed on.
        let answer =
            w.https((SERVER, 443), "api.example", &get("api.example", "/coded/compress", BEARER)).await;
        assert!(answer.starts_with("HTTP/1.1 502") && !answer.contains(VALUE), "{answer}");
    });
}

#[test]
fn basic_credentials_are_opened_filled_and_cleaned() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    world(|mut w| async move {
        start(&mut w).await;
        let sent = STANDARD.encode("git:IRONSH_PROXY_token");
        let real = STANDARD.encode(format!("git:{VALUE}"));
        let request = get("api.example", "/echo", &format!("Authorization: Basic {sent}\r\n"));
        let answer = w.https((SERVER, 443), "api.example", &request).await;
        assert_eq!(w.log.seen()[0].header("authorization"), Some(format!("Basic {real}").as_str()));
        assert!(!answer.contains(&real) && answer.contains(&sent), "{answer}");
    });
}

#[test]
fn hosts_without_a_secret_stay_end_to_end() {
    world(|mut w| async move {
        start(&mut w).await;
        let stream = w.tls((OTHER, 443), "other.example", &[]).await.unwrap();
        assert!(!w.is_opened(&stream));
        let answer = support::talk(stream, &get("other.example", "/", BEARER)).await;
        assert!(answer.contains("Bearer IRONSH_PROXY_token"), "{answer}");
        let event = w.event().await;
        assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Tls, Reason::Host));
        assert!(event.bytes_in > 0 && event.bytes_out > 0);
        // Opened from the moment that a secret could apply.
        w.rules(Mode::Enforce, &["other.example"], &[("token", VALUE, &["*"])]);
        let stream = w.tls((OTHER, 443), "other.example", &[]).await.unwrap();
        assert!(w.is_opened(&stream));
        let answer = support::talk(stream, &get("other.example", "/", BEARER)).await;
        assert!(answer.starts_with("HTTP/1.1 200") && !answer.contains(VALUE), "{answer}");
        assert_eq!(w.log.seen()[1].header("authorization"), Some(format!("Bearer {VALUE}").as_str()));
    });
}

#[test]
fn another_name_inside_the_connection_is_misdirected() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Enforce, &["*"], &[("token", VALUE, &["*"])]);
        for host in
            ["other.example", "evil.example", "api.example.evil.example", "192.0.2.10", "api.example:8443"]
        {
            let answer = w.https((SERVER, 443), "api.example", &get(host, "/", BEARER)).await;
            assert!(answer.starts_with("HTTP/1.1 421"), "{host}: {answer}");
            let event = w.event().await;
            assert_eq!(event.verdict, Verdict::Deny { reason: Reason::NameMismatch });
            assert!(answer.contains(event.id.unwrap().as_str()), "the page names the event");
        }
        // The second request of a connection is judged like the first.
        let two =
            format!("GET /one HTTP/1.1\r\nHost: API.example.\r\n\r\n{}", get("evil.example", "/two", BEARER));
        let answer = w.https((SERVER, 443), "api.example", &two).await;
        assert!(answer.contains("HTTP/1.1 200") && answer.contains("HTTP/1.1 421"), "{answer}");
        assert_eq!(w.events(2).await.len(), 2);
        let lines: Vec<_> = w.log.seen().into_iter().map(|seen| seen.line).collect();
        assert_eq!(lines, ["GET /one HTTP/1.1"]);
    });
}

#[test]
fn the_guests_address_is_never_dialled_on_the_strength_of_a_name() {
    world(|mut w| async move {
        start(&mut w).await;
        // The attacker's address, an allowed name: the real host is reached instead.
        let answer = w.https((ATTACKER, 443), "api.example", &get("api.example", "/", BEARER)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(w.log.seen()[0].server, SERVER);
        // The name is made to lead to the attacker, whose certificate is for another name.
        w.zone.set("api2.example", &[ATTACKER]);
        w.rules(Mode::Enforce, &["api2.example"], &[("token", VALUE, &["api2.example"])]);
        let answer = w.https((SERVER, 443), "api2.example", &get("api2.example", "/", BEARER)).await;
        assert!(answer.starts_with("HTTP/1.1 502"), "{answer}");
        let event = w.events(2).await.remove(1);
        assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Unverified });
        assert!(!w.log.attacker_got(VALUE));
        assert_eq!(w.log.seen().len(), 1);
    });
}

#[test]
fn warn_tolerates_without_the_value() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Warn, &[], &[("token", VALUE, &["*"])]);
        let stream = w.tls((SERVER, 443), "api.example", &[]).await.unwrap();
        assert!(!w.is_opened(&stream));
        let answer = support::talk(stream, &get("api.example", "/", BEARER)).await;
        assert!(answer.contains("Bearer IRONSH_PROXY_token"), "{answer}");
        let event = w.event().await;
        assert_eq!(event.verdict, Verdict::Tolerate { reason: Reason::NoRule });
    });
}

#[test]
fn secrets_and_rules_take_effect_on_the_next_request_of_a_live_connection() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    world(|mut w| async move {
        start(&mut w).await;
        let mut stream = w.tls((SERVER, 443), "api.example", &["http/1.1"]).await.unwrap();
        let request = format!("GET /length HTTP/1.1\r\nHost: api.example\r\n{BEARER}\r\n");
        let mut buffer = [0; 4096];
        for (value, generation) in [(VALUE, 1), ("second-value-0123", 2), ("third-value-012345", 3)] {
            if generation > 1 {
                w.rules(Mode::Enforce, &["api.example"], &[("token", value, &["api.example"])]);
            }
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = String::new();
            while !answer.ends_with("0\r\n\r\n") {
                let length = stream.read(&mut buffer).await.unwrap();
                assert!(length > 0, "{answer}");
                answer += std::str::from_utf8(&buffer[..length]).unwrap();
            }
            let seen = w.log.seen();
            assert_eq!(
                seen.last().unwrap().header("authorization"),
                Some(format!("Bearer {value}").as_str())
            );
        }
        // The last rule goes: the connection is cut, not served on.
        w.rules(Mode::Enforce, &[], &[("token", VALUE, &["api.example"])]);
        let _ = stream.write_all(request.as_bytes()).await;
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
        let rest = String::from_utf8_lossy(&rest);
        assert!(rest.is_empty() || rest.starts_with("HTTP/1.1 403"), "{rest}");
        assert_eq!(w.log.seen().len(), 3);
    });
}

#[test]
fn a_secret_for_another_host_is_left_and_said_so() {
    world(|mut w| async move {
        start(&mut w).await;
        let secrets: &[(&str, &str, &[&str])] =
            &[("token", VALUE, &["api.example"]), ("elsewhere", "another-value-1", &["other.example"])];
        w.rules(Mode::Enforce, &["api.example"], secrets);
        let header = "X-One: IRONSH_PROXY_elsewhere\r\nX-Two: IRONSH_PROXY_token, IRONSH_PROXY_token-x\r\n";
        let answer = w.https((SERVER, 443), "api.example", &get("api.example", "/", header)).await;
        assert!(answer.starts_with("HTTP/1.1 200"));
        let seen = w.log.seen().remove(0);
        assert_eq!(seen.header("x-one"), Some("IRONSH_PROXY_elsewhere"));
        assert_eq!(seen.header("x-two"), Some(format!("{VALUE}, IRONSH_PROXY_token-x").as_str()));
        let event = w.event().await;
        assert_eq!(
            (event.secrets, event.secrets_withheld),
            (vec!["token".to_owned()], vec!["elsewhere".to_owned()])
        );
    });
}

#[test]
fn two_secrets_for_one_host_both_go_in_and_cookies_come_back_clean() {
    world(|mut w| async move {
        start(&mut w).await;
        let secrets: &[(&str, &str, &[&str])] = &[
            ("token", VALUE, &["api.example"]),
            ("token-two", "value-of-two", &["*.example", "api.example"]),
            ("any", "value-of-any", &["*"]),
        ];
        w.rules(Mode::Enforce, &["api.example", "*.example", "*"], secrets);
        let header = "Cookie: a=IRONSH_PROXY_token; b=IRONSH_PROXY_token-two; c=IRONSH_PROXY_any; d=IRONSH_PROXY_token\r\n";
        let answer = w.https((SERVER, 443), "api.example", &get("api.example", "/", header)).await;
        let cookie = format!("a={VALUE}; b=value-of-two; c=value-of-any; d={VALUE}");
        assert_eq!(w.log.seen()[0].header("cookie"), Some(cookie.as_str()));
        assert!(
            answer.contains("b=IRONSH_PROXY_token-two; c=IRONSH_PROXY_any; d=IRONSH_PROXY_token\n"),
            "{answer}"
        );
        assert_eq!(w.event().await.secrets, ["any", "token", "token-two"]);
    });
}

#[test]
fn what_a_value_looks_like_in_json_urls_and_html_is_cleaned_too() {
    world(|mut w| async move {
        start(&mut w).await;
        let value = "p\"ss/w<rd&1";
        w.rules(Mode::Enforce, &["api.example"], &[("token", value, &["api.example"])]);
        let body = r#"p\"ss/w<rd&1 p\"ss\/w<rd&1 p%22ss%2Fw%3Crd%261 p%22ss%2fw%3crd%261 p&quot;ss/w&lt;rd&amp;1 p"ss/w<rd&1"#;
        let request = format!(
            "POST / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let answer = w.https((SERVER, 443), "api.example", &request).await;
        assert!(answer.ends_with(&["IRONSH_PROXY_token"; 6].join(" ")), "{answer}");
    });
}

#[test]
fn bodies_and_targets_are_not_substituted() {
    world(|mut w| async move {
        start(&mut w).await;
        let request = format!(
            "POST /IRONSH_PROXY_token?IRONSH_PROXY_token HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nContent-Length: 18\r\n{BEARER}\r\nIRONSH_PROXY_token"
        );
        let answer = w.https((SERVER, 443), "api.example", &request).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let seen = w.log.seen().remove(0);
        assert_eq!(seen.line, "POST /IRONSH_PROXY_token?IRONSH_PROXY_token HTTP/1.1");
        assert_eq!(seen.body, "IRONSH_PROXY_token");
        assert_eq!(w.event().await.bytes_out, 18);
    });
}

#[test]
fn a_guest_that_does_not_trust_its_ca_leaves_one_event() {
    world(|mut w| async move {
        start(&mut w).await;
        let stream = w.connect((SERVER, 443)).await;
        let mut roots = rustls::RootCertStore::empty();
        roots.add(w.ca.der.clone()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(support::provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let connector = tokio_rustls::TlsConnector::from(std::sync::Arc::new(config));
        assert!(connector.connect("api.example".try_into().unwrap(), stream).await.is_err());
        let event = w.event().await;
        assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Tls, Reason::Untrusted));
        assert!(w.log.seen().is_empty());
    });
}

#[test]
fn sessions_are_resumed_and_only_for_their_own_name() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Enforce, &["*"], &[("token", VALUE, &["*"])]);
        let connector = tokio_rustls::TlsConnector::from(w.client(&["http/1.1"]));
        let mut kinds = Vec::new();
        for (to, name) in [(SERVER, "api.example"), (SERVER, "api.example"), (OTHER, "other.example")] {
            let stream = w.connect((to, 443)).await;
            let mut stream = connector.connect(name.try_into().unwrap(), stream).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, get(name, "/", "").as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut answer).await;
            assert!(answer.starts_with(b"HTTP/1.1 200"));
            kinds.push(stream.get_ref().1.handshake_kind().unwrap());
        }
        use rustls::HandshakeKind::{Full, Resumed};
        assert_eq!(kinds, [Full, Resumed, Full]);
    });
}

/// A client that offers the tickets of one name to every other.
#[derive(Debug, Default)]
struct Mixed(std::sync::Mutex<Vec<Tls13ClientSessionValue>>);

impl ClientSessionStore for Mixed {
    fn set_kx_hint(&self, _: ServerName<'static>, _: NamedGroup) {}
    fn kx_hint(&self, _: &ServerName<'_>) -> Option<NamedGroup> {
        None
    }
    fn set_tls12_session(&self, _: ServerName<'static>, _: Tls12ClientSessionValue) {}
    fn tls12_session(&self, _: &ServerName<'_>) -> Option<Tls12ClientSessionValue> {
        None
    }
    fn remove_tls12_session(&self, _: &ServerName<'static>) {}
    fn insert_tls13_ticket(&self, _: ServerName<'static>, value: Tls13ClientSessionValue) {
        self.0.lock().unwrap().push(value);
    }
    fn take_tls13_ticket(&self, _: &ServerName<'static>) -> Option<Tls13ClientSessionValue> {
        self.0.lock().unwrap().pop()
    }
}

#[test]
fn a_ticket_is_good_for_its_own_name_and_vm_alone() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Enforce, &["*"], &[("token", VALUE, &["*"])]);
        let second = GuestNet::new(1, Ipv4Addr::new(10, 214, 0, 0), None);
        let policy = VmPolicy { vm: VmId::generate(), ..VmPolicy::clone(&w.policy) };
        w.table.insert(second, w.vm_ca.clone(), Arc::new(policy));
        let mut client = ClientConfig::clone(&w.client(&["http/1.1"]));
        let tickets = Arc::new(Mixed::default());
        client.resumption = Resumption::store(tickets.clone());
        let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
        let mut kinds = Vec::new();
        for (guest, to, name) in [
            (GUEST, SERVER, "api.example"),
            (GUEST, OTHER, "other.example"),
            (GUEST, OTHER, "other.example"),
            (second.v4, OTHER, "other.example"),
        ] {
            let stream = w.connect_as(guest, (to, 443)).await;
            let mut stream = connector.connect(name.try_into().unwrap(), stream).await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, get(name, "/", "").as_bytes()).await.unwrap();
            let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut Vec::new()).await;
            assert!(!tickets.0.lock().unwrap().is_empty());
            kinds.push(stream.get_ref().1.handshake_kind().unwrap());
        }
        use rustls::HandshakeKind::{Full, Resumed};
        assert_eq!(kinds, [Full, Full, Resumed, Full]);
    });
}

#[test]
fn certificates_stand_a_hard_look() {
    world(|mut w| async move {
        start(&mut w).await;
        let stream = w.tls((SERVER, 443), "api.example", &[]).await.unwrap();
        let chain = stream.get_ref().1.peer_certificates().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name).display().to_string();
        std::fs::write(path("leaf.der"), &chain[0]).unwrap();
        std::fs::write(path("ca.pem"), w.vm_ca.cert_pem()).unwrap();
        let openssl = |arguments: String| {
            let done = std::process::Command::new("sh")
                .args(["-c", &format!("openssl {arguments}")])
                .output()
                .unwrap();
            String::from_utf8(done.stdout).unwrap() + &String::from_utf8(done.stderr).unwrap()
        };
        openssl(format!("x509 -inform der -in {} -out {}", path("leaf.der"), path("leaf.pem")));
        let verified = openssl(format!(
            "verify -x509_strict -purpose sslserver -verify_hostname api.example -CAfile {} {}",
            path("ca.pem"),
            path("leaf.pem")
        ));
        assert!(verified.ends_with(": OK\n"), "{verified}");
        let text = openssl(format!("x509 -noout -text -in {}", path("leaf.pem")));
        for part in [
            "DNS:api.example",
            "TLS Web Server Authentication",
            "Digital Signature",
            "Authority Key Identifier",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("CA:TRUE"));
        // Past the end of its life of days it is worth nothing.
        let ends = openssl(format!("x509 -noout -checkend {} -in {}", 8 * 24 * 3600, path("leaf.pem")));
        assert!(ends.contains("will expire"), "{ends}");
    });
}

#[test]
fn a_secret_of_one_user_never_serves_anothers_vm() {
    use tapgate_model::{GuestNet, UserId, VmId, VmPolicy};
    world(|mut w| async move {
        start(&mut w).await;
        // The other user's secret has the same name and is for the same host.
        w.rules(Mode::Enforce, &["api.example"], &[("token", "value-of-the-other", &["api.example"])]);
        let net = GuestNet::new(1, [10, 214, 0, 0].into(), None);
        let (vm, user) = (VmId::generate(), UserId::generate());
        let other = VmPolicy { vm, user, ..VmPolicy::clone(&w.policy) };
        w.table.insert(net, w.vm_ca.clone(), std::sync::Arc::new(other));
        w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
        // By turns, so that connections of one rest while the other asks.
        for _ in 0..3 {
            for (guest, value) in [(w.net.v4, VALUE), (net.v4, "value-of-the-other")] {
                let stream = w.connect_as(guest, (SERVER, 443)).await;
                let tls = tokio_rustls::TlsConnector::from(w.client(&["http/1.1"]));
                let stream = tls.connect("api.example".try_into().unwrap(), stream).await.unwrap();
                let answer = support::talk(stream, &get("api.example", "/length", BEARER)).await;
                assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
                let seen = w.log.seen().pop().unwrap();
                assert_eq!(seen.header("authorization"), Some(format!("Bearer {value}").as_str()));
            }
        }
        let users: std::collections::HashSet<_> =
            w.events(6).await.into_iter().map(|event| event.user).collect();
        assert_eq!(users.len(), 2);
    });
}
