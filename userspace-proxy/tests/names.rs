//! Names and addresses: what is decided is what is dialled, whatever a guest writes.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::{net::Ipv4Addr, time::Duration};
use support::{ATTACKER, GUEST, OTHER, PRIVATE, SERVER, World, talk, world};
use tapgate_model::{Mode, Protocol, Reason, Verdict};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    time::{sleep, timeout},
};

const VALUE: &str = "ghp_realvalue0123456789";

fn get(host: &str, extra: &str) -> String {
    format!("GET /p?secret=query HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n{extra}\r\n")
}

async fn start(w: &mut World) {
    w.zone.set("a.example", &[SERVER]);
    w.zone.set("b.example", &[OTHER]);
    w.serve((SERVER, 80), None).await;
    w.serve((OTHER, 80), None).await;
    w.serve((ATTACKER, 80), None).await;
}

#[test]
fn no_rule_means_a_readable_refusal() {
    world(|mut w| async move {
        start(&mut w).await;
        let answer = w.http((SERVER, 80), &get("a.example", "")).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        let event = w.event().await;
        assert_eq!(
            (event.protocol, event.verdict.clone()),
            (Protocol::Http, Verdict::Deny { reason: Reason::NoRule })
        );
        assert_eq!((event.status, event.path.as_deref()), (Some(403), Some("/p")));
        let body: serde_json::Value = serde_json::from_str(answer.split("\r\n\r\n").nth(1).unwrap()).unwrap();
        assert_eq!(body["error"]["event_id"], event.id.unwrap().as_str());
        assert_eq!(body["error"]["host"], "a.example");
        assert!(
            w.log.seen().is_empty() && !w.zone.was_asked("a.example"),
            "nothing left, not even a question"
        );
        let answer = w.http((SERVER, 80), &get("a.example", "Accept: text/html\r\n")).await;
        assert!(answer.contains("<h1>Egress refused</h1>"));
    });
}

#[test]
fn tls_that_is_not_allowed_gets_an_alert() {
    world(|w| async move {
        let error = w.tls((SERVER, 443), "a.example", &[]).await.unwrap_err();
        let inner = error.get_ref().unwrap().downcast_ref::<rustls::Error>();
        assert_eq!(inner, Some(&rustls::Error::AlertReceived(rustls::AlertDescription::AccessDenied)));
        let event = w.event().await;
        assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Tls, Reason::NoRule));
        assert_eq!(event.host.unwrap().as_str(), "a.example");
        // An address in SNI's stead names no host.
        assert!(w.tls((SERVER, 443), "192.0.2.10", &[]).await.is_err());
        assert_eq!(w.event().await.verdict.reason(), Reason::NoName);
    });
}

#[test]
fn each_request_in_clear_text_goes_to_the_name_that_it_names() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Enforce, &["a.example", "b.example"], &[]);
        let one = "GET /1 HTTP/1.1\r\nHost: a.example\r\n\r\n";
        let two = "GET /2 HTTP/1.1\r\nHost: b.example\r\n\r\n";
        let three = "GET http://A.example/3 HTTP/1.1\r\nHost: a.example:80\r\n\r\n";
        let answer = w.http((ATTACKER, 80), &[one, two, three, &get("evil.example", "")].concat()).await;
        assert_eq!(answer.matches("HTTP/1.1 200").count(), 3, "{answer}");
        assert_eq!(answer.matches("HTTP/1.1 403").count(), 1, "{answer}");
        let seen: Vec<_> = w.log.seen().into_iter().map(|seen| (seen.server, seen.line)).collect();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[0], (SERVER, "GET /1 HTTP/1.1".to_owned()));
        assert_eq!(seen[1], (OTHER, "GET /2 HTTP/1.1".to_owned()));
        assert_eq!(seen[2], (SERVER, "GET /3 HTTP/1.1".to_owned()));
        assert_eq!(w.events(4).await.len(), 4);
    });
}

#[test]
fn heads_that_could_mean_two_things_never_leave() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Enforce, &["*"], &[("token", VALUE, &["*"])]);
        for (request, status) in [
            ("GET / HTTP/1.1\r\nHost: a.example\r\nHost: b.example\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\n\r\n", 400),
            ("GET http://b.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", 421),
            ("GET / HTTP/1.1\r\nHost: user@a.example\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a.example:8080\r\n\r\n", 421),
            ("GET / HTTP/1.1\r\nHost: a.example\0\r\n\r\n", 400),
            ("GET / HTTP/1.1\r\nHost: a.example,b.example\r\n\r\n", 400),
            ("GET / HTTP/1.1\nHost: a.example\n\n", 400),
            (
                "POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a.example\r\n\r\n",
                400,
            ),
            ("POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding:\x0bchunked\r\n\r\n0\r\n\r\n", 400),
            ("POST / HTTP/1.1\r\nHost: a.example\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab", 400),
            ("GET / HTTP/1.1\r\nHost: a.example\r\nX: a\r\n b\r\n\r\n", 400),
            ("CONNECT b.example:443 HTTP/1.1\r\nHost: b.example:443\r\n\r\n", 403),
            ("GET / HTTP/1.1\r\nHost: a.example\r\nConnection: upgrade\r\nUpgrade: tcp\r\n\r\n", 403),
            ("GET https://a.example/ HTTP/1.1\r\nHost: a.example\r\n\r\n", 400),
        ] {
            let answer = w.http((SERVER, 80), request).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 {status}")), "{request:?}: {answer}");
            let event = w.event().await;
            assert!(!event.verdict.passes(), "{request:?}");
        }
        assert!(w.log.seen().is_empty());
    });
}

#[test]
fn names_never_lead_to_private_host_or_guest_addresses() {
    world(|mut w| async move {
        start(&mut w).await;
        w.serve((PRIVATE, 80), None).await;
        w.serve((GUEST, 80), None).await;
        w.serve((Ipv4Addr::LOCALHOST, 80), None).await;
        w.rules(Mode::Enforce, &["*"], &[]);
        w.table.set_host_addresses(&[OTHER.into()]);
        for address in [
            PRIVATE,
            GUEST,
            OTHER,
            Ipv4Addr::LOCALHOST,
            Ipv4Addr::UNSPECIFIED,
            Ipv4Addr::new(169, 254, 169, 254),
        ] {
            w.zone.set(&format!("x{}.example", u32::from(address)), &[address]);
            let answer = w.http((SERVER, 80), &get(&format!("x{}.example", u32::from(address)), "")).await;
            assert!(answer.starts_with("HTTP/1.1 403"), "{address}: {answer}");
            assert_eq!(w.event().await.verdict.reason(), Reason::Rebinding, "{address}");
        }
        for (n, address) in [
            "0.1.2.3",
            "100.64.0.1",
            "100.100.100.200",
            "169.254.170.2",
            "169.254.77.1",
            "192.0.0.192",
            "192.88.99.1",
            "168.63.129.16",
            "198.18.0.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "10.214.9.9",
            "::",
            "::1",
            "::ffff:127.0.0.1",
            "::ffff:192.0.2.10",
            "::192.0.2.10",
            "64:ff9b::7f00:1",
            "64:ff9b:1::1",
            "2002:7f00:1::",
            "2001::1",
            "fe80::1",
            "fec0::1",
            "fd00:ec2::254",
            "fd12::1",
            "ff02::1",
            "100::1",
        ]
        .into_iter()
        .enumerate()
        {
            let name = format!("n{n}.example");
            w.zone.records.lock().unwrap().insert(name.clone(), vec![vec![address.parse().unwrap()]]);
            let answer = w.http((SERVER, 80), &get(&name, "")).await;
            assert!(answer.starts_with("HTTP/1.1 403"), "{address}: {answer}");
            assert_eq!(w.event().await.verdict.reason(), Reason::Rebinding, "{address}");
        }
        // Rebinding: public when asked first, private when dialled; the second answer is the one that is judged.
        w.zone.turns("turns.example", &[SERVER, Ipv4Addr::LOCALHOST]);
        let first = w.http((SERVER, 80), &get("turns.example", "")).await;
        let second = w.http((SERVER, 8080), &get("turns.example", "")).await;
        assert!(first.starts_with("HTTP/1.1 200") && second.starts_with("HTTP/1.1 403"), "{first} {second}");
        assert!(w.log.seen().iter().all(|seen| seen.server == SERVER));
        // Only a cidr rule opens a private range, to a name as to an address.
        w.rules(Mode::Enforce, &["*", "10.9.0.0/16"], &[]);
        let answer = w.http((SERVER, 80), &get(&format!("x{}.example", u32::from(PRIVATE)), "")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    });
}

#[test]
fn secrets_in_clear_text_go_only_to_hosts_that_they_name() {
    world(|mut w| async move {
        start(&mut w).await;
        let header = "X-Key: IRONSH_PROXY_token\r\n";
        w.rules(Mode::Enforce, &["*"], &[("token", VALUE, &["*"])]);
        w.http((SERVER, 80), &get("a.example", header)).await;
        assert_eq!(w.event().await.secrets_withheld, ["token"]);
        w.rules(Mode::Enforce, &["a.example"], &[("token", VALUE, &["a.example"])]);
        let answer = w.http((ATTACKER, 80), &get("a.example", header)).await;
        assert!(answer.contains("x-key: IRONSH_PROXY_token") && !answer.contains(VALUE), "{answer}");
        assert_eq!(w.event().await.secrets, ["token"]);
        let keys: Vec<_> = w.log.seen().iter().map(|seen| seen.header("x-key").unwrap().to_owned()).collect();
        assert_eq!(keys, ["IRONSH_PROXY_token", VALUE]);
        assert!(!w.log.attacker_got("IRONSH"));
        // A cidr rule lets the guest choose the address, and so lets no secret follow the name that it writes there.
        w.rules(Mode::Enforce, &["198.51.100.0/24"], &[("token", VALUE, &["a.example"])]);
        let answer = w.http((ATTACKER, 80), &get("a.example", header)).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(w.event().await.secrets_withheld, ["token"]);
        assert!(w.log.attacker_got("IRONSH_PROXY_token") && !w.log.attacker_got(VALUE));
    });
}

#[test]
fn warn_passes_and_says_denied_but_never_to_ranges_that_are_closed() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Warn, &[], &[("token", VALUE, &["a.example"])]);
        let answer = w.http((SERVER, 80), &get("a.example", "X: IRONSH_PROXY_token\r\n")).await;
        assert!(answer.starts_with("HTTP/1.1 200") && answer.contains("IRONSH_PROXY_token"), "{answer}");
        assert_eq!(w.event().await.verdict, Verdict::Tolerate { reason: Reason::NoRule });
        // An address for a name goes to the address that the guest chose.
        let answer = w.http((SERVER, 80), &get("192.0.2.10", "")).await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert_eq!(w.event().await.verdict, Verdict::Tolerate { reason: Reason::AddressLiteral });
        let answer = w.http((PRIVATE, 80), &get("10.9.8.7", "")).await;
        assert!(answer.starts_with("HTTP/1.1 403"), "{answer}");
        assert_eq!(w.event().await.verdict.reason(), Reason::Private);
    });
}

#[test]
fn a_spliced_connection_is_cut_when_its_rule_goes() {
    world(|mut w| async move {
        w.zone.set("a.example", &[SERVER]);
        w.serve((SERVER, 443), Some(w.ca.server(&["a.example"], &[]))).await;
        w.rules(Mode::Enforce, &["a.example"], &[]);
        let mut stream = w.tls((SERVER, 443), "a.example", &[]).await.unwrap();
        w.rules(Mode::Enforce, &["b.example"], &[]);
        assert!(
            matches!(stream.read_u8().await, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
        );
        let event = w.event().await;
        assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Revoked });
        assert!(event.bytes_out > 0);
        // And when a secret is added that would not be put in.
        w.rules(Mode::Enforce, &["a.example"], &[]);
        let mut stream = w.tls((SERVER, 443), "a.example", &[]).await.unwrap();
        w.rules(Mode::Enforce, &["a.example"], &[("token", VALUE, &["a.example"])]);
        assert!(stream.read_u8().await.is_err());
        // A VM that is removed keeps nothing.
        w.rules(Mode::Enforce, &["a.example"], &[]);
        let mut stream = w.tls((SERVER, 443), "a.example", &[]).await.unwrap();
        w.table.remove(&w.policy.vm);
        assert!(stream.read_u8().await.is_err());
        assert!(w.connect((SERVER, 443)).await.read_u8().await.is_err());
    });
}

#[test]
fn what_a_range_let_past_unopened_is_cut_when_a_secret_comes_to_be_for_its_name() {
    world(|mut w| async move {
        let secret: &[(&str, &str, &[&str])] = &[("token", VALUE, &["a.example"])];
        w.zone.set("a.example", &[SERVER]);
        w.serve((SERVER, 443), Some(w.ca.server(&["a.example", "b.example"], &[]))).await;
        w.rules(Mode::Enforce, &["192.0.2.0/24"], &[]);
        let mut stream = w.tls((SERVER, 443), "a.example", &[]).await.unwrap();
        let other = w.tls((SERVER, 443), "b.example", &[]).await.unwrap();
        assert!(!w.is_opened(&stream));
        w.rules(Mode::Enforce, &["192.0.2.0/24"], secret);
        ended(&mut stream).await;
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Revoked });
        assert!(w.is_opened(&w.tls((SERVER, 443), "a.example", &[]).await.unwrap()));
        // The name alone, which leads elsewhere, is no reason.
        w.zone.set("a.example", &[OTHER]);
        let stream = w.tls((SERVER, 443), "a.example", &[]).await.unwrap();
        assert!(!w.is_opened(&stream));
        w.rules(Mode::Enforce, &["192.0.2.0/24", "c.example"], secret);
        let request = "GET / HTTP/1.1\r\nHost: b.example\r\nConnection: close\r\n\r\n";
        for stream in [stream, other] {
            let answer = talk(stream, request).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        }
    });
}

/// Waits for the end of a connection that nobody ends but the proxy.
async fn ended<S: AsyncRead + Unpin>(stream: &mut S) {
    let all = timeout(Duration::from_secs(10), stream.read_to_end(&mut Vec::new())).await;
    let _ = all.expect("the connection ends");
}

/// A name that only a range rule lets lead where it leads.
async fn start_private(w: &mut World) {
    w.zone.set("db.example", &[PRIVATE]);
    w.serve((PRIVATE, 443), Some(w.ca.server(&["db.example"], &[]))).await;
    w.serve((PRIVATE, 80), None).await;
    w.rules(Mode::Enforce, &["db.example", "10.9.0.0/16"], &[]);
}

#[test]
fn a_connection_by_name_is_cut_when_the_rule_for_its_address_goes() {
    world(|mut w| async move {
        start_private(&mut w).await;
        let revoked = Verdict::Deny { reason: Reason::Revoked };
        let mut spliced = w.tls((SERVER, 443), "db.example", &[]).await.unwrap();
        w.rules(Mode::Enforce, &["db.example"], &[]);
        ended(&mut spliced).await;
        assert_eq!(w.event().await.verdict, revoked);
        // A WebSocket.
        w.rules(Mode::Enforce, &["db.example", "10.9.0.0/16"], &[]);
        let mut stream = w.connect((SERVER, 80)).await;
        let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n";
        let request = format!("GET /ws HTTP/1.1\r\nHost: db.example\r\n{upgrade}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut start = [0; 12];
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 101");
        w.rules(Mode::Enforce, &["db.example"], &[]);
        ended(&mut stream).await;
        assert_eq!(w.event().await.verdict, revoked);
        // An answer without end.
        let listener = tokio::net::TcpListener::bind((PRIVATE, 8080)).await.unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\nbegin").await.unwrap();
            let _ = stream.read_to_end(&mut Vec::new()).await;
        });
        w.rules(Mode::Enforce, &["db.example", "10.9.0.0/16"], &[]);
        let mut stream = w.connect((SERVER, 8080)).await;
        stream.write_all(b"GET / HTTP/1.1\r\nHost: db.example:8080\r\n\r\n").await.unwrap();
        stream.read_exact(&mut start).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 200");
        w.rules(Mode::Enforce, &["db.example"], &[]);
        ended(&mut stream).await;
        assert_eq!(w.event().await.verdict, revoked);
    });
}

#[test]
fn a_name_leads_where_the_rules_of_the_moment_let_it() {
    world(|mut w| async move {
        start_private(&mut w).await;
        // The rule goes before the guest says what it wants.
        let stream = w.connect((SERVER, 443)).await;
        sleep(Duration::from_millis(50)).await;
        w.rules(Mode::Enforce, &["db.example"], &[]);
        let connector = tokio_rustls::TlsConnector::from(w.client(&[]));
        assert!(connector.connect("db.example".try_into().unwrap(), stream).await.is_err());
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Rebinding });
        // What becomes the host's own, or a guest's, is left.
        w.zone.set("a.example", &[SERVER]);
        w.serve((SERVER, 443), Some(w.ca.server(&["a.example"], &[]))).await;
        w.rules(Mode::Enforce, &["a.example"], &[]);
        for own in [true, false] {
            let mut stream = w.tls((OTHER, 443), "a.example", &[]).await.unwrap();
            match own {
                true => w.table.set_host_addresses(&[SERVER.into()]),
                false => w.table.set_guest_range(&["192.0.2.0/24".parse().unwrap()]),
            }
            ended(&mut stream).await;
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Revoked });
            w.table.set_host_addresses(&[]);
        }
    });
}

#[test]
fn what_names_no_host_is_decided_by_its_address() {
    world(|mut w| async move {
        let listener = tokio::net::TcpListener::bind((SERVER, 2222)).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                stream.write_all(b"SSH-2.0-test\r\n").await.unwrap();
                let mut line = [0; 4];
                let _ = stream.read_exact(&mut line).await;
                stream.write_all(&line).await.unwrap();
            }
        });
        // Silent, or unlike anything: refused at once.
        for bytes in ["", "SSH-2.0-client\r\n", "\x05\x01\0"] {
            let answer = w.http((SERVER, 2222), bytes).await;
            assert_eq!(answer, "", "{bytes:?}");
            let event = w.event().await;
            assert_eq!(
                (event.protocol, event.verdict),
                (Protocol::Tcp, Verdict::Deny { reason: Reason::NoName })
            );
            assert_eq!((event.address, event.port), (Some(SERVER.into()), Some(2222)));
        }
        w.rules(Mode::Enforce, &["192.0.2.0/24"], &[]);
        let mut stream = w.connect((SERVER, 2222)).await;
        let mut banner = [0; 14];
        stream.read_exact(&mut banner).await.unwrap();
        assert_eq!(&banner, b"SSH-2.0-test\r\n");
        assert_eq!(talk(stream, "ping").await, "ping");
        let event = w.event().await;
        assert_eq!((event.verdict.reason(), event.bytes_out, event.bytes_in), (Reason::Cidr, 4, 18));
    });
}
