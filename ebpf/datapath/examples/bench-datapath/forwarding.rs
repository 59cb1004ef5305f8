//! TCP throughput of what a `cidr` rule allows, beside plain kernel forwarding over the same number of devices and with
//! the same translation of addresses, in turns in one run.

use crate::{common::*, median};
use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, TcpStream},
    time::{Duration, Instant},
};
use tapgate_model::Mode;
use tapgate_netns::{Netns, Route, RouteKind, Rtnl, Veth, nft};

const BAR: f64 = 0.97;
const CHUNK: usize = 128 * 1024;

pub fn measure(long: bool) {
    let (rounds, time) =
        if long { (9, Duration::from_millis(1500)) } else { (2, Duration::from_millis(400)) };
    in_world_v6(|world| async move {
        let datapath = world.open().await;
        let guest = guest_v6(&datapath, 0, Mode::Enforce, &["198.51.100.0/24", "2001:db8:1::/48"]).await;
        let plain = Plain::build(&world).await;
        println!("## Throughput beside plain forwarding\n");
        println!(
            "Gbit/s of one TCP connection, {rounds} rounds of {} ms, in turns. Plain: guest, a namespace that forwards, the host, \
             which masquerades; no program and no other rule. The first two columns are the middle of each one's rounds. The \
             ratio is taken within each round, of what ran one right after the other, so that what else the machine does \
             counts for both: given are the middle one and the range of the middle half. It is no quotient of the columns \
             before it.\n",
            time.as_millis()
        );
        println!(
            "| direction | plain | tapgate | ratio within a round | middle half | bar |\n\
             | --- | ---: | ---: | ---: | ---: | --- |"
        );
        for (family, at) in [("IPv4", "198.51.100.1:5201"), ("IPv6", "[2001:db8:1::1]:5201")] {
            for (direction, back) in [("from the guest", false), ("to the guest", true)] {
                let listener = listen(&world.internet.0, at);
                let to: SocketAddr = at.parse().unwrap();
                let (mut of_plain, mut of_tapgate, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
                // One round that does not count, to warm up.
                for round in 0..=rounds {
                    // Who goes first takes turns.
                    let (first, second) = if round % 2 == 0 {
                        (&plain.guest.0, &guest.ns.0)
                    } else {
                        (&guest.ns.0, &plain.guest.0)
                    };
                    let mut got = [first, second].map(|ns| bulk(ns, &listener, to, back, time));
                    if round % 2 == 1 {
                        got.swap(0, 1);
                    }
                    if round > 0 {
                        of_plain.push(got[0]);
                        of_tapgate.push(got[1]);
                        ratios.push(got[1] / got[0]);
                    }
                }
                ratios.sort_by(f64::total_cmp);
                let (low, high) = (ratios[rounds / 4], ratios[rounds - 1 - rounds / 4]);
                let ratio = median(ratios);
                let verdict = match ratio >= BAR {
                    true => "met".into(),
                    false => format!("missed by {:.3}", BAR - ratio),
                };
                println!(
                    "| {family}, {direction} | {:.2} | {:.2} | {ratio:.3} | {low:.3} to {high:.3} | {BAR}: {verdict} |",
                    median(of_plain),
                    median(of_tapgate)
                );
            }
        }
        println!();
        datapath.teardown().await.unwrap();
    });
}

/// Gbit/s that arrive, from the namespace to the listener or back.
fn bulk(from: &Netns, listener: &TcpListener, to: SocketAddr, back: bool, time: Duration) -> f64 {
    let mut near = from.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap().unwrap();
    let (mut far, _) = listener.accept().unwrap();
    let (source, sink) = if back { (&mut far, &mut near) } else { (&mut near, &mut far) };
    let source = source.try_clone().unwrap();
    let sending = std::thread::spawn(move || {
        let (mut source, data) = (source, vec![7u8; CHUNK]);
        while source.write_all(&data).is_ok() {}
    });
    let mut buffer = vec![0; 2 * CHUNK];
    let began = Instant::now();
    let mut octets = 0;
    while began.elapsed() < time {
        octets += sink.read(&mut buffer).unwrap();
    }
    let elapsed = began.elapsed();
    // The sender's next write fails.
    sink.shutdown(std::net::Shutdown::Both).unwrap();
    drop((near, far));
    sending.join().unwrap();
    octets as f64 * 8.0 / elapsed.as_secs_f64() / 1e9
}

/// The same way without tapgate: a guest, a namespace that forwards, the world's host.
struct Plain {
    guest: Temporary,
    _middle: Temporary,
}

const V4: &str = "10.213.0.1";
const V6: &str = "fd74:6761:aaaa::1";
const GATEWAY_MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 2];
const UP_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
const HOST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 4];

impl Plain {
    async fn build(world: &World) -> Self {
        let (guest, middle) = (Temporary::new("plain"), Temporary::new("middle"));
        for key in ["ipv4/conf/all/forwarding", "ipv4/conf/default/forwarding", "ipv6/conf/all/forwarding"] {
            middle.0.sysctl(key, "1").unwrap();
        }
        let [host_ns, middle_ns, guest_ns] = [&world.host.0, &middle.0, &guest.0];
        let [host, inner, leaf] = [host_ns, middle_ns, guest_ns].map(|ns| Rtnl::connect(ns).unwrap());
        let pair = |name, mac, peer, peer_mac, peer_netns| Veth {
            name,
            mac: Some(mac),
            peer,
            peer_mac: Some(peer_mac),
            peer_netns,
        };
        let down = inner.add_veth(&pair("down0", GATEWAY_MAC, "eth0", GUEST_MAC, guest_ns)).await.unwrap();
        let host_end = host.add_veth(&pair("plain0", HOST_MAC, "up0", UP_MAC, middle_ns)).await.unwrap();
        let (up, eth0) = (inner.link("up0").await.unwrap(), leaf.link("eth0").await.unwrap());
        for (rtnl, index) in [(&inner, down), (&inner, up), (&host, host_end), (&leaf, eth0)] {
            rtnl.set_up(index).await.unwrap();
        }
        let any = ["0.0.0.0", "::"];
        let (gateway, above, below) =
            (["169.254.78.1", "fe80::a1"], ["169.254.78.2", "fe80::a2"], ["169.254.78.3", "fe80::a3"]);
        for family in [0, 1] {
            let own = [V4, V6][family];
            let full = [32, 128][family];
            let ranges = [("10.213.0.0", 16), ("fd74:6761:aaaa::", 64)];
            leaf.add_address(eth0, ip(own), full).await.unwrap();
            // Without an address a namespace has no local table, and then the kernel takes no gateway for one (EINVAL).
            inner.add_address(up, ip(below[family]), full).await.unwrap();
            for (rtnl, link, to, via, mac) in [
                (&leaf, eth0, (ip(any[family]), 0), gateway[family], GATEWAY_MAC),
                (&inner, up, (ip(any[family]), 0), above[family], HOST_MAC),
                (&host, host_end, (ip(ranges[family].0), ranges[family].1), below[family], UP_MAC),
            ] {
                rtnl.add_neighbour(link, ip(via), mac).await.unwrap();
                rtnl.add_route(&route(to, link, Some(ip(via)))).await.unwrap();
            }
            inner.add_neighbour(down, ip(own), GUEST_MAC).await.unwrap();
            inner.add_route(&route((ip(own), full), down, None)).await.unwrap();
        }
        let table = "table inet plain {\n chain postrouting {\n type nat hook postrouting priority srcnat;\n \
                     ip saddr 10.213.0.0/16 oifname != \"plain0\" masquerade\n \
                     ip6 saddr fd74:6761:aaaa::/64 oifname != \"plain0\" masquerade\n }\n}\n";
        nft::load(host_ns, table).unwrap();
        Self { guest, _middle: middle }
    }
}

fn route(to: (IpAddr, u8), link: u32, via: Option<IpAddr>) -> Route {
    Route { to, kind: RouteKind::Unicast, link: Some(link), via, source: None, table: 254 }
}
