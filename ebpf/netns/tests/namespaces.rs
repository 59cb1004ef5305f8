//! Real namespaces, links and taps. Needs root.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::{
    io::{Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};
use tapgate_netns::{AddressWatch, Netns, NetnsError, Route, RouteKind, Rtnl, Rule, Tap, Veth, nft};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A namespace that goes with the test, however it ends.
struct Temporary(Netns);

impl Temporary {
    fn new() -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(Netns::create(&format!("tgnetns-{}-{number}", std::process::id())).unwrap())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = Netns::delete(self.0.name());
    }
}

fn v4(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn a_namespace_is_made_once_opened_and_removed() {
    let ns = Temporary::new();
    let name = ns.0.name().to_owned();
    assert!(matches!(Netns::create(&name), Err(NetnsError::Exists(_))));
    let opened = Netns::open(&name).unwrap();
    let inode = |ns: &Netns| ns.run(|| std::fs::read_link("/proc/thread-self/ns/net").unwrap()).unwrap();
    assert_eq!(inode(&opened), inode(&ns.0));
    assert_ne!(inode(&opened), std::fs::read_link("/proc/thread-self/ns/net").unwrap());
    Netns::delete(&name).unwrap();
    Netns::delete(&name).unwrap();
    assert!(matches!(Netns::open(&name), Err(NetnsError::Missing(_))));
}

#[test]
fn a_file_without_its_mount_is_no_namespace() {
    let name = format!("tgnetns-{}-dead", std::process::id());
    drop(Temporary::new()); // the directory is there
    std::fs::write(format!("/run/netns/{name}"), "").unwrap();
    assert!(matches!(Netns::open(&name), Err(NetnsError::Namespace { .. })));
    Netns::delete(&name).unwrap();
    assert!(!Netns::exists(&name));
}

#[test]
fn a_panic_inside_reaches_the_caller() {
    let ns = Temporary::new();
    let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ns.0.run(|| panic!("inside"))));
    assert!(result.is_err());
}

#[tokio::test]
async fn two_namespaces_talk_over_a_veth_by_rule_and_route() {
    let (left, right) = (Temporary::new(), Temporary::new());
    let rtnl = Rtnl::connect(&left.0).unwrap();
    let mac = [2, 0, 0, 0, 0, 1];
    let peer_mac = [2, 0, 0, 0, 0, 2];
    let near = rtnl
        .add_veth(&Veth {
            name: "near0",
            mac: Some(mac),
            peer: "far0",
            peer_mac: Some(peer_mac),
            peer_netns: &right.0,
        })
        .await
        .unwrap();
    let other = Rtnl::connect(&right.0).unwrap();
    let far = other.link("far0").await.unwrap();
    for (rtnl, index, own, its, its_mac) in
        [(&rtnl, near, "192.0.2.1", "192.0.2.2", peer_mac), (&other, far, "192.0.2.2", "192.0.2.1", mac)]
    {
        for _ in 0..2 {
            // Twice: what is there already is no error.
            rtnl.add_address(index, v4(own), 32).await.unwrap();
            rtnl.set_up(index).await.unwrap();
            rtnl.configure_link(index, None, 1400).await.unwrap();
            rtnl.add_neighbour(index, v4(its), its_mac).await.unwrap();
            let rule = Rule { v6: false, priority: 100, mark: None, from_link: None, table: 7701 };
            rtnl.add_rule(&rule).await.unwrap();
            rtnl.add_route(&Route {
                to: (v4(its), 32),
                kind: RouteKind::Unicast,
                link: Some(index),
                via: None,
                source: None,
                table: 7701,
            })
            .await
            .unwrap();
        }
    }
    let listener = right.0.run(|| TcpListener::bind("192.0.2.2:80").unwrap()).unwrap();
    let mut client = left.0.run(|| TcpStream::connect("192.0.2.2:80").unwrap()).unwrap();
    let (mut server, peer) = listener.accept().unwrap();
    assert_eq!(peer.ip(), v4("192.0.2.1"));
    client.write_all(b"hello").unwrap();
    let mut got = [0; 5];
    server.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"hello");

    rtnl.delete_link("near0").await.unwrap();
    rtnl.delete_link("near0").await.unwrap();
    assert_eq!(other.find_link("far0").await.unwrap(), None, "the pair goes together");
}

#[tokio::test]
async fn a_tap_lives_in_its_namespace_as_long_as_its_descriptor() {
    let ns = Temporary::new();
    let tap = Tap::create(&ns.0, "tg0").unwrap();
    let rtnl = Rtnl::connect(&ns.0).unwrap();
    let index = rtnl.link("tg0").await.unwrap();
    rtnl.configure_link(index, Some([2, 0x74, 0x67, 0, 0, 1]), 1500).await.unwrap();
    rtnl.set_up(index).await.unwrap();
    assert!(Tap::create(&ns.0, "tg0").is_err(), "a tap is never taken over");
    assert!(Tap::create(&ns.0, "a-name-too-long-0").is_err());
    let own = Rtnl::connect(&Netns::current().unwrap()).unwrap();
    assert_eq!(own.find_link("tg0").await.unwrap(), None);
    assert!(rtnl.links().await.unwrap().contains(&("tg0".into(), index)));
    drop(tap);
    assert_eq!(rtnl.find_link("tg0").await.unwrap(), None);
}

#[test]
fn nft_loads_a_table_whole_or_not_at_all() {
    let ns = Temporary::new();
    nft::load(&ns.0, "table inet t {\n chain c {\n }\n}\n").unwrap();
    assert!(nft::query(&ns.0, &["list", "tables"]).unwrap().contains("inet t"));
    let error = nft::load(&ns.0, "table inet u {\n}\nrubbish\n").unwrap_err();
    assert!(matches!(&error, NetnsError::Nft(text) if text.contains("rubbish")), "{error}");
    assert!(!nft::query(&ns.0, &["list", "tables"]).unwrap().contains("inet u"));
    nft::delete_table(&ns.0, "inet t").unwrap();
    nft::delete_table(&ns.0, "inet t").unwrap();
    assert_eq!(nft::query(&ns.0, &["list", "tables"]).unwrap(), "");
}

#[test]
fn settings_are_the_namespaces_own() {
    let ns = Temporary::new();
    ns.0.sysctl("ipv4/ip_forward", "1").unwrap();
    assert_eq!(ns.0.read_sysctl("ipv4/ip_forward").unwrap(), "1");
    assert!(matches!(ns.0.sysctl("ipv4/no_such", "1"), Err(NetnsError::Sysctl { .. })));
}

#[tokio::test]
async fn a_change_of_addresses_is_heard_at_once_and_in_its_own_namespace_alone() {
    let (ns, other) = (Temporary::new(), Temporary::new());
    let (rtnl, its) = (Rtnl::connect(&ns.0).unwrap(), Rtnl::connect(&other.0).unwrap());
    let (loopback, of_other) = (rtnl.link("lo").await.unwrap(), its.link("lo").await.unwrap());
    let mut watch = AddressWatch::open(&ns.0).unwrap();
    for address in ["192.0.2.1", "2001:db8::1"] {
        rtnl.add_address(loopback, v4(address), if address.contains(':') { 128 } else { 32 }).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_secs(10), watch.changed()).await.unwrap(), "{address}");
    }
    // A device that comes up gets an address of its own.
    rtnl.set_up(loopback).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_secs(10), watch.changed()).await.unwrap());
    while tokio::time::timeout(Duration::from_millis(200), watch.changed()).await.is_ok() {}
    its.add_address(of_other, v4("192.0.2.2"), 32).await.unwrap();
    assert!(tokio::time::timeout(Duration::from_millis(200), watch.changed()).await.is_err());
}
