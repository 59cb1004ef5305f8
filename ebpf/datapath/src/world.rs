//! The egress namespace, the uplink and the nftables tables: what every guest's frames pass, whatever programs there are.
//!
//! Every route that leads out needs a mark, and only the programs set marks; what comes from a tap without one is dropped
//! before routing. So a program that is lost means an outage, never an escape. Must never touch a rule, an address or a
//! table of the host that is not tapgate's own.

use crate::{DatapathConfig, DatapathError, error::map_error, objects::Tables};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use tapgate_ebpf_common::{
    maps::{Config, MAX_FLOWS_PER_VM},
    net::{
        GATEWAY_V4, GUEST_SERVICE_V4, MARK_PROXY, MARK_REJECT, MARK_UPLINK, TABLE_GUESTS, TABLE_PROXY,
        TABLE_UPLINK,
    },
};
use tapgate_netns::{Netns, NetnsError, Route, RouteKind, Rtnl, Rule, Veth, nft};

/// The uplink's end in the egress namespace.
pub(crate) const UPLINK: &str = "uplink0";
/// What the names of guests' taps begin with.
const TAPS: &str = "tg";
/// MAC addresses of the uplink's ends.
const HOST_MAC: [u8; 6] = [0x02, 0x74, 0x67, 0, 0, 2];
const UPLINK_MAC: [u8; 6] = [0x02, 0x74, 0x67, 0, 0, 3];
/// The ends as next hops: no interface has these addresses, the neighbour entries alone give them a meaning.
const HOST_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 2);
const UPLINK_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 3);
const HOST_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);
const UPLINK_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 3);
pub(crate) const MTU: u32 = 1500;

/// Refusals by ICMP that a guest is sent a second; the kernel sends 1,000 in all (`icmp_msgs_per_sec`).
const REFUSALS: u32 = 50;
/// Entries that a guest has in the host's table of connections at most, whatever it does to them: those that ended stand there for a
/// while, so it is twice the flows that a guest may have. The table's usual size is 262,144.
const TRACKED: u32 = 2 * MAX_FLOWS_PER_VM;

const ANY_V4: (IpAddr, u8) = (IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0);
const ANY_V6: (IpAddr, u8) = (IpAddr::V6(Ipv6Addr::UNSPECIFIED), 0);

/// Settings of the egress namespace. Those of `default` are what each new tap gets.
const SETTINGS: [(&str, &str); 33] = [
    // What is routed where is the marks' business; a reverse path says nothing here, and is not looked up for each frame.
    ("ipv4/conf/all/rp_filter", "0"),
    ("ipv4/conf/default/rp_filter", "0"),
    ("ipv4/conf/all/accept_local", "1"),
    // A new namespace begins with the host's own settings, which know nothing of marks and of a gateway's address on `lo`.
    ("ipv4/conf/all/src_valid_mark", "0"),
    ("ipv4/conf/default/src_valid_mark", "0"),
    ("ipv4/conf/all/arp_ignore", "0"),
    ("ipv4/conf/default/arp_ignore", "0"),
    ("ipv4/conf/all/arp_announce", "0"),
    ("ipv4/conf/default/arp_announce", "0"),
    ("ipv4/conf/all/arp_filter", "0"),
    ("ipv4/conf/default/arp_filter", "0"),
    ("ipv4/conf/all/proxy_arp", "0"),
    ("ipv4/conf/default/proxy_arp", "0"),
    ("ipv4/conf/all/route_localnet", "0"),
    ("ipv4/conf/default/route_localnet", "0"),
    ("ipv4/conf/all/bc_forwarding", "0"),
    ("ipv4/conf/default/bc_forwarding", "0"),
    ("ipv4/conf/all/send_redirects", "0"),
    ("ipv4/conf/default/send_redirects", "0"),
    ("ipv4/conf/all/accept_redirects", "0"),
    ("ipv4/conf/default/accept_redirects", "0"),
    ("ipv4/conf/all/accept_source_route", "0"),
    ("ipv4/conf/default/accept_source_route", "0"),
    ("ipv4/conf/all/forwarding", "1"),
    ("ipv4/conf/default/forwarding", "1"),
    // Refusals at the pace of the attempts: each guest has its own limit.
    ("ipv4/icmp_ratelimit", "5"),
    // Nothing is learned from a guest.
    ("ipv6/conf/default/accept_ra", "0"),
    ("ipv6/conf/default/autoconf", "0"),
    ("ipv6/conf/default/accept_redirects", "0"),
    ("ipv6/conf/default/addr_gen_mode", "1"),
    ("ipv6/conf/default/accept_dad", "0"),
    ("ipv6/conf/all/forwarding", "1"),
    ("ipv6/icmp/ratelimit", "5"),
];

/// Makes the egress namespace and all around it, or completes what is there.
pub(crate) async fn open(config: &DatapathConfig, host: &Netns) -> Result<Netns, DatapathError> {
    // What cannot be is refused before anything is made.
    let has_v6 = host.read_sysctl("ipv6/conf/all/forwarding").is_ok();
    if config.guest_v6.is_some() && !has_v6 {
        return Err(DatapathError::Config(
            "this kernel has no IPv6; leave the guests' IPv6 range out of the configuration".into(),
        ));
    }
    range_is_free(config, host).await?;
    let name = config.namespace();
    let egress = match Netns::open(&name) {
        Ok(egress) => egress,
        // A file that a crash left without its namespace goes first.
        Err(NetnsError::Missing(_)) => Netns::create(&name)?,
        Err(NetnsError::Namespace { .. }) => {
            Netns::delete(&name)?;
            Netns::create(&name)?
        }
        Err(error) => return Err(error.into()),
    };
    // The tables come first: there is no moment with routes and without them.
    nft::load(&egress, &egress_table())?;
    nft::load(host, &host_table(config))?;
    for (key, value) in SETTINGS {
        if has_v6 || !key.starts_with("ipv6") {
            egress.sysctl(key, value)?;
        }
    }
    if has_v6 {
        // Without a range for guests the namespace speaks no IPv6 at all.
        let off = if config.guest_v6.is_some() { "0" } else { "1" };
        egress.sysctl("ipv6/conf/all/disable_ipv6", off)?;
        egress.sysctl("ipv6/conf/default/disable_ipv6", off)?;
    }
    let inside = Rtnl::connect(&egress)?;
    let outside = Rtnl::connect(host)?;
    let loopback = inside.link("lo").await?;
    inside.set_up(loopback).await?;
    for address in [GATEWAY_V4, GUEST_SERVICE_V4] {
        inside.add_address(loopback, Ipv4Addr::from(address).into(), 32).await?;
    }
    let (uplink, host_end) = uplink(config, &egress, &inside, &outside).await?;
    let v6 = config.guest_v6.is_some();
    rules(&inside, v6).await?;
    routes(&inside, loopback, uplink, v6).await?;
    let link = config.host_link();
    outside.add_neighbour(host_end, UPLINK_V4.into(), UPLINK_MAC).await?;
    host.sysctl("ipv4/ip_forward", "1")?;
    if v6 {
        outside.add_neighbour(host_end, UPLINK_V6.into(), UPLINK_MAC).await?;
        host.sysctl(&format!("ipv6/conf/{link}/accept_ra"), "0")?;
        forward_v6(host, &outside).await?;
    }
    for to in config.ranges() {
        let via = if to.0.is_ipv4() { UPLINK_V4.into() } else { UPLINK_V6.into() };
        outside
            .add_route(&Route {
                to,
                kind: RouteKind::Unicast,
                link: Some(host_end),
                via: Some(via),
                source: None,
                table: 254,
            })
            .await?;
    }
    Ok(egress)
}

/// Lets the host forward IPv6. A host that forwards stops listening to its router's advertisements unless told
/// otherwise: where it listened before, it goes on.
async fn forward_v6(host: &Netns, outside: &Rtnl) -> Result<(), DatapathError> {
    if host.read_sysctl("ipv6/conf/all/forwarding")? == "1" {
        return Ok(());
    }
    for (name, _) in outside.links().await? {
        let key = format!("ipv6/conf/{name}/accept_ra");
        if host.read_sysctl(&key).is_ok_and(|value| value == "1") {
            host.sysctl(&key, "2")?;
        }
    }
    Ok(host.sysctl("ipv6/conf/all/forwarding", "1")?)
}

/// Another instance's range, or one of the host's own networks, must not be taken over silently.
async fn range_is_free(config: &DatapathConfig, host: &Netns) -> Result<(), DatapathError> {
    let outside = Rtnl::connect(host)?;
    let own = outside.find_link(&config.host_link()).await?;
    for range in [Some(config.guest_v4), config.guest_v6].into_iter().flatten() {
        for (network, length, link) in outside.routes(range.network().is_ipv6()).await? {
            if range.contains(network) && length >= range.prefix_len() && (own.is_none() || link != own) {
                return Err(DatapathError::Config(format!(
                    "the guests' range {range} is in use on this host (it has a route to {network}/{length}); give \
                     this instance a range of its own"
                )));
            }
        }
    }
    Ok(())
}

/// Makes the pair of devices that joins the namespaces, unless it is whole; answers both indexes.
async fn uplink(
    config: &DatapathConfig,
    egress: &Netns,
    inside: &Rtnl,
    outside: &Rtnl,
) -> Result<(u32, u32), DatapathError> {
    let link = config.host_link();
    let (near, far) = match (outside.find_link(&link).await?, inside.find_link(UPLINK).await?) {
        (Some(near), Some(far)) => (near, far),
        _ => {
            // One end without the other is what another namespace of this name left.
            outside.delete_link(&link).await?;
            inside.delete_link(UPLINK).await?;
            let near = outside
                .add_veth(&Veth {
                    name: &link,
                    mac: Some(HOST_MAC),
                    peer: UPLINK,
                    peer_mac: Some(UPLINK_MAC),
                    peer_netns: egress,
                })
                .await?;
            (near, inside.link(UPLINK).await?)
        }
    };
    inside.configure_link(far, None, MTU).await?;
    outside.configure_link(near, None, MTU).await?;
    inside.set_up(far).await?;
    outside.set_up(near).await?;
    Ok((far, near))
}

async fn rules(inside: &Rtnl, v6: bool) -> Result<(), DatapathError> {
    let from = |name: &str| Some(name.to_owned());
    for (priority, mark, from_link, table) in [
        (100, Some(MARK_PROXY), None, TABLE_PROXY),
        (110, Some(MARK_UPLINK), None, TABLE_UPLINK),
        (120, None, from(UPLINK), TABLE_GUESTS),
        (130, None, from("lo"), TABLE_GUESTS),
    ] {
        let rule = Rule { v6: false, priority, mark, from_link, table };
        inside.add_rule(&rule).await?;
        if v6 {
            inside.add_rule(&Rule { v6: true, ..rule }).await?;
        }
    }
    Ok(())
}

async fn routes(inside: &Rtnl, loopback: u32, uplink: u32, v6: bool) -> Result<(), DatapathError> {
    inside.add_neighbour(uplink, HOST_V4.into(), HOST_MAC).await?;
    let local = Route {
        to: ANY_V4,
        kind: RouteKind::Local,
        link: Some(loopback),
        via: None,
        source: None,
        table: TABLE_PROXY,
    };
    let out = Route {
        to: ANY_V4,
        kind: RouteKind::Unicast,
        link: Some(uplink),
        via: Some(HOST_V4.into()),
        source: None,
        table: TABLE_UPLINK,
    };
    inside.add_route(&local).await?;
    inside.add_route(&out).await?;
    if v6 {
        inside.add_neighbour(uplink, HOST_V6.into(), HOST_MAC).await?;
        inside.add_route(&Route { to: ANY_V6, ..local }).await?;
        inside.add_route(&Route { to: ANY_V6, via: Some(HOST_V6.into()), ..out }).await?;
    }
    Ok(())
}

/// Tells the programs what all VMs share.
pub(crate) async fn describe(
    config: &DatapathConfig,
    egress: &Netns,
    tables: &mut Tables,
) -> Result<(), DatapathError> {
    let uplink = Rtnl::connect(egress)?.link(UPLINK).await?;
    let (guests_v4, mask_v4) = match config.guest_v4.network() {
        IpAddr::V4(v4) => {
            (v4.octets(), (u32::MAX << (32 - u32::from(config.guest_v4.prefix_len()))).to_be_bytes())
        }
        IpAddr::V6(_) => ([0; 4], [0; 4]),
    };
    let (guests_v6, mask_v6) = match config.guest_v6.map(|range| (range.network(), range.prefix_len())) {
        Some((IpAddr::V6(v6), length)) => {
            (v6.octets(), (u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0)).to_be_bytes())
        }
        _ => ([0; 16], [0; 16]),
    };
    let value =
        Config { uplink, flow_rate: config.flows_per_second.get(), guests_v4, mask_v4, guests_v6, mask_v6 };
    tables.config.set(0, value, 0).map_err(map_error("put the configuration", "CONFIG"))
}

/// Makes a guest reachable: its permanent neighbour entry and its route, in the guests' table alone.
pub(crate) async fn route_guest(
    inside: &Rtnl,
    link: u32,
    net: &tapgate_model::GuestNet,
) -> Result<(), DatapathError> {
    let gateway = IpAddr::from(Ipv4Addr::from(GATEWAY_V4));
    for address in [Some(IpAddr::V4(net.v4)), net.v6.map(IpAddr::V6)].into_iter().flatten() {
        inside.add_neighbour(link, address, net.mac).await?;
        inside
            .add_route(&Route {
                to: (address, if address.is_ipv4() { 32 } else { 128 }),
                kind: RouteKind::Unicast,
                link: Some(link),
                via: None,
                source: address.is_ipv4().then_some(gateway),
                table: TABLE_GUESTS,
            })
            .await?;
    }
    Ok(())
}

/// Removes everything that [`open`] made.
pub(crate) async fn close(config: &DatapathConfig, host: &Netns) -> Result<(), DatapathError> {
    let outside = Rtnl::connect(host)?;
    // The routes of the host go with the link.
    outside.delete_link(&config.host_link()).await?;
    nft::delete_table(host, &format!("inet {}", config.host_table()))?;
    Netns::delete(&config.namespace())?;
    Ok(())
}

/// Frames from taps need a verdict's mark; refusals are answered here, at once. ICMP's are limited for each guest, since the kernel
/// limits those of all together.
fn egress_table() -> String {
    format!(
        "table inet tapgate {{
}}
delete table inet tapgate
table inet tapgate {{
    set refusals {{
        type ifname
        size 65535
        flags dynamic,timeout
        timeout 10s
    }}
    chain prerouting {{
        type filter hook prerouting priority raw; policy accept;
        iifname \"{TAPS}*\" jump guest
    }}
    chain guest {{
        meta mark {MARK_UPLINK:#x} accept
        meta mark {MARK_PROXY:#x} accept
        meta mark {MARK_REJECT:#x} meta l4proto tcp reject with tcp reset
        meta mark {MARK_REJECT:#x} meta l4proto udp update @refusals {{ iifname limit rate over {REFUSALS}/second burst {REFUSALS} packets }} drop
        meta mark {MARK_REJECT:#x} meta l4proto udp reject with icmpx type port-unreachable
        drop
    }}
}}
"
    )
}

/// In the host's namespace: the guests' addresses are translated, and the uplink reaches no address of the host's own.
///
/// `arrived` is ahead of the host's own translations, which may send its addresses elsewhere. It asks for an address's kind
/// once a connection, since that is a look-up of a route; `input` catches what became the host's own later. A link's name is
/// compared once a chain: that is most of what a rule costs. Only a connection's first packet is counted (it is `confirmed` after
/// that): the count goes through all that the guest has, and every packet of one that nobody answers is `new`.
fn host_table(config: &DatapathConfig) -> String {
    let (table, link) = (config.host_table(), config.host_link());
    let v4 = config.guest_v4;
    let (foreign_v6, masquerade_v6) = match config.guest_v6 {
        Some(range) => (
            format!("ip6 saddr != {range} drop"),
            match config.guest_v6_routed {
                true => String::new(),
                false => format!("ip6 saddr {range} oifname != \"{link}\" masquerade"),
            },
        ),
        None => ("meta nfproto ipv6 drop".to_owned(), String::new()),
    };
    let elsewhere = match &config.uplink {
        Some(uplink) => format!("oifname != \"{uplink}\" drop"),
        None => String::new(),
    };
    format!(
        "table inet {table} {{
}}
delete table inet {table}
table inet {table} {{
    set guests_v4 {{
        type ipv4_addr
        size 65535
        flags dynamic
    }}
    set guests_v6 {{
        type ipv6_addr
        size 65535
        flags dynamic
    }}
    chain prerouting {{
        type filter hook prerouting priority mangle; policy accept;
        iifname \"{link}\" jump arrived
    }}
    chain arrived {{
        ip saddr != {v4} drop
        {foreign_v6}
        ct state new fib daddr type {{ local, broadcast, anycast, multicast }} drop
    }}
    chain input {{
        type filter hook input priority raw; policy accept;
        iifname \"{link}\" drop
    }}
    chain forward {{
        type filter hook forward priority filter; policy accept;
        iifname \"{link}\" goto outward
        oifname \"{link}\" goto inward
    }}
    chain outward {{
        ct state invalid drop
        oifname \"{link}\" drop
        {elsewhere}
        ct state new ct status ! confirmed add @guests_v4 {{ ip saddr ct count over {TRACKED} }} drop
        ct state new ct status ! confirmed add @guests_v6 {{ ip6 saddr ct count over {TRACKED} }} drop
    }}
    chain inward {{
        ct state established,related accept
        drop
    }}
    chain postrouting {{
        type nat hook postrouting priority srcnat; policy accept;
        ip saddr {v4} oifname != \"{link}\" masquerade
        {masquerade_v6}
    }}
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forwarded_traffic_leaves_by_the_uplink_that_is_set() {
        let config = |uplink: Option<&str>| DatapathConfig {
            instance: "main".into(),
            pin_root: "/sys/fs/bpf/tapgate".into(),
            guest_v4: "10.214.0.0/16".parse().unwrap(),
            guest_v6: None,
            guest_v6_routed: false,
            uplink: uplink.map(str::to_owned),
            flows_per_second: std::num::NonZeroU32::MIN,
        };
        let rule = "oifname != \"eth0\" drop";
        assert!(host_table(&config(Some("eth0"))).contains(rule));
        assert!(!host_table(&config(None)).contains("oifname != \"eth0\""));
    }
}
