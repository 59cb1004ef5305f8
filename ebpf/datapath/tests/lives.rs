//! The datapath from one daemon's life to the next: what is left, adopted and taken over, and what a second one beside it finds.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::*;
use tapgate_datapath::{Attachment, Datapath};
use tapgate_model::Mode;
use tapgate_netns::{Netns, nft};

#[test]
fn teardown_leaves_nothing_behind() {
    in_world(|world| async move {
        let before = nft::query(&world.host.0, &["list", "ruleset"]).unwrap();
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let name = format!("tapgate-{}", world.config.instance);
        assert!(Netns::exists(&name) && world.pins().exists());
        datapath.teardown().await.unwrap();
        drop(a);
        assert!(!Netns::exists(&name));
        assert!(!world.pins().exists());
        assert_eq!(nft::query(&world.host.0, &["list", "ruleset"]).unwrap(), before);
        let rtnl = tapgate_netns::Rtnl::connect(&world.host.0).unwrap();
        assert_eq!(rtnl.find_link(&format!("tgu-{}", world.config.instance)).await.unwrap(), None);
    });
}

#[test]
fn a_daemon_that_dies_changes_nothing_and_the_next_one_adopts() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let proxy = listeners(&datapath);
        let a = guest(&datapath, 3, Mode::Enforce, &["198.51.100.0/24"]).await;
        let gone = guest(&datapath, 4, Mode::Enforce, &[]).await;
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        let mut stream = a.connect("198.51.100.1:5000").unwrap();
        round_trip(&mut stream).unwrap();
        let before = datapath.counters(3).unwrap();

        // As a kill does: nothing is taken down.
        drop(datapath);
        drop(proxy);
        round_trip(&mut stream).expect("a forwarded connection outlives the daemon");
        refused_or_silent(&a, "203.0.113.1:443");

        let datapath = world.open().await;
        refused_or_silent(&a, "203.0.113.1:443");
        let proxy = listeners(&datapath);
        let gate =
            datapath.adopt(&a.vm, a.net, &policy(&a.vm, Mode::Enforce, &["198.51.100.0/24"])).await.unwrap();
        assert_eq!(gate.net(), a.net);
        assert_eq!(datapath.detach_others(&[a.net]).await.unwrap(), [4], "what nobody adopts goes");
        round_trip(&mut stream).expect("and its adoption");
        drop(stream);
        server.join().unwrap();
        a.connect("203.0.113.1:443").unwrap();
        proxy.tcp.accept().unwrap();
        assert!(datapath.counters(3).unwrap().packets_out > before.packets_out, "counters go on");
        let missing = datapath.adopt(&gone.vm, gone.net, &policy(&gone.vm, Mode::Enforce, &[])).await;
        assert!(matches!(missing, Err(tapgate_datapath::DatapathError::NotAdoptable { slot: 4, .. })));

        // A tap whose programs are gone is not adopted.
        world.remove_programs(&datapath, &["tg3"]);
        drop(datapath);
        let datapath = world.open().await;
        assert!(datapath.adopt(&a.vm, a.net, &policy(&a.vm, Mode::Enforce, &[])).await.is_err());
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn filters_of_clsact_hold_and_are_adopted_as_on_older_kernels() {
    in_world(|world| async move {
        let open = || Datapath::open_attaching(world.config.clone(), Attachment::Clsact);
        let datapath = open().await.unwrap();
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        let mut stream = a.connect("198.51.100.1:5000").unwrap();
        round_trip(&mut stream).unwrap();
        drop(datapath);
        round_trip(&mut stream).expect("the filters outlive the daemon");
        let arrived = world.quiet();
        let _ = a.udp().send_to(b"x", "203.0.113.1:9");
        assert_eq!(world.arrived(), arrived);

        let datapath = open().await.unwrap();
        let policy = policy(&a.vm, Mode::Enforce, &["198.51.100.0/24"]);
        datapath.adopt(&a.vm, a.net, &policy).await.unwrap();
        round_trip(&mut stream).expect("and adoption");
        drop(stream);
        server.join().unwrap();
        let tc = |arguments: &[&str]| {
            let run = || std::process::Command::new("tc").args(arguments).output().unwrap();
            String::from_utf8(datapath.egress().run(run).unwrap().stdout).unwrap()
        };
        let shown = tc(&["filter", "show", "dev", "tg0", "ingress"]);
        assert_eq!(shown.matches("direct-action").count(), 1, "{shown}");
        tc(&["filter", "del", "dev", "tg0", "ingress"]);
        drop(datapath);
        let datapath = open().await.unwrap();
        assert!(datapath.adopt(&a.vm, a.net, &policy).await.is_err(), "a filter that is gone is no gate");
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_daemon_with_other_maps_takes_over_live_taps() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let a = guest(&datapath, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        let mut stream = a.connect("198.51.100.1:5000").unwrap();
        round_trip(&mut stream).unwrap();
        drop(datapath);
        // As a daemon of another version left it.
        let own = format!("maps-{}", tapgate_ebpf_common::maps::VERSION);
        std::fs::rename(world.pins().join(&own), world.pins().join("maps-0")).unwrap();
        let datapath = world.open().await;
        round_trip(&mut stream).expect("the other version's programs and maps still work");
        let policy = policy(&a.vm, Mode::Enforce, &["198.51.100.0/24"]);
        datapath.adopt(&a.vm, a.net, &policy).await.unwrap();
        round_trip(&mut stream).expect("a connection that the new maps have not seen goes on");
        assert!(datapath.counters(0).unwrap().packets_out > 0, "the new maps count");
        datapath.detach_others(&[a.net]).await.unwrap();
        let left: Vec<_> =
            std::fs::read_dir(world.pins()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!left.contains(&"maps-0".into()), "{left:?}");
        round_trip(&mut stream).unwrap();
        drop(stream);
        server.join().unwrap();
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_second_instance_needs_a_range_of_its_own_and_then_runs_beside_the_first() {
    in_world(|world| async move {
        let first = world.open().await;
        let a = guest(&first, 0, Mode::Enforce, &["198.51.100.0/24"]).await;
        let mut config = world.config.clone();
        config.instance.push('b');
        let refused = Datapath::open(config.clone()).await.unwrap_err();
        assert!(refused.to_string().contains("10.214.0.0/16 is in use"), "{refused}");
        assert!(!Netns::exists(&format!("tapgate-{}", config.instance)), "nothing is left half made");
        // One of the host's own networks is as little free.
        config.guest_v4 = "192.0.2.0/24".parse().unwrap();
        assert!(Datapath::open(config.clone()).await.is_err());
        config.guest_v4 = "10.215.0.0/16".parse().unwrap();
        let second = Datapath::open(config).await.unwrap();
        let server = echo(listen(&world.internet.0, "198.51.100.1:5000"));
        round_trip(&mut a.connect("198.51.100.1:5000").unwrap()).unwrap();
        server.join().unwrap();
        second.teardown().await.unwrap();
        // The first is open again without complaint about itself.
        drop(first);
        world.open().await.teardown().await.unwrap();
    });
}

/// A new namespace has the host's settings: of those that VPNs and load balancers set, some would leave guests without a gateway.
#[test]
fn settings_of_the_host_that_would_close_guests_are_not_taken_over() {
    const BAD: [(&str, &str); 4] =
        [("src_valid_mark", "1"), ("arp_ignore", "2"), ("arp_filter", "1"), ("route_localnet", "1")];
    in_world(|world| async move {
        let datapath = world.open().await;
        for (name, value) in BAD {
            for of in ["all", "default"] {
                datapath.egress().sysctl(&format!("ipv4/conf/{of}/{name}"), value).unwrap();
            }
        }
        drop(datapath);
        let datapath = world.open().await;
        for (name, _) in BAD {
            for of in ["all", "default"] {
                let now = datapath.egress().read_sysctl(&format!("ipv4/conf/{of}/{name}")).unwrap();
                assert_eq!(now.trim(), "0", "{of}/{name}");
            }
        }
        let listeners = listeners(&datapath);
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let stream = a.connect("203.0.113.1:443").unwrap();
        listeners.tcp.accept().unwrap();
        drop(stream);
        datapath.teardown().await.unwrap();
    });
}
