//! Real delivery: a guest in a namespace of its own, packets handed to the transparent listeners by nftables' tproxy, DNS
//! over UDP and TCP to whatever address the guest asks.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use hickory_proto::{
    op::{Edns, Message, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    sync::Arc,
    time::Duration,
};
use support::{
    ATTACKER, OTHER, PRIVATE, RESOLVER, SERVER,
    guest::{Guest, serve},
    world_of,
};
use tapgate_model::{GuestNet, Mode, Protocol, Reason, Verdict};

/// Questions of a guest.
trait Ask {
    async fn ask(&self, server: Ipv4Addr, message: Vec<u8>) -> (SocketAddr, Message);
    async fn query(&self, name: &str, kind: RecordType) -> Message;
}

impl Ask for Guest {
    async fn ask(&self, server: Ipv4Addr, message: Vec<u8>) -> (SocketAddr, Message) {
        self.run(move || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            socket.send_to(&message, (server, 53)).unwrap();
            let mut buffer = [0; 4096];
            let (length, from) = socket.recv_from(&mut buffer).unwrap();
            (from, Message::from_vec(&buffer[..length]).unwrap())
        })
        .await
    }

    async fn query(&self, name: &str, kind: RecordType) -> Message {
        self.ask(RESOLVER, question(name, kind)).await.1
    }
}

fn question(name: &str, kind: RecordType) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), kind));
    message.set_edns(Edns::new());
    message.to_vec().unwrap()
}

fn addresses(message: &Message) -> Vec<IpAddr> {
    let of = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::V4(a.0)),
        _ => None,
    };
    message.answers.iter().filter_map(|record| of(&record.data)).collect()
}

/// The text of the extended error.
fn extended(message: &Message) -> (u16, String) {
    use hickory_proto::rr::rdata::opt::{EdnsCode, EdnsOption};
    let Some(EdnsOption::Unknown(_, bytes)) = message.edns.as_ref().unwrap().option(EdnsCode::Unknown(15))
    else {
        panic!("no extended error: {message:?}")
    };
    (u16::from_be_bytes([bytes[0], bytes[1]]), String::from_utf8(bytes[2..].to_vec()).unwrap())
}

const HERE: &[Ipv4Addr] = &[SERVER, OTHER, ATTACKER, RESOLVER, PRIVATE];

/// A field of the status of every thread with this name.
fn of_threads(name: &str, field: &str) -> Vec<String> {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let texts = tasks.filter_map(|task| std::fs::read_to_string(task.unwrap().path().join("status")).ok());
    let of = |text: &str, field: &str| {
        text.lines().find_map(|line| line.strip_prefix(field)).unwrap_or_default().trim().to_owned()
    };
    texts.filter(|text| of(text, "Name:") == name).map(|text| of(&text, field)).collect()
}

#[test]
fn threads_that_meet_a_guests_octets_have_no_rights() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("c");
        serve(&w);
        w.zone.set("a.example", &[SERVER]);
        w.serve((SERVER, 80), None).await;
        w.rules(Mode::Enforce, &["a.example"], &[]);
        // It works, so the threads are there.
        let address = guest.query("a.example.", RecordType::A).await;
        assert_eq!(addresses(&address), [IpAddr::V4(SERVER)]);
        let workers = of_threads("proxy", "Seccomp:");
        assert!(workers.len() > 1 && workers.iter().all(|mode| mode == "2"), "{workers:?}");
        assert!(of_threads("proxy", "NoNewPrivs:").iter().all(|set| set == "1"));
        // CAP_SYS_RESOURCE, or nothing: pipes beyond an unprivileged user's share.
        for field in ["CapEff:", "CapPrm:"] {
            let rights = of_threads("proxy", field);
            let few = |text: &String| u64::from_str_radix(text, 16).unwrap() & !(1 << 24) == 0;
            assert!(!rights.is_empty() && rights.iter().all(few), "{rights:?}");
        }
        for field in ["CapInh:", "CapAmb:"] {
            assert!(
                of_threads("proxy", field).iter().all(|text| u64::from_str_radix(text, 16).unwrap() == 0)
            );
        }
    });
}

#[test]
fn a_guests_connection_is_delivered_and_answered() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("t");
        serve(&w);
        w.zone.set("a.example", &[SERVER]);
        w.serve((SERVER, 80), None).await;
        w.rules(Mode::Enforce, &["a.example"], &[]);
        // The address is nobody's; the name leads.
        let answer = guest
            .run(|| {
                let mut stream = TcpStream::connect("203.0.113.200:80").unwrap();
                stream.write_all(b"GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n").unwrap();
                let mut answer = String::new();
                stream.read_to_string(&mut answer).unwrap();
                answer
            })
            .await;
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        let event = w.event().await;
        assert_eq!(
            (event.verdict.reason(), event.address, event.port),
            (Reason::Host, Some(SERVER.into()), Some(80))
        );
    });
}

#[test]
fn dns_answers_allowed_names_from_the_address_that_was_asked() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("d");
        serve(&w);
        w.zone.set("a.example", &[SERVER, PRIVATE, Ipv4Addr::LOCALHOST]);
        w.zone.set("inner.example", &[PRIVATE]);
        w.zone.set("big.example", &[SERVER]);
        w.rules(Mode::Enforce, &["a.example", "inner.example", "big.example", "*.tunnel.example"], &[]);
        for server in [Ipv4Addr::new(169, 254, 77, 1), Ipv4Addr::new(198, 51, 100, 8)] {
            let (from, answer) = guest.ask(server, question("A.Example.", RecordType::A)).await;
            assert_eq!(from, SocketAddr::from((server, 53)));
            assert_eq!(answer.metadata.response_code, ResponseCode::NoError);
            assert_eq!(answer.queries[0].name().to_ascii(), "A.Example.");
            assert_eq!(
                addresses(&answer),
                [IpAddr::from(SERVER)],
                "denied and private addresses are left out"
            );
        }
        // Only to closed ranges: nothing, and said so.
        let answer = guest.query("inner.example.", RecordType::A).await;
        assert!(addresses(&answer).is_empty());
        assert_eq!(extended(&answer).0, 17);
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Rebinding });
        // Service bindings and IPv6 that the VM has not: no data, no question.
        for kind in [RecordType::HTTPS, RecordType::SVCB, RecordType::AAAA] {
            let answer = guest.query("a.example.", kind).await;
            assert_eq!((answer.metadata.response_code, answer.answers.len()), (ResponseCode::NoError, 0));
        }
        // What does not fit is cut, and comes whole over TCP.
        let mut plain = Message::from_vec(&question("big.example.", RecordType::TXT)).unwrap();
        plain.edns = None;
        let answer = guest.ask(RESOLVER, plain.to_vec().unwrap()).await.1;
        assert!(answer.metadata.truncation && answer.answers.is_empty());
        let whole = guest
            .run(|| {
                let mut stream = TcpStream::connect("198.51.100.9:53").unwrap();
                let message = question("big.example.", RecordType::TXT);
                // One octet at a time.
                for byte in
                    [&u16::try_from(message.len()).unwrap().to_be_bytes(), message.as_slice()].concat()
                {
                    stream.write_all(&[byte]).unwrap();
                }
                let mut length = [0; 2];
                stream.read_exact(&mut length).unwrap();
                let mut reply = vec![0; usize::from(u16::from_be_bytes(length))];
                stream.read_exact(&mut reply).unwrap();
                Message::from_vec(&reply).unwrap()
            })
            .await;
        assert_eq!(whole.answers.len(), 1);
        let answer = guest.query("nx.tunnel.example.", RecordType::A).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
    });
}

#[test]
fn dns_carries_nothing_out() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("n");
        serve(&w);
        w.zone.set("a.example", &[SERVER]);
        w.rules(Mode::Enforce, &["a.example"], &[]);
        for (name, kind, reason) in [
            ("c3RvbGVu.evil.example.", RecordType::A, Reason::NoRule),
            ("c3RvbGVu.evil.example.", RecordType::TXT, Reason::NoRule),
            ("sub.a.example.", RecordType::A, Reason::NoRule),
            ("a.example.", RecordType::ANY, Reason::DnsQuestion),
            ("a.example.", RecordType::NULL, Reason::DnsQuestion),
            ("a.example.", RecordType::AXFR, Reason::DnsQuestion),
            (".", RecordType::NS, Reason::BadName),
            ("1.2.0.192.in-addr.arpa.", RecordType::PTR, Reason::NoRule),
        ] {
            let answer = guest.query(name, kind).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::Refused, "{name} {kind}");
            let event = w.event().await;
            assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Dns, reason), "{name} {kind}");
            assert!(extended(&answer).1.contains(event.id.unwrap().as_str()));
        }
        // Two questions in one message; rubbish; answers.
        let mut two = Message::query();
        two.add_query(Query::query(Name::from_ascii("a.example.").unwrap(), RecordType::A));
        two.add_query(Query::query(Name::from_ascii("evil.example.").unwrap(), RecordType::A));
        let answer = guest.ask(RESOLVER, two.to_vec().unwrap()).await.1;
        assert_eq!(answer.metadata.response_code, ResponseCode::FormErr);
        w.event().await;
        let answer =
            guest.ask(RESOLVER, [&[7, 7, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0][..], &[0xc0; 40]].concat()).await.1;
        assert_eq!((answer.metadata.id, answer.metadata.response_code), (0x0707, ResponseCode::FormErr));
        w.event().await;
        assert!(w.zone.asked.lock().unwrap().is_empty(), "{:?}", w.zone.asked);
        // In warn it is looked up, and recorded.
        w.rules(Mode::Warn, &[], &[]);
        let answer = guest.query("a.example.", RecordType::A).await;
        assert_eq!(addresses(&answer), [IpAddr::from(SERVER)]);
        assert_eq!(w.event().await.verdict, Verdict::Tolerate { reason: Reason::NoRule });
    });
}

#[test]
fn an_address_given_by_dns_stands_for_its_name_where_none_is_written() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("p");
        serve(&w);
        let listener = tokio::net::TcpListener::bind((SERVER, 5432)).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                tokio::io::AsyncWriteExt::write_all(&mut stream, b"hello").await.unwrap();
            }
        });
        w.zone.set("db.example", &[SERVER]);
        w.zone.set("other.example", &[OTHER]);
        w.rules(Mode::Enforce, &["db.example"], &[]);
        let connect = || {
            let mut stream = TcpStream::connect((SERVER, 5432)).unwrap();
            let mut all = Vec::new();
            let _ = stream.read_to_end(&mut all);
            all
        };
        assert_eq!(guest.run(connect).await, b"", "not given yet");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::NoName });
        guest.query("db.example.", RecordType::A).await;
        assert_eq!(guest.run(connect).await, b"hello");
        let event = w.event().await;
        assert_eq!((event.verdict.reason(), event.host.unwrap().as_str()), (Reason::Pin, "db.example"));
        // The rule goes, the pin is worth nothing.
        w.rules(Mode::Enforce, &["other.example"], &[]);
        assert_eq!(guest.run(connect).await, b"");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::NoName });
    });
}

#[test]
fn tls_that_names_no_host_does_not_pass_by_dns_to_one_that_a_secret_is_for() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("n");
        serve(&w);
        w.serve((SERVER, 8443), Some(w.ca.server(&["db.example"], &[]))).await;
        w.zone.set("db.example", &[SERVER]);
        w.zone.set("cdn.example", &[SERVER]);
        let mut client = rustls::ClientConfig::clone(&w.client(&[]));
        client.enable_sni = false;
        let client = Arc::new(client);
        let connect = move || {
            let tls =
                rustls::ClientConnection::new(client.clone(), "db.example".try_into().unwrap()).unwrap();
            let stream = TcpStream::connect((SERVER, 8443)).unwrap();
            stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            let mut stream = rustls::StreamOwned::new(tls, stream);
            let sent = stream.write_all(b"GET / HTTP/1.1\r\nHost: db.example\r\n\r\n");
            sent.map(|()| stream)
        };
        let secret: &[(&str, &str, &[&str])] = &[("token", "ghp_realvalue0123456789", &["db.example"])];
        let names = ["db.example", "cdn.example"];
        w.rules(Mode::Enforce, &names, &[]);
        for name in names {
            guest.query(&format!("{name}."), RecordType::A).await;
        }
        let mut open = guest.run(connect.clone()).await.unwrap();
        // One that is there already is cut; the name that it goes by is the last that the address was given for.
        let cdn: &[(&str, &str, &[&str])] = &[("token", "ghp_realvalue0123456789", &["cdn.example"])];
        w.rules(Mode::Enforce, &names, cdn);
        let _ = guest.run(move || open.read_to_end(&mut Vec::new())).await;
        let event = w.event().await;
        assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Revoked });
        assert_eq!(event.host.unwrap().as_str(), "cdn.example");
        // A name among those of the address is enough.
        w.rules(Mode::Enforce, &names, secret);
        let error = guest.run(connect.clone()).await.unwrap_err();
        assert!(error.to_string().contains("AccessDenied"), "{error}");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::NoName });
        // A range says that the address itself is allowed.
        w.rules(Mode::Enforce, &["192.0.2.0/24"], secret);
        drop(guest.run(connect).await.unwrap());
        assert_eq!(w.event().await.verdict.reason(), Reason::Cidr);
    });
}

#[test]
fn what_a_guest_says_after_a_silence_is_judged_as_if_said_at_once() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("w");
        serve(&w);
        let listener = tokio::net::TcpListener::bind((SERVER, 5432)).await.unwrap();
        let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut all = Vec::new();
                let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut all).await;
                heard.send(all).unwrap();
            }
        });
        w.zone.set("db.example", &[SERVER]);
        w.rules(Mode::Enforce, &["db.example"], &[]);
        guest.query("db.example.", RecordType::A).await;
        let say = |bytes: Vec<u8>| {
            move || {
                let mut stream = TcpStream::connect((SERVER, 5432)).unwrap();
                std::thread::sleep(Duration::from_millis(400));
                stream.write_all(&bytes).unwrap();
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all);
                all
            }
        };
        // Neither TLS nor HTTP: it passes as the name that the address was given for.
        guest.run(say(b"\0\0\0\x08\x04\xd2\x16\x2f".to_vec())).await;
        assert_eq!(hears.recv().await.unwrap(), b"\0\0\0\x08\x04\xd2\x16\x2f");
        let event = w.event().await;
        assert_eq!((event.verdict.reason(), event.bytes_out), (Reason::Pin, 8));
        // Another name at the same address, as on a shared one.
        let request = b"GET / HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n";
        let answer = guest.run(say(request.to_vec())).await;
        assert!(answer.starts_with(b"HTTP/1.1 403"), "{}", String::from_utf8_lossy(&answer));
        assert_eq!(hears.recv().await.unwrap(), b"", "nothing of it was passed");
        assert_eq!(w.event().await.host.unwrap().as_str(), "evil.example");
        let mut hello =
            rustls::ClientConnection::new(w.client(&[]), "evil.example".try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        hello.write_tls(&mut bytes).unwrap();
        let answer = guest.run(say(bytes)).await;
        assert_eq!(answer.first(), Some(&21), "an alert: {answer:?}");
        assert_eq!(hears.recv().await.unwrap(), b"");
        let event = w.event().await;
        assert_eq!((event.protocol, event.host.unwrap().as_str()), (Protocol::Tls, "evil.example"));
    });
}

/// Requests as lenient servers take them: after empty lines, with other whitespace, without a version, in lower case, behind
/// a header of the PROXY protocol.
const LENIENT: &[&[u8]] = &[
    b"\r\nGET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"\n \t\x0bGET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1 \r\nHost: evil.example\r\n\r\n",
    b"GET\t/\tHTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / http/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/2.0\r\nHost: evil.example\r\n\r\n",
    b"GET / HTTP/1.1\rHost: evil.example\r\r\n",
    b"get http://evil.example/ HTTP/1.1 x\r\n\r\n",
    b"get / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"A-METHOD-OF-MORE-THAN-THIRTY-TWO-LETTERS / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET http://evil.example/\r\n\r\n",
    b"GET /\r\n\r\n",
    b"POST * RTSP/1.0\r\nHost: evil.example\r\n\r\n",
    b"PRI * HTTP/2.0\r\nHost: evil.example\r\n\r\n",
    b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\nGET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"\r\n\r\n",
    b"GET / HT",
];

/// What other protocols begin with.
const OTHERS: &[&[u8]] = &[
    b"SSH-2.0-OpenSSH_9.2p1 Debian-2+deb12u3\r\n",
    b"EHLO a.example\r\n",
    b"PING\r\n",
    b"*1\r\n$4\r\nPING\r\n",
    b"NICK someone\r\nUSER someone 0 * :Some One\r\n",
    b"CONNECT {\"verbose\":false}\r\n",
    b"0033git-upload-pack /project.git\0host=a.example\0",
    b"\0\0\0\x08\x04\xd2\x16\x2f",
    b"{\"id\":1}",
];

#[test]
fn no_request_passes_as_another_protocol_to_an_address_that_names_share() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("y");
        serve(&w);
        let listener = tokio::net::TcpListener::bind((SERVER, 8080)).await.unwrap();
        let (heard, mut hears) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let mut all = Vec::new();
                let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut all).await;
                heard.send(all).unwrap();
            }
        });
        w.zone.set("db.example", &[SERVER]);
        w.rules(Mode::Enforce, &["db.example"], &[]);
        guest.query("db.example.", RecordType::A).await;
        let say = |bytes: &'static [u8]| {
            move || {
                let mut stream = TcpStream::connect((SERVER, 8080)).unwrap();
                // In two pieces, as a network may split it.
                let (first, second) = bytes.split_at(1);
                stream.write_all(first).unwrap();
                std::thread::sleep(Duration::from_millis(5));
                let _ = stream.write_all(second);
                let _ = stream.shutdown(std::net::Shutdown::Write);
                let mut all = Vec::new();
                let _ = stream.read_to_end(&mut all);
                String::from_utf8_lossy(&all).into_owned()
            }
        };
        for bytes in LENIENT {
            let text = String::from_utf8_lossy(bytes);
            let answer = guest.run(say(bytes)).await;
            assert!(answer.starts_with("HTTP/1.1 40"), "{text:?}: {answer}");
            let verdict = w.event().await.verdict;
            assert!(matches!(verdict, Verdict::Deny { .. }), "{text:?}: {verdict:?}");
            assert!(hears.try_recv().is_err(), "{text:?}");
        }
        for bytes in OTHERS {
            guest.run(say(bytes)).await;
            assert_eq!(hears.recv().await.unwrap(), *bytes);
            assert_eq!(w.event().await.verdict.reason(), Reason::Pin, "{}", String::from_utf8_lossy(bytes));
        }
    });
}

#[test]
fn ipv6_is_delivered_decided_and_answered_like_ipv4() {
    world_of(HERE, |mut w| async move {
        let net = GuestNet::new(0, Ipv4Addr::new(10, 214, 0, 0), Some("2001:db8:74::".parse().unwrap()));
        let guest = Guest::new("s").with_v6(net.v6.unwrap());
        w.table.insert(net, w.vm_ca.clone(), w.policy.clone());
        w.table.set_guest_range(&["10.214.0.0/16".parse().unwrap(), "2001:db8:74::/64".parse().unwrap()]);
        support::sh("ip addr add 2001:db8:1::10/128 dev lo nodad");
        serve(&w);
        let server: IpAddr = "2001:db8:1::10".parse().unwrap();
        let (inner, other): (IpAddr, IpAddr) =
            ("fd12::1".parse().unwrap(), "2001:db8:74::9".parse().unwrap());
        w.zone.records.lock().unwrap().insert("six.example".into(), vec![vec![server, inner, other]]);
        w.rules(Mode::Enforce, &["six.example"], &[]);
        let listener = tokio::net::TcpListener::bind((server, 80)).await.unwrap();
        tokio::spawn(async move {
            loop {
                let (mut stream, _) = listener.accept().await.unwrap();
                let answer = b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nConnection: close\r\n\r\nsix";
                // An answer that comes before the question is none.
                let _ = tokio::io::AsyncReadExt::read(&mut stream, &mut [0; 512]).await;
                tokio::io::AsyncWriteExt::write_all(&mut stream, answer).await.unwrap();
            }
        });
        let (from, answer) = guest
            .run(|| {
                let socket = UdpSocket::bind("[::]:0").unwrap();
                socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
                socket
                    .send_to(&question("six.example.", RecordType::AAAA), "[2001:db8:ffff::53]:53")
                    .unwrap();
                let mut buffer = [0; 4096];
                let (length, from) = socket.recv_from(&mut buffer).unwrap();
                (from, Message::from_vec(&buffer[..length]).unwrap())
            })
            .await;
        assert_eq!(from, "[2001:db8:ffff::53]:53".parse().unwrap());
        let given: Vec<_> = answer.answers.iter().map(|record| record.data.to_string()).collect();
        assert_eq!(given, ["2001:db8:1::10"], "neither a private address nor another guest's");
        let fetch = |host: &'static str| {
            move || {
                let mut stream = TcpStream::connect("[2001:db8:ffff::1]:80").unwrap();
                write!(stream, "GET / HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n").unwrap();
                let mut answer = String::new();
                let _ = stream.read_to_string(&mut answer);
                answer
            }
        };
        let answer = guest.run(fetch("six.example")).await;
        assert!(answer.ends_with("six"), "{answer}");
        let event = w.event().await;
        assert_eq!((event.verdict.reason(), event.address), (Reason::Host, Some(server)));
        assert!(guest.run(fetch("[2001:db8:1::10]")).await.starts_with("HTTP/1.1 403"));
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::AddressLiteral });
    });
}
