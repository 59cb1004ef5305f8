//! A closed world for the datapath's tests: a host, an internet behind it, guests. All in namespaces of their own that go
//! with the test, however it ends. Documentation addresses only. Needs root.
#![allow(dead_code, unused_imports, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod ends;

pub use ends::*;

use aya::{
    maps::{Map, MapData, MapError},
    programs::{ProgramInfo, SchedClassifier, TcAttachType, loaded_programs},
};
use std::{
    future::Future,
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket},
    path::PathBuf,
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tapgate_datapath::{Attachment, Datapath, DatapathConfig, Gate};
use tapgate_ebpf_common::maps::VERSION;
use tapgate_model::{GuestNet, Mode, Rule, RuleId, RuleSet, RuleTarget, UserId, VmId, VmPolicy};
use tapgate_netns::{Netns, Route, RouteKind, Rtnl, Veth, nft};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Longest wait for something that must come.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// How long something that must not come is waited for.
pub const SILENCE: Duration = Duration::from_millis(300);

pub const HOST_OUT: &str = "192.0.2.1";
pub const ROUTER: &str = "192.0.2.2";
/// Servers in the internet.
pub const SERVER: &str = "198.51.100.1";
pub const OTHER: &str = "203.0.113.1";

pub const HOST_OUT_V6: &str = "2001:db8:ff::1";
pub const ROUTER_V6: &str = "2001:db8:ff::2";
pub const SERVER_V6: &str = "2001:db8:1::1";
pub const OTHER_V6: &str = "2001:db8:2::1";

pub fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// A namespace that goes with the test.
pub struct Temporary(pub Netns);

impl Temporary {
    pub fn new(what: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        Self(Netns::create(&format!("tgdp-{}-{number}-{what}", std::process::id())).unwrap())
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = Netns::delete(self.0.name());
    }
}

/// Host and internet.
pub struct World {
    pub host: Temporary,
    pub internet: Temporary,
    pub config: DatapathConfig,
}

impl Drop for World {
    fn drop(&mut self) {
        // What a panic left: the egress namespace, and the pins that keep programs alive.
        let _ = Netns::delete(&format!("tapgate-{}", self.config.instance));
        let _ = std::fs::remove_dir_all(self.config.pin_root.join(&self.config.instance));
        let _ = std::fs::remove_dir(&self.config.pin_root);
    }
}

/// Waits until the condition holds: frames are on their way for a while after they were sent.
pub fn eventually(what: &str, condition: impl Fn() -> bool) {
    let until = std::time::Instant::now() + PATIENCE;
    while !condition() {
        assert!(std::time::Instant::now() < until, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Runs a test inside a new world, on threads of the host's namespace.
pub fn in_world<F: Future<Output = ()>>(test: impl FnOnce(Arc<World>) -> F + Send) {
    in_world_of(None, test);
}

/// The same with IPv6 for guests.
pub fn in_world_v6<F: Future<Output = ()>>(test: impl FnOnce(Arc<World>) -> F + Send) {
    in_world_of(Some("fd74:6761:7465::/64"), test);
}

fn in_world_of<F: Future<Output = ()>>(v6: Option<&str>, test: impl FnOnce(Arc<World>) -> F + Send) {
    let number = NEXT.fetch_add(1, Ordering::Relaxed);
    let instance = format!("t{}-{number}", std::process::id() % 1_000_000);
    let world = World {
        host: Temporary::new("host"),
        internet: Temporary::new("inet"),
        config: DatapathConfig {
            pin_root: PathBuf::from(format!("/sys/fs/bpf/tapgate-test-{instance}")),
            instance,
            guest_v4: "10.214.0.0/16".parse().unwrap(),
            guest_v6: v6.map(|range| range.parse().unwrap()),
            guest_v6_routed: false,
            uplink: None,
            flows_per_second: 1000.try_into().unwrap(),
        },
    };
    let world = Arc::new(world);
    let host = world.host.0.clone();
    host.run(|| {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(async {
            connect_internet(&world).await;
            test(Arc::clone(&world)).await;
        });
    })
    .unwrap();
}

async fn connect_internet(world: &World) {
    let host = Rtnl::connect(&world.host.0).unwrap();
    let internet = Rtnl::connect(&world.internet.0).unwrap();
    let veth = Veth { name: "out0", mac: None, peer: "in0", peer_mac: None, peer_netns: &world.internet.0 };
    let near = host.add_veth(&veth).await.unwrap();
    let far = internet.link("in0").await.unwrap();
    for (rtnl, index, own) in [(&host, near, HOST_OUT), (&internet, far, ROUTER)] {
        rtnl.add_address(index, ip(own), 24).await.unwrap();
        rtnl.set_up(index).await.unwrap();
        let loopback = rtnl.link("lo").await.unwrap();
        rtnl.set_up(loopback).await.unwrap();
        let on_link = Route {
            to: (ip("192.0.2.0"), 24),
            kind: RouteKind::Unicast,
            link: Some(index),
            via: None,
            source: None,
            table: 254,
        };
        rtnl.add_route(&on_link).await.unwrap();
    }
    let loopback = internet.link("lo").await.unwrap();
    for address in [SERVER, OTHER, "10.9.9.9", "198.51.100.53"] {
        internet.add_address(loopback, ip(address), 32).await.unwrap();
    }
    host.add_route(&Route {
        to: (ip("0.0.0.0"), 0),
        kind: RouteKind::Unicast,
        link: Some(near),
        via: Some(ip(ROUTER)),
        source: None,
        table: 254,
    })
    .await
    .unwrap();
    connect_v6(&host, near, &internet, far, loopback).await;
    let counters = "table inet count {\n chain input {\n type filter hook prerouting priority -300; policy accept;\n \
                    iifname \"in0\" icmpv6 type { 133, 134, 135, 136, 143 } accept\n \
                    iifname \"in0\" counter name seen\n }\n counter seen {\n }\n}\n";
    // A named counter has to be declared before the rule that uses it.
    let declared = "table inet count {\n counter seen {\n }\n}\n";
    nft::load(&world.internet.0, declared).unwrap();
    nft::load(&world.internet.0, &counters.replace("\n counter seen {\n }", "")).unwrap();
}

async fn connect_v6(host: &Rtnl, near: u32, internet: &Rtnl, far: u32, loopback: u32) {
    for (rtnl, index, own) in [(host, near, HOST_OUT_V6), (internet, far, ROUTER_V6)] {
        rtnl.add_address(index, ip(own), 64).await.unwrap();
        let on_link = Route {
            to: (ip("2001:db8:ff::"), 64),
            kind: RouteKind::Unicast,
            link: Some(index),
            via: None,
            source: None,
            table: 254,
        };
        rtnl.add_route(&on_link).await.unwrap();
    }
    for address in [SERVER_V6, OTHER_V6] {
        internet.add_address(loopback, ip(address), 128).await.unwrap();
    }
    host.add_route(&Route {
        to: (ip("::"), 0),
        kind: RouteKind::Unicast,
        link: Some(near),
        via: Some(ip(ROUTER_V6)),
        source: None,
        table: 254,
    })
    .await
    .unwrap();
}

impl World {
    pub async fn open(&self) -> Datapath {
        Datapath::open(self.config.clone()).await.unwrap()
    }

    /// How many packets have arrived in the internet.
    pub fn arrived(&self) -> u64 {
        let text = nft::query(&self.internet.0, &["list", "counter", "inet", "count", "seen"]).unwrap();
        let at = text.find("packets ").unwrap() + "packets ".len();
        text[at..].split(' ').next().unwrap().parse().unwrap()
    }

    /// The same, once no more packets arrive.
    pub fn quiet(&self) -> u64 {
        let mut before = self.arrived();
        loop {
            std::thread::sleep(SILENCE);
            let now = self.arrived();
            if now == before {
                return now;
            }
            before = now;
        }
    }

    /// Takes the programs off the taps, and waits until the kernel has done so.
    pub fn remove_programs(&self, datapath: &Datapath, links: &[&str]) {
        if datapath.attachment() == Attachment::Clsact {
            for link in links {
                let tc =
                    || Command::new("tc").args(["qdisc", "del", "dev", link, "clsact"]).status().unwrap();
                assert!(datapath.egress().run(tc).unwrap().success());
            }
            return;
        }
        for entry in std::fs::read_dir(self.pins().join("links")).unwrap() {
            std::fs::remove_file(entry.unwrap().path()).unwrap();
        }
        let attached = |link: &str, kind| {
            let query = || SchedClassifier::query_tcx(link, kind).unwrap().1.len();
            datapath.egress().run(query).unwrap() > 0
        };
        for link in links {
            while attached(link, TcAttachType::Ingress) || attached(link, TcAttachType::Egress) {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// The newest program of this name that works on this world's maps: the one on its taps. Kernels before TCX do not say
    /// what is on a link.
    pub fn program(&self, name: &str) -> ProgramInfo {
        let map = self.pins().join(format!("maps-{VERSION}/VMS"));
        let map = MapData::from_pin(map).unwrap().info().unwrap().id();
        let own = |info: &ProgramInfo| {
            info.name_as_str() == Some(name)
                && info.map_ids().is_ok_and(|ids| ids.is_some_and(|ids| ids.contains(&map)))
        };
        loaded_programs().filter_map(Result::ok).filter(own).max_by_key(ProgramInfo::id).unwrap()
    }

    /// Where the instance's pins are.
    pub fn pins(&self) -> PathBuf {
        self.config.pin_root.join(&self.config.instance)
    }
}

pub fn net(slot: u32) -> GuestNet {
    GuestNet::new(slot, Ipv4Addr::new(10, 214, 0, 0), None)
}

pub fn policy(vm: &VmId, mode: Mode, cidrs: &[&str]) -> VmPolicy {
    let rules = cidrs
        .iter()
        .map(|text| Rule { id: RuleId::generate(), target: RuleTarget::Cidr(text.parse().unwrap()) });
    VmPolicy {
        vm: vm.clone(),
        user: UserId::generate(),
        generation: 1,
        mode,
        rules: RuleSet::new(rules),
        secrets: Arc::new([]),
        secrets_over_http: Default::default(),
    }
}

/// A guest that is a namespace.
pub struct Guest {
    pub ns: Temporary,
    pub vm: VmId,
    pub net: GuestNet,
    pub gate: Gate,
}

pub async fn guest(datapath: &Datapath, slot: u32, mode: Mode, cidrs: &[&str]) -> Guest {
    guest_of(datapath, net(slot), mode, cidrs).await
}

/// With addresses of both families.
pub async fn guest_v6(datapath: &Datapath, slot: u32, mode: Mode, cidrs: &[&str]) -> Guest {
    let base = "fd74:6761:7465::".parse().unwrap();
    guest_of(datapath, GuestNet::new(slot, Ipv4Addr::new(10, 214, 0, 0), Some(base)), mode, cidrs).await
}

async fn guest_of(datapath: &Datapath, net: GuestNet, mode: Mode, cidrs: &[&str]) -> Guest {
    let ns = Temporary::new("guest");
    let vm = VmId::generate();
    let gate = datapath.attach_netns(&vm, net, &policy(&vm, mode, cidrs), &ns.0).await.unwrap();
    Guest { ns, vm, net, gate }
}

impl Guest {
    pub fn connect(&self, to: &str) -> io::Result<TcpStream> {
        let to: SocketAddr = to.parse().unwrap();
        self.ns.0.run(|| TcpStream::connect_timeout(&to, PATIENCE)).unwrap()
    }

    pub fn udp(&self) -> UdpSocket {
        self.udp_at("0.0.0.0:0")
    }

    pub fn udp_at(&self, at: &str) -> UdpSocket {
        let socket = self.ns.0.run(|| UdpSocket::bind(at).unwrap()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }
}

/// A map as it is pinned, as whoever else is on the host has it.
pub fn map(world: &World, name: &str) -> Map {
    let path = world.pins().join(format!("maps-{VERSION}")).join(name);
    Map::from_map_data(MapData::from_pin(path).unwrap()).unwrap()
}

/// Puts entries until there is no room for another; how many there were.
pub fn fill(limit: u32, mut put: impl FnMut(u32) -> Result<(), MapError>) -> u32 {
    (0..=limit).find(|number| put(*number).is_err()).expect("the table has a limit")
}
