//! The decision table, natively: crafted frames with the verdicts that the table names, and arbitrary bytes.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod frames;

use frames::{Setup, cases, verdict};
use tapgate_ebpf_common::{
    Verdict,
    glance::{self, Sight},
    judge,
    maps::{Address, FlowKey, Tap},
    packet::Header,
};

#[test]
fn every_crafted_frame_gets_the_verdict_of_its_row() {
    let cases = cases();
    assert!(cases.len() >= 300, "{}", cases.len());
    for case in &cases {
        for (setup, expected) in
            [Setup::Closed, Setup::Rules, Setup::Warn].into_iter().zip(case.expected.unwrap())
        {
            assert_eq!(verdict(&case.frame, setup).0, expected, "{} under {setup:?}", case.name);
        }
    }
}

#[test]
fn a_secret_keeps_the_web_ports_with_the_proxy() {
    use frames::*;
    use tapgate_ebpf_common::{Reason, maps::Listener};
    for port in [80, 443] {
        let (verdict, _) = verdict(&ip("198.51.100.1", 6, &tcp(port, SYN)), Setup::Secrets);
        assert_eq!(verdict, Verdict::Proxy(Listener::Tcp, Reason::Cidr));
    }
    let of = |frame: Vec<u8>| verdict(&frame, Setup::Secrets).0;
    assert_eq!(of(ip("198.51.100.1", 17, &udp(443, b"x"))), Verdict::Refuse(Reason::Quic));
    assert_eq!(of(ip("198.51.100.1", 6, &tcp(22, SYN))), Verdict::Uplink(Reason::Cidr));
}

#[test]
fn without_its_own_address_a_vm_has_no_ipv6() {
    for case in cases().iter().filter(|case| case.frame.get(12..14) == Some(&[0x86, 0xdd])) {
        assert!(matches!(verdict(&case.frame, Setup::V4Only).0, Verdict::Drop(_)), "{}", case.name);
    }
}

#[test]
fn no_rule_opens_a_range_that_is_never_reached() {
    use tapgate_ebpf_common::range::{Class, classify_v4, classify_v6};
    for case in cases() {
        let (verdict, header) = verdict(&case.frame, Setup::All);
        if matches!(verdict, Verdict::Uplink(_) | Verdict::Tolerate(_)) {
            let a = header.destination;
            let class = if header.v6 { classify_v6(a) } else { classify_v4([a[12], a[13], a[14], a[15]]) };
            assert!(!matches!(class, Class::Denied(_)), "{}", case.name);
        }
    }
}

/// A small generator of its own: the same bytes at every run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

#[test]
fn arbitrary_bytes_never_leave_without_a_rule() {
    let cases = cases();
    let mut random = Random(0x7467_7467_7467_7467);
    for round in 0..400_000u32 {
        let mut frame = match round % 4 {
            0 => (0..random.next() % 120).map(|_| random.next() as u8).collect(),
            _ => cases[random.next() as usize % cases.len()].frame.clone(),
        };
        for _ in 0..random.next() % 6 {
            if !frame.is_empty() {
                let at = random.next() as usize % frame.len();
                frame[at] = random.next() as u8;
            }
        }
        if random.next().is_multiple_of(8) {
            frame.truncate(random.next() as usize % (frame.len() + 1));
        }
        let (closed, _) = verdict(&frame, Setup::Closed);
        assert!(!matches!(closed, Verdict::Uplink(_) | Verdict::Tolerate(_)), "{frame:x?}");
        let (warned, header) = verdict(&frame, Setup::Warn);
        assert!(!matches!(warned, Verdict::Uplink(_)), "{frame:x?}");
        if let Verdict::Tolerate(_) = warned {
            assert!(frame[6..12] == frames::MAC, "{frame:x?}");
            assert!(header.protocol == 17 || header.pings(), "{frame:x?}");
        }
    }
}

/// What the classifier says of a frame, in the words of the quick look.
fn classified(frame: &[u8], setup: Setup) -> Option<Sight> {
    let vm = setup.vm(1);
    let mut header = Header::default();
    judge::read(frame, &vm, &mut header).ok()?;
    let key = FlowKey {
        slot: vm.slot as u16,
        protocol: header.protocol,
        v6: u8::from(header.v6),
        port: header.source_port,
        remote_port: header.port,
        remote: Address::new(header.destination),
    };
    Some(Sight { key, segment: header.segment() })
}

#[test]
fn the_quick_look_sees_nothing_that_the_classifier_refuses() {
    let cases = cases();
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let mut seen = 0;
    for number in 0..2_000_000 {
        let mut frame = cases[number % cases.len()].frame.clone();
        // The first round as they are; then a few octets changed, most of them in the headers.
        if number >= cases.len() {
            for _ in 0..next() % 4 {
                let end = frame.len().min(if next() % 4 == 0 { usize::MAX } else { 74 });
                frame[next() % end] = next() as u8;
            }
            if next() % 8 == 0 {
                frame.truncate(next() % (frame.len() + 1));
            }
        }
        for setup in [Setup::Rules, Setup::V4Only] {
            let Some(sight) = glance::from_guest(&frame[..], &Tap::new(1, &setup.vm(1))) else { continue };
            assert_eq!(Some(sight), classified(&frame, setup), "{frame:x?}");
            seen += 1;
        }
    }
    assert!(seen > 100_000, "{seen}");
}

/// The frame that answers this one: addresses and ports the other way round. Of itself the same again.
fn mirrored(frame: &[u8]) -> Option<Vec<u8>> {
    let mut frame = frame.to_vec();
    let (addresses, each, ports) = match frame.get(12..14)? {
        [0x08, 0x00] => (26, 4, 34),
        [0x86, 0xdd] => (22, 16, 54),
        _ => return None,
    };
    for (at, each) in [(0, 6), (addresses, each), (ports, 2)] {
        let (one, other) = frame.get_mut(at..at + 2 * each)?.split_at_mut(each);
        one.swap_with_slice(other);
    }
    Some(frame)
}

#[test]
fn the_quick_look_at_an_answer_is_the_one_from_the_other_side() {
    let (cases, mut random) = (cases(), Random(0x7461_7067_6174_6531));
    let mut seen = 0;
    for round in 0..1_000_000 {
        let Some(mut frame) = mirrored(&cases[round % cases.len()].frame) else { continue };
        for _ in 0..random.next() % 4 {
            let end = frame.len().min(74);
            frame[12 + random.next() as usize % (end - 12)] = random.next() as u8;
        }
        if random.next().is_multiple_of(8) {
            frame.truncate(random.next() as usize % (frame.len() + 1));
        }
        for setup in [Setup::Rules, Setup::V4Only] {
            let Some(sight) = glance::to_guest(&frame[..], &Tap::new(1, &setup.vm(1))) else { continue };
            // Whose Ethernet addresses these are is not asked of an answer.
            let mut asked = mirrored(&frame).unwrap();
            asked[..6].copy_from_slice(&tapgate_ebpf_common::net::GATEWAY_MAC);
            asked[6..12].copy_from_slice(&frames::MAC);
            assert_eq!(Some(sight), classified(&asked, setup), "{frame:x?}");
            seen += 1;
        }
    }
    assert!(seen > 100_000, "{seen}");
}

/// What it misses costs time.
#[test]
fn the_quick_look_sees_what_most_frames_are() {
    use frames::{ip, udp};
    use tapgate_ebpf_common::packet::{ACK, FIN, RST, SYN};
    let tap = Tap::new(1, &Setup::Rules.vm(1));
    for to in ["198.51.100.1", "2001:db8:1::1"] {
        let flags = [ACK, SYN, SYN | ACK, FIN | ACK, RST, RST | ACK, FIN, ACK | 8];
        let tcp = flags.map(|flags| ip(to, 6, &frames::tcp(5000, flags)));
        let udp = [b"".as_slice(), b"x"].map(|body| ip(to, 17, &udp(123, body)));
        for frame in tcp.iter().chain(&udp) {
            let out = glance::from_guest(&frame[..], &tap).unwrap();
            assert_eq!(Some(out), classified(frame, Setup::Rules), "{frame:x?}");
            let back = mirrored(frame).unwrap();
            assert_eq!(glance::to_guest(&back[..], &tap), Some(out), "{back:x?}");
            // One octet less than the headers say is no such frame.
            let (frame, back) = (&frame[..frame.len() - 1], &back[..back.len() - 1]);
            assert_eq!(glance::from_guest(frame, &tap), None);
            assert_eq!(glance::to_guest(back, &tap), None);
        }
        for nonsense in [0, 8, SYN | FIN, SYN | RST, SYN | RST | ACK] {
            let frame = ip(to, 6, &frames::tcp(5000, nonsense));
            assert_eq!(glance::from_guest(&frame[..], &tap), None, "{nonsense:x}");
        }
    }
}

#[test]
fn only_a_lone_syn_opens_and_controls_count_as_octets() {
    use tapgate_ebpf_common::packet::{ACK, FIN, RST, SYN, Segment};
    const PUSH: u8 = 8;
    for flags in 0..=255u8 {
        let lone = flags & (SYN | ACK | RST | FIN) == SYN;
        let segment = Segment { flags, ..Segment::default() };
        assert_eq!(segment.opens(), lone, "{flags:x}");
        for (protocol, opens) in [(6, lone), (17, false), (0, false)] {
            assert_eq!(Header { protocol, flags, ..Header::default() }.opens(), opens, "{flags:x}");
        }
    }
    let next = |flags, sequence, payload| Segment { flags, sequence, payload, ..Segment::default() }.next();
    assert_eq!(next(ACK, 7, 0), 7);
    assert_eq!(next(ACK | PUSH, 7, 5), 12);
    assert_eq!(next(SYN, 7, 0), 8);
    assert_eq!(next(FIN | ACK, 7, 5), 13);
    assert_eq!(next(FIN | ACK, u32::MAX, 1), 1, "it goes round");
}

#[test]
fn segments_that_no_connection_sends_are_malformed() {
    use frames::ip;
    use tapgate_ebpf_common::{
        Reason,
        packet::{ACK, FIN, RST, SYN},
    };
    for to in ["198.51.100.1", "2001:db8:1::1"] {
        let reason = |flags| {
            let read = judge::read(
                &ip(to, 6, &frames::tcp(5000, flags))[..],
                &Setup::Rules.vm(1),
                &mut Header::default(),
            );
            read.err()
        };
        for good in [SYN, ACK, FIN, RST, SYN | ACK, FIN | ACK, RST | ACK, FIN | RST] {
            assert_eq!(reason(good), None, "{good:x} to {to}");
        }
        for bad in [0, 8, 0xf8 & !ACK, SYN | FIN, SYN | RST, SYN | ACK | FIN, SYN | ACK | RST] {
            assert_eq!(reason(bad), Some(Verdict::Drop(Reason::Malformed)), "{bad:x} to {to}");
        }
    }
}

/// A ping of the other family is none.
#[test]
fn each_family_has_its_own_pings() {
    for (to, protocol, question, pings) in [
        ("198.51.100.1", 1, 8, true),
        ("198.51.100.1", 58, 128, false),
        ("2001:db8:1::1", 58, 128, true),
        ("2001:db8:1::1", 1, 8, false),
    ] {
        let frame = frames::ip(to, protocol, &frames::icmp(question));
        let (_, header) = verdict(&frame, Setup::Rules);
        assert_eq!(header.pings(), pings, "{protocol} to {to}");
    }
}

#[test]
fn a_header_that_just_fits_is_whole() {
    use frames::{icmp, ip, udp};
    use tapgate_ebpf_common::Reason;
    for (to, kind, protocol) in [("198.51.100.1", 8, 1), ("2001:db8:1::1", 128, 58)] {
        let read = |protocol, body: &[u8]| {
            judge::read(&ip(to, protocol, body)[..], &Setup::Rules.vm(1), &mut Header::default()).err()
        };
        for (protocol, least) in
            [(protocol, icmp(kind)[..8].to_vec()), (17, udp(5000, b"")), (6, frames::tcp(5000, 2))]
        {
            assert_eq!(read(protocol, &least), None, "{protocol} to {to}");
            let short = read(protocol, &least[..least.len() - 1]);
            assert_eq!(short, Some(Verdict::Drop(Reason::Malformed)), "{protocol} to {to}");
        }
        // Of a protocol without a header that is looked at, nothing is too little.
        assert_eq!(read(132, b""), None);
    }
}
