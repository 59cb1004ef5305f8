//! The TLS hello, however it comes: split over segments and records, one octet at a time, beyond what one record or packet
//! holds, with an encrypted inner hello, without end. No verdict before the whole of it, and a bound on time and size.

use super::{
    field::{Event, Field, Real, on_field, the_attacker_sees_what_comes},
    wire::{self, Offer, has_status, spoken},
};
use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    thread,
    time::Duration,
};
use tapgate_e2e::sites::{API, ECHO, EVIL};

const VALUE: &str = "sk-live-hello-0b7e5d1f3a924c68";
const REALS: &[Real] = &[Real { value: VALUE, sites: &[ECHO] }];

/// What becomes of the first flight on its way.
#[derive(Clone, Copy)]
enum How {
    /// In pieces of this size, with a rest between them.
    Segments(usize),
    /// In TLS records of this many octets of the handshake each, all in one write.
    Records(usize),
    /// In records of one octet, a packet each.
    Crumbs,
    /// All but the last octet; then a rest, in which nothing may come back.
    Held,
    /// With these octets instead of those, which are as many.
    Instead(&'static [u8], &'static [u8]),
}

/// A stream whose first write is treated so.
struct Chopped {
    stream: TcpStream,
    how: Option<How>,
    early: bool,
}

impl Chopped {
    fn new(to: impl Into<SocketAddr>, how: How) -> io::Result<Self> {
        Ok(Self { stream: wire::connect(to)?, how: Some(how), early: false })
    }

    fn pieces(&mut self, bytes: &[u8], size: usize) -> io::Result<()> {
        for piece in bytes.chunks(size) {
            self.stream.write_all(piece)?;
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

/// The handshake's octets in records of this size.
fn records(flight: &[u8], size: usize) -> Vec<u8> {
    let mut rest = flight;
    let mut handshake = Vec::new();
    while let [22, _, _, high, low, body @ ..] = rest {
        let (own, more) = body.split_at(usize::from(u16::from_be_bytes([*high, *low])));
        handshake.extend_from_slice(own);
        rest = more;
    }
    let record = |piece: &[u8]| {
        let length = u16::try_from(piece.len()).unwrap().to_be_bytes();
        [&[22, 3, 1], &length[..], piece].concat()
    };
    handshake.chunks(size).flat_map(record).collect()
}

impl Write for Chopped {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.how.take() {
            None => return self.stream.write(bytes),
            Some(How::Segments(size)) => self.pieces(bytes, size)?,
            Some(How::Records(size)) => self.stream.write_all(&records(bytes, size))?,
            Some(How::Crumbs) => self.pieces(&records(bytes, 1), 6)?,
            Some(How::Instead(from, to)) => {
                let at = bytes.windows(from.len()).position(|window| window == from);
                let mut bytes = bytes.to_vec();
                let at =
                    at.ok_or_else(|| io::Error::other("the hello does not hold what is to be replaced"))?;
                bytes[at..at + to.len()].copy_from_slice(to);
                self.stream.write_all(&bytes)?;
            }
            Some(How::Held) => {
                let (most, last) = bytes.split_at(bytes.len() - 1);
                self.stream.write_all(most)?;
                self.stream.set_read_timeout(Some(Duration::from_millis(700)))?;
                self.early = self.stream.peek(&mut [0]).is_ok();
                self.stream.set_read_timeout(Some(Duration::from_secs(20)))?;
                self.stream.write_all(last)?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

impl Read for Chopped {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.early {
            return Err(io::Error::other("a verdict before the whole hello"));
        }
        self.stream.read(buffer)
    }
}

#[test]
fn no_hello_gets_by_however_it_comes() {
    on_field(REALS, |field| {
        field.api().rule("host", ECHO.name).unwrap();
        field.api().rule("host", API.name).unwrap();
        let key = field.api().secret("key", "KEY", VALUE, &[ECHO.name]).unwrap();
        let before = field.arrived(EVIL);
        every_way(field, &key);
        what_names_no_host(field);
        without_end(field);
        let arrived = field.arrived(EVIL) - before;
        field.check(arrived == 0, || format!("{arrived} packets came to the attacker"));
        the_attacker_sees_what_comes(field);
    });
}

fn ways() -> Vec<(&'static str, How, Offer)> {
    let plain = || Offer::alpn(&["http/1.1"]);
    // More than one record of the largest kind holds, and some.
    let mut large = Offer { alpn: (0..100).map(|n| [b'a' + (n % 26), n, 1].repeat(70)).collect(), ..plain() };
    large.alpn.push(b"http/1.1".to_vec());
    vec![
        ("many segments", How::Segments(7), plain()),
        ("one octet at a time", How::Segments(1), plain()),
        ("many records", How::Records(40), plain()),
        ("records of one octet", How::Records(1), plain()),
        ("records of one octet, a packet each", How::Crumbs, plain()),
        ("over 16 KiB", How::Segments(9000), large.clone()),
        ("over 16 KiB, in many records", How::Records(500), large),
        ("a post-quantum key share", How::Segments(1200), Offer { post_quantum: true, ..plain() }),
        ("all but the last octet", How::Held, plain()),
        ("an encrypted inner hello", How::Segments(4096), Offer { ech: true, ..plain() }),
    ]
}

/// The same hello with an allowed name arrives at that name, opened or spliced; with another it is refused by that name.
fn every_way(field: &mut Field<'_>, key: &str) {
    for (way, how, offer) in ways() {
        for (name, wanted) in [
            (ECHO.name, Event::Passed("host")),
            (API.name, Event::Passed("host")),
            (EVIL.name, Event::Refused("no_rule")),
        ] {
            let what = format!("{way}: {name}");
            let request =
                format!("GET / HTTP/1.1\r\nHost: {name}\r\nX-Key: {key}\r\nConnection: close\r\n\r\n");
            let to = SocketAddr::from((EVIL.v4, 443));
            let got = field.attempt(&what, &[wanted], || {
                spoken(Chopped::new(to, how).and_then(|stream| offer.tls(name, stream)), request.as_bytes())
            });
            let text = String::from_utf8_lossy(&got);
            if name == EVIL.name {
                field.check(text.contains("AccessDenied"), || format!("{what}: {text}"));
            } else {
                let right = has_status(&got, 200) && text.contains(&format!("hello from {name}"));
                field.check(right, || format!("{what}: {text}"));
            }
        }
    }
}

/// An address in the hello is no name (RFC 6066 §3), and neither is what is none.
fn what_names_no_host(field: &mut Field<'_>) {
    let rows: [(&str, &str, &[u8], &[u8]); 4] = [
        ("SNI that is the attacker's address", "aaaa.bbbb.ccc", b"aaaa.bbbb.ccc", b"198.51.100.66"),
        ("SNI that is an allowed name's address", "aaaa.bbb.ccc", b"aaaa.bbb.ccc", b"203.0.113.11"),
        ("SNI with NUL", "echo.example.comz.example.net", b"comz.", b"com\0."),
        ("SNI with a space", "echo.example.comz.example.net", b"comz.", b"com ."),
    ];
    for (what, name, from, to) in rows {
        for address in [EVIL.v4, ECHO.v4] {
            let offer = Offer::alpn(&["http/1.1"]);
            let stream = move || Chopped::new((address, 443), How::Instead(from, to));
            field.guest(what, || {
                spoken(stream().and_then(|stream| offer.tls(name, stream)), b"GET / HTTP/1.1\r\n\r\n")
            });
            field.expect_refusal(what, &["no_name", "bad_name", "address_literal", "bad_hello"]);
        }
    }
}

/// First flights that never end, or say that they are larger than may be; TLS and what begins like a request.
fn without_end(field: &mut Field<'_>) {
    let large = [&[22, 3, 1, 0x40, 0, 1, 0x01, 0x20, 0, 3, 3][..], &[7; 0x3ffa]].concat();
    let more = [&[22, 3, 1, 0x40, 0][..], &[7; 0x4000]].concat();
    let endless = [large, more.repeat(6)].concat();
    let head = format!("GET / HTTP/1.1\r\nHost: {}\r\nX: {}", ECHO.name, "y".repeat(100_000));
    let rows: [(&str, u16, Vec<u8>, bool); 6] = [
        ("a hello of 72 KiB", 443, endless, false),
        ("a hello that says it is of 16 MiB", 443, vec![22, 3, 1, 2, 0, 1, 0xff, 0xff, 0xff, 3, 3], true),
        ("a hello that stops", 443, vec![22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3, 9, 9, 9], true),
        (
            "a record before the hello",
            443,
            [&[21, 3, 1, 0, 2, 1, 0][..], &[22, 3, 1, 2, 0, 1]].concat(),
            true,
        ),
        ("an HTTP/1 head without end", 80, head.into_bytes(), false),
        ("a request line that stops", 80, b"GET /a-path-that-goes".to_vec(), true),
    ];
    for (what, port, bytes, open) in rows {
        field.guest(what, || {
            let Ok(mut stream) = wire::connect((EVIL.v4, port)) else { return b"no connection".to_vec() };
            let _ = stream.write_all(&bytes);
            if !open {
                let _ = stream.shutdown(std::net::Shutdown::Write);
            }
            let mut got = wire::drain(&mut stream);
            // Whoever waits as long as we do has no bound of its own.
            if matches!(stream.read(&mut [0]), Err(error) if error.kind() == io::ErrorKind::WouldBlock) {
                got.extend_from_slice(b"STILL OPEN");
            }
            got
        });
        field.expect_refusal(what, &["bad_hello", "bad_request", "no_name"]);
        let open = field.last_received().ends_with(b"STILL OPEN");
        let said = String::from_utf8_lossy(field.last_received()).into_owned();
        field.check(!open, || format!("{what}: it is still open: {said}"));
    }
}
