//! What a guest's resolver meets at the gateway beside plain answers: aliases, search lists, caching, answers that are none, and the
//! bound on questions at one time.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use hickory_proto::{
    op::{Edns, Message, Query, ResponseCode},
    rr::{Name, RData, RecordType},
};
use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, TcpStream, UdpSocket},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use support::{
    OTHER, PRIVATE, RESOLVER, SERVER, World,
    guest::{Guest, serve, serve_with},
    sh, world_of,
};
use tapgate_model::{GuestNet, Mode, Reason, Verdict, VmId, VmPolicy};
use tapgate_proxy::{Limits, ProxyConfig};

const HERE: &[Ipv4Addr] = &[SERVER, OTHER, RESOLVER];
/// Questions of one VM at one time.
const IN_FLIGHT: usize = 64;

fn question(name: &str) -> Vec<u8> {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).unwrap(), RecordType::A));
    message.to_vec().unwrap()
}

/// Asks from the address, so many times at once, and gives the first answer.
async fn ask(guest: &Guest, from: Ipv4Addr, name: &'static str, times: usize) -> Message {
    let work = move || {
        let socket = UdpSocket::bind((from, 0)).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        socket.connect("198.51.100.53:53").unwrap();
        for _ in 0..times {
            socket.send(&question(name)).unwrap();
        }
        let mut buffer = [0; 4096];
        let length = socket.recv(&mut buffer).unwrap();
        Message::from_vec(&buffer[..length]).unwrap()
    };
    guest.run(work).await
}

fn given(answer: &Message) -> Vec<String> {
    answer.answers.iter().map(|record| record.data.to_string()).collect()
}

fn count(w: &World, name: &str) -> usize {
    w.zone.asked.lock().unwrap().iter().filter(|asked| *asked == name).count()
}

#[test]
fn aliases_are_followed_and_lead_nowhere_that_the_name_may_not() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("a");
        serve(&w);
        w.zone.set("real.cdn.example", &[SERVER]);
        w.zone.set("inner.cdn.example", &[PRIVATE]);
        for (name, to) in [
            ("www.example", "edge.cdn.example"),
            ("edge.cdn.example", "real.cdn.example"),
            ("trap.example", "inner.cdn.example"),
            ("round.example", "about.example"),
            ("about.example", "round.example"),
        ] {
            w.zone.alias(name, to);
        }
        w.serve((SERVER, 80), None).await;
        // Only what is asked for needs a rule, not what it is called elsewhere.
        w.rules(Mode::Enforce, &["www.example", "trap.example", "round.example"], &[]);
        let answer = ask(&guest, w.net.v4, "www.example.", 1).await;
        assert_eq!(given(&answer).last().map(String::as_str), Some("192.0.2.10"), "{answer}");
        assert!(answer.answers.iter().any(|record| matches!(record.data, RData::CNAME(_))));
        let said =
            w.http((SERVER, 80), "GET / HTTP/1.1\r\nHost: www.example\r\nConnection: close\r\n\r\n").await;
        assert!(said.starts_with("HTTP/1.1 200"), "{said}");
        w.sink.forget();
        let answer = ask(&guest, w.net.v4, "trap.example.", 1).await;
        assert!(!given(&answer).iter().any(|data| data.parse::<IpAddr>().is_ok()), "{answer}");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Rebinding });
        // Without end: an answer all the same.
        let answer = ask(&guest, w.net.v4, "round.example.", 1).await;
        assert!(!given(&answer).iter().any(|data| data.parse::<IpAddr>().is_ok()), "{answer}");
        // What an alias is called is not allowed by that.
        let answer = ask(&guest, w.net.v4, "edge.cdn.example.", 1).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::Refused);
    });
}

#[test]
fn a_guests_search_list_works_and_each_try_is_decided() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("l");
        serve(&w);
        w.zone.set("api.corp.example", &[SERVER]);
        w.rules(Mode::Enforce, &["api.corp.example"], &[]);
        let search = |list: &str| {
            format!(
                "printf \"nameserver 169.254.77.1\\nsearch {list}\\n\" > /etc/resolv.conf; getent ahostsv4 api"
            )
        };
        let said = guest.shell(&search("corp.example lab.example")).await.unwrap();
        assert!(said.contains("192.0.2.10"), "{said}");
        // A try that no rule allows is sent nowhere, and told.
        let _ = guest.shell(&search("lab.example")).await;
        let events = w.events(1).await;
        assert_eq!(events[0].host.as_ref().unwrap().as_str(), "api.lab.example");
        assert_eq!(count(&w, "api.lab.example"), 0);
    });
}

#[test]
fn answers_are_kept_for_their_time_and_handed_out_for_no_longer_than_a_pin() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("k");
        serve(&w);
        w.zone.ttl.store(7 * 24 * 3600, Ordering::Relaxed);
        w.zone.set("a.example", &[SERVER]);
        w.rules(Mode::Enforce, &["a.example", "none.example"], &[]);
        for _ in 0..3 {
            let answer = ask(&guest, w.net.v4, "a.example.", 1).await;
            assert!(answer.answers[0].ttl <= 1800, "{answer}");
            let answer = ask(&guest, w.net.v4, "none.example.", 1).await;
            assert_eq!(answer.metadata.response_code, ResponseCode::NXDomain);
            assert!(matches!(answer.authorities[0].data, RData::SOA(_)), "how long it holds is said");
        }
        assert_eq!((count(&w, "a.example"), count(&w, "none.example")), (1, 1));
    });
}

/// Settings with a name server that never answers about names with `slow` in them.
async fn slow_resolver(w: &World) -> ProxyConfig {
    let socket = tokio::net::UdpSocket::bind((RESOLVER, 5311)).await.unwrap();
    let zone = w.zone.clone();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        loop {
            let (length, from) = socket.recv_from(&mut buffer).await.unwrap();
            let answer = zone.answer(&buffer[..length]);
            if !buffer[..length].windows(4).any(|part| part == b"slow") {
                socket.send_to(&answer, from).await.unwrap();
            }
        }
    });
    let mut config = support::config(&w.ca);
    config.resolvers = vec![std::net::SocketAddr::from((RESOLVER, 5311)).into()];
    config
}

#[test]
fn questions_beyond_the_bound_are_refused_and_only_that_vms() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("b");
        serve_with(&w, slow_resolver(&w).await);
        w.zone.set("a.example", &[SERVER]);
        w.rules(Mode::Enforce, &["a.example", "slow.example"], &[]);
        let other = second(&w, &guest, "b").await;
        let answer = ask(&guest, w.net.v4, "slow.example.", IN_FLIGHT + 8).await;
        assert_eq!(answer.metadata.response_code, ResponseCode::ServFail);
        let events = w.events(8).await;
        assert!(events.iter().all(|event| event.verdict == Verdict::Deny { reason: Reason::Limit }));
        let answer = ask(&guest, other.v4, "a.example.", 1).await;
        assert_eq!(given(&answer), ["192.0.2.10"], "another VM notices nothing");
    });
}

/// Two guests behind one device: the other's network.
async fn second(w: &World, guest: &Guest, tag: &str) -> GuestNet {
    let other = GuestNet::new(1, Ipv4Addr::new(10, 214, 0, 0), None);
    guest.shell(&format!("ip addr add {}/32 dev eth0", other.v4)).await.unwrap();
    sh(&format!("ip route add {}/32 dev tgp{}{tag}", other.v4, std::process::id()));
    let policy = VmPolicy { vm: VmId::generate(), ..VmPolicy::clone(&w.policy) };
    w.table.insert(other, w.vm_ca.clone(), Arc::new(policy));
    other
}

#[test]
fn questions_beyond_the_rate_are_dropped_and_counted_and_only_that_vms() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("r");
        serve(&w);
        w.zone.set("a.example", &[SERVER]);
        w.rules(Mode::Enforce, &["a.example"], &[]);
        let other = second(&w, &guest, "r").await;
        assert!(w.table.limit(&w.policy.vm, Limits { dns_per_second: 10, ..Limits::default() }));
        // More at once than a socket holds as it comes.
        ask(&guest, w.net.v4, "evil.example.", 2000).await;
        let answer = ask(&guest, other.v4, "a.example.", 1).await;
        assert_eq!(given(&answer), ["192.0.2.10"], "another VM notices nothing");
        let (mut answered, mut dropped) = (0, 0);
        for tries in 0.. {
            let events = w.events(1).await;
            w.sink.forget();
            for event in events {
                assert_eq!(event.vm, w.policy.vm);
                match event.verdict.reason() {
                    Reason::Limit => dropped += event.count,
                    Reason::NoRule => answered += event.count,
                    reason => panic!("{reason:?}"),
                }
            }
            if answered + dropped == 2000 {
                break;
            }
            assert!(tries < 100);
        }
        // Twice as many as a second's, and what is earned meanwhile.
        assert!((20..200).contains(&answered), "{answered} of 2000 answered");
        // The same over TCP.
        let ended = guest
            .run(|| {
                let mut stream = ask_over_tcp("evil.example.");
                (0..200).any(|_| {
                    let message = question("evil.example.");
                    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
                    stream.write_all(&[&length[..], &message].concat()).is_err()
                        || stream.read_exact(&mut [0; 12]).is_err()
                })
            })
            .await;
        assert!(ended);
    });
}

#[test]
fn what_is_no_question_is_told_like_every_other_attempt() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("e");
        serve(&w);
        w.rules(Mode::Enforce, &["a.example"], &[]);
        let mut later = Message::from_vec(&question("evil.example.")).unwrap();
        later.set_edns(Edns::new());
        later.edns.as_mut().unwrap().set_version(1);
        let mut answer = question("evil.example.");
        answer[2] |= 0x80;
        for (message, reason, host) in [
            (later.to_vec().unwrap(), Reason::DnsQuestion, Some("evil.example")),
            (answer.clone(), Reason::Malformed, None),
        ] {
            let send = move || {
                let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
                socket.send_to(&message, "198.51.100.53:53").unwrap();
            };
            guest.run(send).await;
            let event = w.event().await;
            assert_eq!(event.verdict, Verdict::Deny { reason });
            assert_eq!(event.host.as_ref().map(|host| host.as_str()), host);
        }
        // Longer than a question may be, whatever it holds; and an answer.
        for message in [vec![0; 4097], answer] {
            let ended = guest.run(move || {
                let mut stream = TcpStream::connect("198.51.100.53:53").unwrap();
                let length = u16::try_from(message.len()).unwrap().to_be_bytes();
                stream.write_all(&[&length[..], &message].concat()).unwrap();
                stream.read(&mut [0; 2])
            });
            assert!(!matches!(ended.await, Ok(1..)));
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Malformed });
        }
    });
}

/// Asks over TCP, without waiting for the answer.
fn ask_over_tcp(name: &str) -> TcpStream {
    let mut stream = TcpStream::connect("198.51.100.53:53").unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let message = question(name);
    let length = u16::try_from(message.len()).unwrap().to_be_bytes();
    stream.write_all(&[&length[..], &message].concat()).unwrap();
    stream
}

fn answer_over_tcp(mut stream: TcpStream) -> Message {
    let mut length = [0; 2];
    stream.read_exact(&mut length).unwrap();
    let mut answer = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut answer).unwrap();
    Message::from_vec(&answer).unwrap()
}

#[test]
fn questions_over_tcp_and_dials_share_the_bound() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("t");
        let mut config = slow_resolver(&w).await;
        config.timeouts.connect = Duration::from_secs(1);
        w.restart(config.clone());
        serve_with(&w, config);
        w.zone.set("a.example", &[SERVER]);
        w.serve((SERVER, 80), None).await;
        w.rules(Mode::Enforce, &["a.example", "slow.example"], &[]);
        let limited = Verdict::Deny { reason: Reason::Limit };
        // More than may be, each on a connection of its own; as soon as they are under way, there is no room for another.
        let (held, refused) = guest
            .run(|| {
                let mut held: Vec<_> = (0..IN_FLIGHT + 8).map(|_| ask_over_tcp("slow.example.")).collect();
                let refused = (0..20).any(|_| {
                    std::thread::sleep(Duration::from_millis(50));
                    // The one before may have had the last place when the last of these came.
                    held.push(ask_over_tcp("slow.example."));
                    let answer = answer_over_tcp(ask_over_tcp("a.example."));
                    answer.metadata.response_code == ResponseCode::ServFail
                });
                (held, refused)
            })
            .await;
        assert!(refused);
        assert!(w.events(8).await.iter().all(|event| event.verdict == limited));
        // What is dialled waits for its turn, and says so when it does not come.
        let get = "GET / HTTP/1.1\r\nHost: a.example\r\nConnection: close\r\n\r\n";
        let answer = w.http((SERVER, 80), get).await;
        assert!(answer.starts_with("HTTP/1.1 429") && answer.contains("reason: limit"), "{answer}");
        // It comes when those are given up.
        let mut answers = 0;
        while !w.http((SERVER, 80), get).await.starts_with("HTTP/1.1 200") {
            answers += 1;
            assert!(answers < 100, "nothing is given back");
        }
        drop(held);
        // A connection that is one too many is recorded.
        w.sink.forget();
        assert!(w.table.limit(&w.policy.vm, Limits { connections: 0, ..Limits::default() }));
        let ended = guest.run(|| TcpStream::connect("198.51.100.53:53").unwrap().read(&mut [0; 2])).await;
        assert!(!matches!(ended, Ok(1..)));
        assert_eq!(w.event().await.verdict, limited);
    });
}
