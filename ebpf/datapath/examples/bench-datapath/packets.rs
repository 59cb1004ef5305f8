//! Nanoseconds a frame by the kernel's own clock (`run_time_ns`), on frames that go through a real tap.

use crate::{common::*, empty::Empty, frames, median};
use aya::{
    programs::ProgramInfo,
    sys::{Stats, enable_stats},
};
use socket2::Domain;
use std::{net::UdpSocket, time::Duration};
use tapgate_model::{GuestNet, Mode, VmId};

const BAR: f64 = 150.0;

pub fn measure(long: bool) {
    let (rounds, frames_each) = if long { (9, 20_000) } else { (3, 3_000) };
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let listeners = listeners_of(&datapath, Domain::IPV6);
        datapath.set_host_addresses(&[ip(HOST_OUT), ip(HOST_OUT_V6)]).unwrap();
        let vm = VmId::generate();
        let net = GuestNet::new(0, [10, 214, 0, 0].into(), Some("fd74:6761:7465::".parse().unwrap()));
        // As many rules as the bar for rule changes speaks of.
        let mut rules: Vec<String> = (0..198).map(|n| format!("10.7.{n}.0/24")).collect();
        rules.extend(["198.51.100.0/24".into(), "2001:db8:1::/48".into()]);
        let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
        let mut gate = datapath.attach_tap(&vm, net, &policy(&vm, Mode::Enforce, &rules)).await.unwrap();
        let mut wire = Wire::new(gate.take_tap().unwrap());
        let from_guest = Program { world: &world, name: "from_guest" };
        let to_guest = Program { world: &world, name: "to_guest" };

        println!("## What a frame costs\n");
        println!("| program | instructions verified | octets of machine code |\n| --- | ---: | ---: |");
        for program in [&from_guest, &to_guest] {
            let info = program.info();
            let verified = info.verified_instruction_count().unwrap_or(0);
            println!("| `{}` | {verified} | {} |", program.name, info.size_jitted());
        }
        println!(
            "\nNanoseconds a frame by `run_time_ns`, which includes reading the clock twice; the middle of {rounds} rounds of \
             {frames_each} frames through a tap, 200 rules.\n"
        );
        println!("| frame | ns | bar |\n| --- | ---: | --- |");
        let stats = enable_stats(Stats::RunTime).unwrap();
        let empty = {
            let empty = Empty::attach(&datapath, "tg0", &world.pins().join("empty"));
            let frame = frames::ethernet([2; 6], [4; 6], 0x0800, &[0; 60]);
            let times = (0..rounds).map(|_| {
                let before = empty.info();
                (0..frames_each).for_each(|_| wire.send(&frame));
                cost(&before, &empty.info(), frames_each as u64)
            });
            median(times.collect())
        };
        row("an empty program, for comparison", empty, false);
        let (udp, tcp) = (|port| frames::udp(port, b"x"), |port| frames::tcp(port, frames::ACK));
        let v4 = |protocol, body: &[u8]| frames::ip("198.51.100.1", protocol, body);
        let v6 = |protocol, body: &[u8]| frames::ip("2001:db8:1::1", protocol, body);
        let one = |frame: Vec<u8>| vec![frame];
        let many: Vec<Vec<u8>> = (0..1000u16)
            .map(|n| {
                let mut body = udp(10_000 + n);
                body[..2].copy_from_slice(&(20_000 + n).to_be_bytes());
                v4(17, &body)
            })
            .collect();
        let classes: Vec<(&str, Vec<Vec<u8>>, bool)> = vec![
            ("known flow, TCP, IPv4", one(v4(6, &tcp(5000))), true),
            ("known flow, TCP, IPv6", one(v6(6, &tcp(5000))), true),
            ("known flow, UDP, IPv4", one(v4(17, &udp(9))), true),
            ("known flow, UDP, IPv6", one(v6(17, &udp(9))), true),
            ("known flows, UDP, IPv4, 100 in turn", many[..100].to_vec(), true),
            ("known flows, UDP, IPv4, 1,000 in turn", many, true),
            ("known ping, IPv4", one(v4(1, &frames::icmp(8))), false),
            ("to the proxy, segment", one(frames::ip("203.0.113.1", 6, &tcp(443))), false),
            ("DNS over UDP", one(frames::ip("203.0.113.1", 17, &udp(53))), false),
            ("QUIC, refused", one(frames::ip("203.0.113.1", 17, &udp(443))), false),
            ("UDP without a rule, refused", one(frames::ip("203.0.113.1", 17, &udp(99))), false),
            ("private address, dropped", one(frames::ip("10.0.0.1", 1, &frames::icmp(8))), false),
            ("forged source, dropped", one(frames::ethernet([2; 6], [4; 6], 0x0800, &[0; 60])), false),
        ];
        for (name, frames, bar) in classes {
            // A flow begins with its first frame.
            frames.iter().for_each(|frame| wire.send(frame));
            let times = (0..rounds).map(|_| {
                let before = from_guest.info();
                for number in 0..frames_each {
                    wire.send(&frames[number % frames.len()]);
                }
                cost(&before, &from_guest.info(), frames_each as u64)
            });
            row(name, median(times.collect()), bar);
            while listeners.dns_udp.set_nonblocking(true).is_ok()
                && listeners.dns_udp.recv(&mut [0; 64]).is_ok()
            {}
        }
        for (name, at, frame) in [
            ("answer to a known flow, IPv4", "198.51.100.1:9", v4(17, &udp(9))),
            ("answer to a known flow, IPv6", "[2001:db8:1::1]:9", v6(17, &udp(9))),
        ] {
            let server = world.internet.0.run(|| UdpSocket::bind(at).unwrap()).unwrap();
            server.set_read_timeout(Some(PATIENCE)).unwrap();
            wire.send(&frame);
            let (_, from) = server.recv_from(&mut [0; 8]).unwrap();
            let times = (0..rounds).map(|_| {
                let before = to_guest.info();
                for _ in 0..frames_each {
                    server.send_to(b"x", from).unwrap();
                }
                // What was sent is on its way for a moment.
                std::thread::sleep(Duration::from_millis(50));
                cost(&before, &to_guest.info(), frames_each as u64 / 2)
            });
            row(name, median(times.collect()), true);
        }
        drop(stats);
        println!();
        datapath.teardown().await.unwrap();
    });
}

struct Program<'a> {
    world: &'a World,
    name: &'static str,
}

impl Program<'_> {
    fn info(&self) -> ProgramInfo {
        self.world.program(self.name)
    }
}

/// Nanoseconds a run, of so many runs at least.
fn cost(before: &ProgramInfo, after: &ProgramInfo, least: u64) -> f64 {
    let runs = after.run_count() - before.run_count();
    assert!(runs >= least, "the program ran {runs} times only");
    (after.run_time() - before.run_time()).as_nanos() as f64 / runs as f64
}

fn row(name: &str, nanoseconds: f64, bar: bool) {
    let verdict = match (bar, nanoseconds < BAR) {
        (false, _) => String::new(),
        (true, true) => format!("under {BAR}: met"),
        (true, false) => format!("under {BAR}: missed by {:.0}", nanoseconds - BAR),
    };
    println!("| {name} | {nanoseconds:.0} | {verdict} |");
}
