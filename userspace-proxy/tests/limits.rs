//! A VM at one of its limits is refused or held back, and others notice nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use http::{Request, Response};
use http_body_util::Empty;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{net::Ipv4Addr, sync::Arc, time::Duration};
use support::{ATTACKER, GUEST, OTHER, SERVER, World, world};
use tapgate_model::{GuestNet, Mode, Reason, Verdict, VmId, VmPolicy};
use tapgate_proxy::{Limits, VmCa};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

const OTHER_GUEST: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 2);
const GET: &str = "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n";

async fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.serve((SERVER, 80), None).await;
    w.rules(Mode::Enforce, &["api.example"], &[]);
    let net = GuestNet::new(1, Ipv4Addr::new(10, 214, 0, 0), None);
    assert_eq!(net.v4, OTHER_GUEST);
    let vm = VmId::generate();
    let ca = Arc::new(VmCa::generate(&vm).unwrap());
    w.table.insert(net, ca, Arc::new(VmPolicy { vm, ..VmPolicy::clone(&w.policy) }));
}

/// Uploads so many octets and gives the answer.
async fn upload(stream: TcpStream, octets: usize) -> String {
    let (mut read, mut write) = stream.into_split();
    let head = format!(
        "POST /u HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nContent-Length: {octets}\r\n\r\n"
    );
    let body = vec![b'x'; octets];
    let mut answer = Vec::new();
    let (_, read) = tokio::join!(
        async {
            write.write_all(head.as_bytes()).await.unwrap();
            write.write_all(&body).await
        },
        async {
            let mut start = [0; 64];
            let length = read.read(&mut start).await.unwrap();
            answer.extend_from_slice(&start[..length]);
        }
    );
    let () = read;
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn octets_beyond_the_rate_wait_and_only_that_vms() {
    world(|mut w| async move {
        start(&mut w).await;
        // A second's worth at once and three more: far longer than the other VM takes for all of its own.
        let rate = 100 * 1024;
        assert!(w.table.limit(&w.policy.vm, Limits { octets_per_second: Some(rate), ..Limits::default() }));
        let octets = usize::try_from(rate).unwrap() * 4;
        let slow = upload(w.connect_as(GUEST, (ATTACKER, 80)).await, octets);
        let mut others = Vec::new();
        for _ in 0..3 {
            others.push(w.connect_as(OTHER_GUEST, (ATTACKER, 80)).await);
        }
        let quick = async {
            for other in others {
                assert!(upload(other, octets).await.starts_with("HTTP/1.1 200"));
            }
        };
        let (mut slow, mut quick) = (Box::pin(slow), Box::pin(quick));
        tokio::select! {
            said = &mut slow => panic!("the VM at its rate was done before one without a bound: {said}"),
            () = &mut quick => {}
        }
        // The bound can be lifted while it runs, and nothing is lost by waiting.
        assert!(w.table.limit(&w.policy.vm, Limits::default()));
        assert!(slow.await.starts_with("HTTP/1.1 200"));
        let events = w.events(4).await;
        assert!(events.iter().all(|event| event.bytes_out == octets as u64), "{events:#?}");
    });
}

#[test]
fn connections_beyond_the_rate_are_reset_and_only_that_vms() {
    world(|mut w| async move {
        start(&mut w).await;
        assert!(w.table.limit(&w.policy.vm, Limits { new_per_second: 1, ..Limits::default() }));
        let mut refused = 0;
        for _ in 0..20 {
            let mut stream = w.connect_as(GUEST, (ATTACKER, 80)).await;
            let _ = stream.write_all(GET.as_bytes()).await;
            let mut all = Vec::new();
            refused += usize::from(stream.read_to_end(&mut all).await.is_err() || all.is_empty());
            let mut other = w.connect_as(OTHER_GUEST, (ATTACKER, 80)).await;
            other.write_all(GET.as_bytes()).await.unwrap();
            all.clear();
            other.read_to_end(&mut all).await.unwrap();
            assert!(all.starts_with(b"HTTP/1.1 200"), "the other VM is served");
        }
        assert!(refused > 0);
        let events = w.events(40).await;
        let limited = events.iter().filter(|event| event.verdict == Verdict::Deny { reason: Reason::Limit });
        assert_eq!(limited.count(), refused, "one event for each");
    });
}

/// Asks for WebSocket and gives the connection with the first octets of the answer, if there is one.
async fn websocket(w: &World) -> Option<(TcpStream, [u8; 12])> {
    let mut stream = w.connect_as(GUEST, (ATTACKER, 80)).await;
    let ask = "GET /ws HTTP/1.1\r\nHost: api.example\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n\r\n";
    let _ = stream.write_all(ask.as_bytes()).await;
    let mut start = [0; 12];
    stream.read_exact(&mut start).await.ok()?;
    Some((stream, start))
}

#[test]
fn a_websocket_keeps_its_connections_place_until_it_ends() {
    world(|mut w| async move {
        start(&mut w).await;
        assert!(w.table.limit(&w.policy.vm, Limits { connections: 4, ..Limits::default() }));
        let mut open = Vec::new();
        for _ in 0..4 {
            let (stream, start) = websocket(&w).await.unwrap();
            assert_eq!(&start, b"HTTP/1.1 101");
            open.push(stream);
        }
        for _ in 0..3 {
            assert!(websocket(&w).await.is_none(), "a connection more than the VM may have");
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Limit });
        }
        // Those that are open go on, and the place of one that ends is given back.
        let mut ended = open.pop().unwrap();
        ended.shutdown().await.unwrap();
        let _ = ended.read_to_end(&mut Vec::new()).await;
        assert_eq!(w.event().await.status, Some(101));
        let (stream, start) = websocket(&w).await.unwrap();
        assert_eq!(&start, b"HTTP/1.1 101");
        open.push(stream);
    });
}

#[test]
fn a_websocket_on_which_nothing_moves_is_closed_and_so_is_one_when_the_daemon_stops() {
    world(|mut w| async move {
        start(&mut w).await;
        let end = Duration::from_secs(10);
        let (mut stream, _) = websocket(&w).await.unwrap();
        w.stop.cancel();
        let _ = timeout(end, stream.read_to_end(&mut Vec::new())).await.expect("it ends with the daemon");
        w.stop = CancellationToken::new();
        let mut config = support::config(&w.ca);
        config.timeouts.idle = Duration::from_millis(200);
        w.restart(config);
        let (mut stream, _) = websocket(&w).await.unwrap();
        let _ = timeout(end, stream.read_to_end(&mut Vec::new())).await.expect("nothing moves");
        assert!(w.events(2).await.iter().all(|event| event.status == Some(101)));
    });
}

/// Over HTTP/2 the connection goes on, and looks at what moves on it too.
#[test]
fn a_stream_on_which_nothing_moves_is_closed_and_was_allowed() {
    world(|mut w| async move {
        start(&mut w).await;
        let mut config = support::config(&w.ca);
        config.timeouts.idle = Duration::from_secs(1);
        w.restart(config);
        let mut sender = begin_http2(&w).await;
        tokio::time::sleep(Duration::from_millis(400)).await;
        let ask = Request::connect("http://api.example/ws")
            .header("sec-websocket-version", "13")
            .extension(hyper::ext::Protocol::from_static("websocket"))
            .body(Empty::new())
            .unwrap();
        let mut answer = sender.send_request(ask).await.unwrap();
        assert_eq!(answer.status(), 200);
        let mut stream = TokioIo::new(hyper::upgrade::on(&mut answer).await.unwrap());
        tokio::time::sleep(Duration::from_millis(300)).await;
        stream.write_all(b"ping").await.unwrap();
        let end = Duration::from_secs(20);
        let _ = timeout(end, stream.read_to_end(&mut Vec::new())).await.expect("nothing moves");
        assert!(w.event().await.verdict.passes());
    });
}

async fn begin_http2(w: &World) -> SendRequest<Empty<Bytes>> {
    let stream = TokioIo::new(w.connect_as(GUEST, (ATTACKER, 80)).await);
    let (sender, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn is_refused(response: &Response<hyper::body::Incoming>) -> bool {
    response.status() == 429 && response.headers()["x-tapgate-reason"] == "limit"
}

#[test]
fn one_connection_reaches_no_more_upstreams_than_its_vm_may() {
    world(|mut w| async move {
        start(&mut w).await;
        assert!(w.table.limit(&w.policy.vm, Limits { connections: 4, ..Limits::default() }));
        let mut sender = begin_http2(&w).await;
        assert_eq!(sender.send_request(get("http://api.example/")).await.unwrap().status(), 200);
        let mut open = Vec::new();
        let refused = loop {
            let ask = Request::connect("http://api.example/ws")
                .header("sec-websocket-version", "13")
                .extension(hyper::ext::Protocol::from_static("websocket"))
                .body(Empty::new())
                .unwrap();
            let mut answer = sender.send_request(ask).await.unwrap();
            if answer.status() != 200 {
                break answer;
            }
            open.push(hyper::upgrade::on(&mut answer).await.unwrap());
            assert!(open.len() <= 8, "without bound");
        };
        assert!(is_refused(&refused), "{refused:?}");
        // The one that the first request was sent on is still there.
        assert_eq!(open.len(), 7);
        w.sink.forget();
        drop(open);
        w.events(7).await;
        // Streams for as many hosts, none of which answers.
        let listener = TcpListener::bind((OTHER, 80)).await.unwrap();
        let (accepted, mut held) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                accepted.send(stream).unwrap();
            }
        });
        let hosts: Vec<_> = (0..12).map(|n| format!("n{n}.example")).collect();
        hosts.iter().for_each(|host| w.zone.set(host, &[OTHER]));
        w.rules(Mode::Enforce, &["*.example"], &[]);
        let mut sender = begin_http2(&w).await;
        let mut answers: FuturesUnordered<_> =
            hosts.iter().map(|host| sender.send_request(get(&format!("http://{host}/")))).collect();
        let mut streams = Vec::new();
        let mut refused = 0;
        while streams.len() + refused < hosts.len() {
            tokio::select! {
                answer = answers.next() => {
                    assert!(is_refused(&answer.unwrap().unwrap()));
                    refused += 1;
                }
                stream = held.recv() => streams.push(stream.unwrap()),
            }
        }
        assert_eq!((streams.len(), refused), (7, 5));
    });
}

fn get(uri: &str) -> Request<Empty<Bytes>> {
    Request::get(uri).body(Empty::new()).unwrap()
}

#[test]
fn upstreams_at_rest_leave_room_for_those_in_use() {
    world(|mut w| async move {
        start(&mut w).await;
        w.rules(Mode::Enforce, &["*.example"], &[]);
        assert!(w.table.limit(&w.policy.vm, Limits { connections: 4, ..Limits::default() }));
        for n in 0..20 {
            let host = format!("n{n}.example");
            w.zone.set(&host, &[SERVER]);
            let answer = w.http((ATTACKER, 80), &GET.replace("api.example", &host)).await;
            assert!(answer.starts_with("HTTP/1.1 200"), "{host}: {answer}");
        }
    });
}

/// Credentials cost more than their octets, for they are looked for in the answer.
#[test]
fn requests_under_way_are_bounded_by_what_they_hold_and_only_that_vms() {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    const MOST: usize = 64 << 20;
    world(|mut w| async move {
        start(&mut w).await;
        w.zone.set("mute.example", &[OTHER]);
        w.rules(Mode::Enforce, &["api.example", "mute.example"], &[("s", "a-real-value", &["mute.example"])]);
        // Takes connections and says nothing.
        let mute = TcpListener::bind((OTHER, 80)).await.unwrap();
        tokio::spawn(async move {
            let mut open = Vec::new();
            while let Ok((stream, _)) = mute.accept().await {
                open.push(stream);
            }
        });
        let credentials = STANDARD.encode(format!("{}:IRONSH_PROXY_s", "x".repeat(12_000)));
        let ask = || {
            let request = Request::get("http://mute.example/");
            let request = request.header("authorization", format!("Basic {credentials}"));
            request.body(Empty::<Bytes>::new()).unwrap()
        };
        // Both spellings, as the guest and as the upstream has it.
        let each = 24 * 2 * credentials.len();
        let (mut senders, mut asked) = (Vec::new(), FuturesUnordered::new());
        for _ in 0..2 {
            let mut sender = begin_http2(&w).await;
            for _ in 0..100 {
                asked.push(sender.send_request(ask()));
            }
            senders.push(sender);
        }
        let mut refused = 0;
        while let Ok(Some(answer)) = timeout(Duration::from_secs(3), asked.next()).await {
            assert!(is_refused(&answer.unwrap()));
            refused += 1;
        }
        let passed = 200 - refused;
        assert!(passed <= MOST / each && passed > MOST / each / 2, "{passed} of 200 are under way");
        let mut other = w.connect_as(OTHER_GUEST, (ATTACKER, 80)).await;
        other.write_all(GET.as_bytes()).await.unwrap();
        let mut all = Vec::new();
        other.read_to_end(&mut all).await.unwrap();
        assert!(all.starts_with(b"HTTP/1.1 200"), "the other VM is served");
        // What they held is there again when they have ended.
        drop((asked, senders));
        while w.table.open_connections(&w.policy.vm) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut sender = begin_http2(&w).await;
        let mut again = std::pin::pin!(sender.send_request(ask()));
        assert!(
            timeout(Duration::from_secs(1), &mut again).await.is_err(),
            "it is refused: nothing came back"
        );
    });
}

/// Answers every request with a head that names a coding and a beginning in it, and breaks off when it is told to.
async fn begun(coding: &'static str, beginning: Vec<u8>) -> CancellationToken {
    let listener = TcpListener::bind((OTHER, 80)).await.unwrap();
    let end = CancellationToken::new();
    let told = end.clone();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let head = format!("HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\n\r\n");
            let (answer, told) = ([head.as_bytes(), &beginning].concat(), told.clone());
            tokio::spawn(async move {
                let _ = stream.read(&mut [0; 4096]).await;
                stream.write_all(&answer).await.unwrap();
                told.cancelled().await;
            });
        }
    });
    end
}

/// Asks for it on so many connections, and gives those on which it came, with how many were refused.
async fn ask_for_it(w: &World, guest: Ipv4Addr, times: usize) -> (Vec<TcpStream>, usize) {
    let asked = (0..times).map(|_| async {
        let mut stream = w.connect_as(guest, (OTHER, 80)).await;
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: coded.example\r\nAccept-Encoding: br, zstd\r\n\r\n")
            .await
            .unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(stream.read_u8().await.unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        if head.starts_with("HTTP/1.1 200") {
            // Its decoder is there when something has come out of it.
            let _ = timeout(Duration::from_secs(1), stream.read_u8()).await;
            return Some(stream);
        }
        assert!(head.starts_with("HTTP/1.1 429") && head.contains("reason: limit"), "{head}");
        None
    });
    let came: Vec<_> = futures_util::future::join_all(asked).await.into_iter().flatten().collect();
    let refused = times - came.len();
    (came, refused)
}

/// An upstream chooses how much memory a decoder takes, and a guest how long.
#[test]
fn decoders_of_answers_are_bounded_by_what_they_hold_and_only_that_vms() {
    world(|mut w| async move {
        start(&mut w).await;
        w.zone.set("coded.example", &[OTHER]);
        w.rules(
            Mode::Enforce,
            &["api.example", "coded.example"],
            &[("s", "a-real-value", &["coded.example"])],
        );
        let other = VmPolicy { vm: VmId::generate(), ..VmPolicy::clone(&w.policy) };
        w.table.insert(GuestNet::new(1, Ipv4Addr::new(10, 214, 0, 0), None), w.vm_ca.clone(), other.into());
        let mut config = support::config(&w.ca);
        config.timeouts.connect = Duration::from_secs(1);
        w.restart(config);
        // A frame with a window of 8 MiB, and a block of 1000 times the same octet.
        let end =
            begun("zstd", [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x68][..], &[0x43, 0x1f, 0][..], b"a"].concat())
                .await;
        let (held, refused) = ask_for_it(&w, GUEST, 60).await;
        // 128 MiB (docs/proxy.md).
        assert!(held.len() * 8 <= 128 && held.len() > 10, "{} of 60 are decoded", held.len());
        assert_eq!(held.len() + refused, 60);
        assert_eq!(ask_for_it(&w, OTHER_GUEST, 1).await.1, 0, "the other VM is served");
        // What they held is there again when they have ended.
        end.cancel();
        while w.table.open_connections(&w.policy.vm) > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(ask_for_it(&w, GUEST, 1).await.1, 0);
    });
}

#[test]
fn an_answer_that_waits_to_be_decoded_ends_with_its_rule() {
    world(|mut w| async move {
        start(&mut w).await;
        let names = ["first.example", "later.example"];
        let secret: &[(&str, &str, &[&str])] = &[("s", "a-real-value", &names)];
        names.iter().for_each(|name| w.zone.set(name, &[OTHER]));
        w.rules(Mode::Enforce, &names, secret);
        let mut config = support::config(&w.ca);
        config.timeouts.connect = Duration::from_secs(60);
        w.restart(config);
        begun("zstd", [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x68][..], &[0x43, 0x1f, 0][..], b"a"].concat()).await;
        let ask = async |name: &str| {
            let mut stream = w.connect((OTHER, 80)).await;
            let request = format!("GET / HTTP/1.1\r\nHost: {name}\r\nAccept-Encoding: zstd\r\n\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            stream
        };
        let mut start = [0; 12];
        // Until there is no room for another.
        let mut held = Vec::new();
        loop {
            let mut stream = ask(names[0]).await;
            let came = timeout(Duration::from_secs(2), stream.read_exact(&mut start)).await;
            held.push(stream);
            assert!(held.len() <= 17, "none has to wait");
            if came.is_err() {
                break;
            }
        }
        let mut waiting = ask(names[1]).await;
        assert!(timeout(Duration::from_secs(1), waiting.read_exact(&mut start)).await.is_err());
        w.rules(Mode::Enforce, &names[..1], secret);
        let answered = timeout(Duration::from_secs(20), waiting.read_exact(&mut start)).await;
        answered.expect("it does not wait on").unwrap();
        assert_eq!(&start, b"HTTP/1.1 403");
    });
}

#[test]
fn answers_that_say_that_they_need_little_are_many_at_a_time() {
    world(|mut w| async move {
        start(&mut w).await;
        w.zone.set("coded.example", &[OTHER]);
        w.rules(Mode::Enforce, &["coded.example"], &[("s", "a-real-value", &["coded.example"])]);
        // A window of 64 KiB.
        begun("zstd", [&[0x28, 0xb5, 0x2f, 0xfd, 0, 0x30][..], &[0x43, 0x1f, 0][..], b"a"].concat()).await;
        assert_eq!(ask_for_it(&w, GUEST, 90).await.1, 0);
    });
}
