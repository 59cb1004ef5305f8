//! What a guest makes the proxy hold by reading nothing: counted by what upstream servers are let send.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use aws_lc_rs::digest;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use std::{
    collections::HashMap,
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicUsize, Ordering},
    },
    time::Duration,
};
use support::{SERVER, World, sh, world};
use tapgate_model::{Mode, Reason};
use tapgate_proxy::Limits;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel},
    task::AbortHandle,
    time::timeout,
};

// Frame types (RFC 9113 §6).
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
/// The protocol's own window of a connection.
const NARROW: i64 = 65_535;
const MIDDLE: i64 = 256 << 10;
const WIDE: i64 = 2 << 20;
/// Content that is on its way to a VM and not written yet (docs/proxy.md).
const ON_ITS_WAY: i64 = 64 << 20;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

fn number(bytes: &[u8]) -> i64 {
    i64::from(u32::from_be_bytes(bytes.try_into().unwrap()))
}

/// What servers sent in all, and what each was let send at once when it was at a standstill.
#[derive(Default)]
struct Sent {
    octets: AtomicI64,
    streams: AtomicUsize,
}

/// Answers every request without end, as far as it is let. Says how much it was let send each time that it comes to a
/// standstill: when a PING after its last octet was answered and it still may send nothing.
async fn endless(mut stream: TcpStream, sent: Arc<Sent>, still: UnboundedSender<i64>) -> std::io::Result<()> {
    stream.read_exact(&mut [0; 24]).await?;
    stream.write_all(&frame(SETTINGS, 0, 0, b"")).await?;
    let (mut initial, mut all, mut mine) = (NARROW, NARROW, 0);
    let mut streams = HashMap::<i64, i64>::new();
    loop {
        let mut head = [0; 9];
        stream.read_exact(&mut head).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        let id = number(&head[5..]);
        let mut answered = false;
        match (head[3], head[4] & 1) {
            (SETTINGS, 0) => {
                if let Some(window) = payload.chunks(6).find(|setting| setting[..2] == [0, 4]) {
                    initial = number(&window[2..]);
                }
                stream.write_all(&frame(SETTINGS, 1, 0, b"")).await?;
            }
            (HEADERS, _) => {
                streams.insert(id, initial);
                sent.streams.fetch_add(1, Ordering::Relaxed);
                stream.write_all(&frame(HEADERS, 4, u32::try_from(id).unwrap(), &[0x88])).await?;
            }
            (WINDOW_UPDATE, _) if id == 0 => all += number(&payload),
            (WINDOW_UPDATE, _) => *streams.get_mut(&id).unwrap() += number(&payload),
            (PING, 0) => stream.write_all(&frame(PING, 1, 0, &payload)).await?,
            (PING, _) => answered = true,
            _ => {}
        }
        let mut moved = false;
        for (id, window) in &mut streams {
            while all.min(*window) > 0 {
                let length = all.min(*window).min(16_384);
                let content = vec![0; usize::try_from(length).unwrap()];
                stream.write_all(&frame(DATA, 0, u32::try_from(*id).unwrap(), &content)).await?;
                (all, *window, mine, moved) = (all - length, *window - length, mine + length, true);
                sent.octets.fetch_add(length, Ordering::Relaxed);
            }
        }
        if moved {
            stream.write_all(&frame(PING, 0, 0, &[0; 8])).await?;
        } else if answered {
            let _ = still.send(mine);
        }
    }
}

/// A literal field `x` without indexing (RFC 7541 §6.2.2), its length an integer of seven bits (§5.1).
fn long(length: usize) -> Vec<u8> {
    let mut field = vec![0, 1, b'x', 127];
    let mut rest = length - 127;
    while rest >= 128 {
        field.push(u8::try_from(rest % 128 + 128).unwrap());
        rest /= 128;
    }
    field.push(u8::try_from(rest).unwrap());
    field.resize(field.len() + length, b'y');
    field
}

/// A head, or trailers, and the end of the stream, in as many frames as that takes.
fn ended(stream: u32, head: &[u8]) -> Vec<u8> {
    let mut frames = Vec::new();
    let mut pieces = head.chunks(16_384).peekable();
    let mut kind = HEADERS;
    while let Some(piece) = pieces.next() {
        let end = if pieces.peek().is_none() { 4 } else { 0 };
        frames.extend(frame(kind, end | u8::from(kind == HEADERS), stream, piece));
        kind = CONTINUATION;
    }
    frames
}

/// Where a server's long fields are.
#[derive(Clone, Copy)]
enum Where {
    /// Before the answer, eight times.
    Interim,
    Head,
    Trailers,
}

/// Answers every request with 200 and a field of `length` octets over HTTP/2.
async fn heads(mut stream: TcpStream, length: usize, at: Where, sent: Arc<Sent>) -> std::io::Result<()> {
    stream.read_exact(&mut [0; 24]).await?;
    stream.write_all(&frame(SETTINGS, 0, 0, b"")).await?;
    let field = long(length);
    loop {
        let mut start = [0; 9];
        stream.read_exact(&mut start).await?;
        let mut payload = vec![0; u32::from_be_bytes([0, start[0], start[1], start[2]]) as usize];
        stream.read_exact(&mut payload).await?;
        match (start[3], start[4] & 1) {
            (SETTINGS, 0) => stream.write_all(&frame(SETTINGS, 1, 0, b"")).await?,
            (PING, 0) => stream.write_all(&frame(PING, 1, 0, &payload)).await?,
            (HEADERS, _) => {
                let id = u32::try_from(number(&start[5..])).unwrap();
                let all = match at {
                    Where::Head => ended(id, &[&[0x88], &field[..]].concat()),
                    Where::Trailers => [frame(HEADERS, 4, id, &[0x88]), ended(id, &field)].concat(),
                    Where::Interim => {
                        // 103 as a literal value of an indexed name (RFC 7541 §6.2.2).
                        let hint = frame(HEADERS, 4, id, &[&[0x08, 3][..], b"103", &field].concat());
                        [hint.repeat(8), frame(HEADERS, 5, id, &[0x88])].concat()
                    }
                };
                stream.write_all(&all).await?;
                sent.streams.fetch_add(1, Ordering::Relaxed);
            }
            _ => {}
        }
    }
}

/// What each server says, in the order in which they were connected to.
type Servers = UnboundedReceiver<(UnboundedReceiver<i64>, AbortHandle)>;

async fn start(w: &mut World) -> (Arc<Sent>, Servers) {
    // Under one name they would share a connection.
    for n in 100..300 {
        w.zone.set(&format!("api{n}.example"), &[SERVER]);
    }
    w.rules(Mode::Enforce, &["*"], &[]);
    assert!(w.table.limit(&w.policy.vm, Limits::default()));
    let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
    let (sent, (connected, servers)) = (Arc::<Sent>::default(), unbounded_channel());
    let counted = sent.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let (still, stills) = unbounded_channel();
            let server = tokio::spawn(endless(stream, counted.clone(), still));
            let _ = connected.send((stills, server.abort_handle()));
        }
    });
    (sent, servers)
}

/// A guest's connection with so many requests on it to a server of its own, whose answers it lets come as far as `window`, and
/// never reads.
async fn guest(w: &World, number: usize, requests: u32, window: u32) -> TcpStream {
    guest_of(w, 80, number, requests, window).await
}

async fn guest_of(w: &World, port: u16, number: usize, requests: u32, window: u32) -> TcpStream {
    let mut stream = w.connect((SERVER, port)).await;
    let settings = [&[0, 4][..], &window.to_be_bytes()].concat();
    let mut all =
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), &frame(SETTINGS, 0, 0, &settings)].concat();
    if window > 0 {
        all.extend(frame(WINDOW_UPDATE, 0, 0, &(window - 65_535).to_be_bytes()));
    }
    let name = format!("api{}.example", 100 + number);
    let name = if port == 80 { name } else { format!("{name}:{port}") };
    let length = u8::try_from(name.len()).unwrap();
    let head = [&[0x82, 0x86, 0x84, 0x41, length][..], name.as_bytes()].concat();
    (0..requests).for_each(|n| all.extend(frame(HEADERS, 5, 2 * n + 1, &head)));
    stream.write_all(&all).await.unwrap();
    stream
}

/// What the next server was let send, once that is at least so much and it is at a standstill.
async fn standstill(servers: &mut Servers, least: i64) -> (i64, AbortHandle) {
    let waited = async {
        let (mut stills, server) = servers.recv().await.unwrap();
        loop {
            let mine = stills.recv().await.expect("the server goes on");
            if mine >= least {
                return (mine, server);
            }
        }
    };
    timeout(Duration::from_secs(20), waited).await.expect("it is let send so much and no more")
}

#[test]
fn a_vm_that_reads_nothing_holds_up_its_upstreams_within_its_bound() {
    world(|mut w| async move {
        let (sent, mut servers) = start(&mut w).await;
        // One after the other, so that each server's share is known; one answer may have half of it.
        let (mut guests, mut ends) = (Vec::new(), Vec::new());
        for n in 0..144 {
            guests.push(guest(&w, n, 1, 0).await);
            let window = match n {
                0..16 => WIDE,
                16..128 => MIDDLE,
                _ => NARROW,
            } / 2;
            let (mine, server) = standstill(&mut servers, window).await;
            ends.push(server);
            // What the guest's side took of the answer, to be passed on, was sent besides.
            assert!(mine <= window + 16_384, "connection {n} had {mine} of {window}");
        }
        let bound = (16 * WIDE + 112 * MIDDLE + 16 * NARROW) / 2 + 144 * 16_384;
        let octets = sent.octets.load(Ordering::Relaxed);
        assert!(octets <= bound, "{octets} octets where {bound} are the bound");
        // A share goes back with its connection, as soon as its end was noticed.
        ends[0].abort();
        let wide = async {
            loop {
                guests.push(guest(&w, guests.len(), 1, 0).await);
                let (mut stills, _) = servers.recv().await.unwrap();
                while let Ok(Some(mine)) = timeout(Duration::from_millis(500), stills.recv()).await {
                    if mine >= WIDE / 2 {
                        return;
                    }
                }
            }
        };
        timeout(Duration::from_secs(20), wide).await.expect("the share of a connection that ended is gone");
    });
}

#[test]
fn what_is_on_its_way_to_a_vm_is_bounded_for_all_its_connections() {
    world(|mut w| async move {
        small_buffers();
        let (sent, _servers) = start(&mut w).await;
        let mut guests = Vec::new();
        for n in 0..4 {
            guests.push(guest(&w, n, 128, 1 << 30).await);
        }
        // Until nothing more comes for a while: what is sent later would be beyond the bound all the same.
        let all = || (sent.streams.load(Ordering::Relaxed), sent.octets.load(Ordering::Relaxed));
        let quiet = async {
            let mut before = all();
            loop {
                tokio::time::sleep(Duration::from_secs(3)).await;
                let now = all();
                if now == before && now.1 > 0 {
                    return;
                }
                before = now;
            }
        };
        timeout(Duration::from_secs(30), quiet).await.expect("it comes to an end");
        let octets = sent.octets.load(Ordering::Relaxed);
        // Windows (requests that come together may each have a connection), a piece in the hand of each stream, and what the kernel
        // has of both sides.
        let besides = 16 * WIDE + 112 * MIDDLE + 384 * NARROW + 512 * 16_384 + 8 * 4 * 65_536;
        assert!(octets <= ON_ITS_WAY + besides, "{octets} octets");
        assert!(octets >= ON_ITS_WAY, "{octets} octets: it is not something else that bounds it");
    });
}

#[test]
fn heads_that_a_vm_does_not_read_are_bounded_for_all_its_connections() {
    world(|mut w| async move {
        const LENGTH: usize = 200 << 10;
        start(&mut w).await;
        let listener = TcpListener::bind((SERVER, 8080)).await.unwrap();
        let sent = Arc::<Sent>::default();
        let counted = sent.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(heads(stream, LENGTH, Where::Head, counted.clone()));
            }
        });
        let mut guests = Vec::new();
        for n in 0..6 {
            guests.push(guest_of(&w, 8080, n, 128, 1 << 30).await);
        }
        let events = w.events(6 * 128).await;
        assert_eq!(sent.streams.load(Ordering::Relaxed), 6 * 128);
        let passed = events.iter().filter(|event| event.status == Some(200)).count();
        let refused = events.iter().filter(|event| event.verdict.reason() == Reason::Limit).count();
        assert_eq!(passed + refused, 6 * 128);
        // Some are on their way in the kernel's buffers and the library's.
        let room = usize::try_from(ON_ITS_WAY).unwrap() / LENGTH;
        assert!(
            passed >= room - 2 && passed <= room + 6 * 24,
            "{passed} heads passed where {room} have room"
        );
        // What was not read goes with its connection.
        drop(guests);
        let again = async {
            loop {
                let guest = guest_of(&w, 8080, 7, 1, 1 << 30).await;
                let events = w.events(6 * 128 + 1).await;
                drop(guest);
                if events.last().unwrap().status == Some(200) {
                    return;
                }
            }
        };
        timeout(Duration::from_secs(20), again).await.expect("there is room again");
    });
}

/// What the kernel holds is small then, and no part of what is bounded.
fn small_buffers() {
    sh(
        "echo 4096 16384 65536 > /proc/sys/net/ipv4/tcp_wmem; echo 4096 16384 65536 > /proc/sys/net/ipv4/tcp_rmem",
    );
}

/// What came on a connection until so many of its streams had ended.
#[derive(Default)]
struct Came {
    /// Heads that are not an end.
    heads: usize,
    /// Streams that ended with fields.
    whole: usize,
    reset: usize,
}

async fn ends(stream: &mut TcpStream, streams: usize, came: &mut Came) {
    let mut ended = 0;
    while ended < streams {
        let mut start = [0; 9];
        stream.read_exact(&mut start).await.unwrap();
        let mut payload = vec![0; u32::from_be_bytes([0, start[0], start[1], start[2]]) as usize];
        stream.read_exact(&mut payload).await.unwrap();
        let count = match (start[3], start[4] & 1) {
            (HEADERS, 0) => &mut came.heads,
            (HEADERS, _) => &mut came.whole,
            (RST_STREAM, _) => &mut came.reset,
            _ => continue,
        };
        *count += 1;
        ended += usize::from(start[3] == RST_STREAM || start[4] & 1 == 1);
    }
}

/// What comes to so many guests with 128 requests each that read nothing before all was answered, and taken.
async fn came_late(w: &World, guests: usize, sent: &Sent) -> Came {
    let (mut streams, mut came) = (Vec::new(), Came::default());
    for n in 0..guests {
        streams.push(guest_of(w, 8080, n, 128, 1 << 30).await);
    }
    let answered = async {
        while sent.streams.load(Ordering::Relaxed) < guests * 128 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        tokio::time::sleep(Duration::from_secs(3)).await;
    };
    timeout(Duration::from_secs(30), answered).await.expect("all are answered");
    for stream in &mut streams {
        timeout(Duration::from_secs(20), ends(stream, 128, &mut came)).await.expect("all end");
    }
    came
}

async fn serve_heads(length: usize, at: Where) -> Arc<Sent> {
    let listener = TcpListener::bind((SERVER, 8080)).await.unwrap();
    let sent = Arc::<Sent>::default();
    let counted = sent.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(heads(stream, length, at, counted.clone()));
        }
    });
    sent
}

#[test]
fn trailers_that_a_vm_does_not_read_are_bounded_for_all_its_connections() {
    world(|mut w| async move {
        const LENGTH: usize = 200 << 10;
        small_buffers();
        start(&mut w).await;
        let sent = serve_heads(LENGTH, Where::Trailers).await;
        let came = came_late(&w, 4, &sent).await;
        assert_eq!(came.whole + came.reset, 4 * 128);
        let room = usize::try_from(ON_ITS_WAY).unwrap() / LENGTH;
        assert!((room - 2..=room + 4 * 6).contains(&came.whole), "{} where {room} have room", came.whole);
    });
}

#[test]
fn heads_before_answers_that_a_vm_does_not_read_are_bounded_for_all_its_connections() {
    world(|mut w| async move {
        const LENGTH: usize = 16_000;
        small_buffers();
        start(&mut w).await;
        let sent = serve_heads(LENGTH, Where::Interim).await;
        let came = came_late(&w, 5, &sent).await;
        // The answers come all the same.
        assert_eq!((came.whole, came.reset), (5 * 128, 0));
        let room = usize::try_from(ON_ITS_WAY).unwrap() / LENGTH;
        assert!((room - 200..=room + 5 * 60).contains(&came.heads), "{} where {room} have room", came.heads);
    });
}

#[test]
fn trailers_that_upstreams_do_not_read_are_bounded_for_all_of_a_vms_connections() {
    world(|mut w| async move {
        const LENGTH: usize = 60_000;
        const GUESTS: usize = 12;
        small_buffers();
        start(&mut w).await;
        let listener = TcpListener::bind((SERVER, 8080)).await.unwrap();
        let (begun, mut begins) = unbounded_channel();
        tokio::spawn(async move {
            let mut servers = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                stream.write_all(&frame(SETTINGS, 0, 0, b"")).await.unwrap();
                stream.read_exact(&mut [0; 24]).await.unwrap();
                let mut start = [0; 9];
                while start[3] != HEADERS {
                    stream.read_exact(&mut start).await.unwrap();
                    let mut payload = vec![0; u32::from_be_bytes([0, start[0], start[1], start[2]]) as usize];
                    stream.read_exact(&mut payload).await.unwrap();
                }
                begun.send(()).unwrap();
                servers.push(stream);
            }
        });
        let mut guests = Vec::new();
        for n in 0..GUESTS {
            let mut guest = guest_of(&w, 8080, n, 0, 1 << 30).await;
            let name = format!("api{}.example:8080", 100 + n);
            let length = u8::try_from(name.len()).unwrap();
            let head = [&[0x83, 0x86, 0x84, 0x41, length][..], name.as_bytes()].concat();
            let begin = |n: u32| frame(HEADERS, 4, 2 * n + 1, &head);
            // The first of them makes the connection that the others share.
            guest.write_all(&begin(0)).await.unwrap();
            timeout(Duration::from_secs(20), begins.recv()).await.expect("it comes").unwrap();
            let trailers = long(LENGTH);
            let all = (1..128).flat_map(|n| [begin(n), ended(2 * n + 1, &trailers)]);
            guest.write_all(&all.flatten().collect::<Vec<_>>()).await.unwrap();
            guests.push(guest);
        }
        // Those for which there is no room are given up; the others wait on.
        let room = usize::try_from(ON_ITS_WAY).unwrap() / (LENGTH + 512 + 128 + 1);
        let refused = GUESTS * 127 - room;
        let events = w.events(refused - GUESTS * 6).await;
        assert!(events.iter().all(|event| event.verdict.reason() == Reason::Unreachable));
        tokio::time::sleep(Duration::from_secs(1)).await;
        let given_up = w.events(0).await.len();
        assert!(given_up <= refused + 2, "{given_up} given up where {refused} have no room");
    });
}

/// Grants every wish for WebSocket, with a field of so many octets beside.
async fn websockets(mut stream: TcpStream, length: usize) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await?);
    }
    let head = String::from_utf8(head).unwrap();
    let key = head.lines().find_map(|line| line.strip_prefix("sec-websocket-key: ")).unwrap();
    let accept = format!("{key}258EAFA5-E914-47DA-95CA-C5AB0DC85B11");
    let accept = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, accept.as_bytes());
    let answer = format!(
        "HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {}\r\nX: {}\r\n\r\n",
        STANDARD.encode(accept),
        "y".repeat(length)
    );
    stream.write_all(answer.as_bytes()).await?;
    let _ = stream.read_u8().await;
    Ok(())
}

#[test]
fn the_head_of_a_websocket_has_its_share_of_those_that_a_vm_does_not_read() {
    world(|mut w| async move {
        const GUESTS: usize = 5;
        small_buffers();
        start(&mut w).await;
        let listener = TcpListener::bind((SERVER, 8080)).await.unwrap();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(async move {
                    let mut first = [0; 3];
                    match stream.peek(&mut first).await? {
                        3 if first == *b"PRI" => heads(stream, 200 << 10, Where::Head, Arc::default()).await,
                        _ => websockets(stream, 60_000).await,
                    }
                });
            }
        });
        let mut guests = Vec::new();
        for n in 0..GUESTS {
            guests.push(guest_of(&w, 8080, n, 100, 1 << 30).await);
        }
        w.events(GUESTS * 100).await;
        // All the room is taken but for less than one of those heads.
        let name = format!("api{}.example:8080", 100);
        let length = u8::try_from(name.len()).unwrap();
        let connect = [
            &[0x02, 7][..],
            b"CONNECT",
            &[0, 9],
            b":protocol",
            &[9],
            b"websocket",
            &[0x86, 0x84, 0x41, length],
            name.as_bytes(),
            &[0, 21],
            b"sec-websocket-version",
            &[2],
            b"13",
        ];
        let connect = connect.concat();
        let all = (100..120).flat_map(|n| frame(HEADERS, 4, 2 * n + 1, &connect));
        guests[0].write_all(&all.collect::<Vec<_>>()).await.unwrap();
        let events = w.events(GUESTS * 100 + 12).await;
        let refused = &events[GUESTS * 100..];
        assert!(refused.iter().all(|event| event.verdict.reason() == Reason::Limit), "{refused:?}");
    });
}
