//! Links, addresses, routes, rules and neighbours of one namespace, by rtnetlink.
//!
//! Every addition replaces or accepts what is there already, so that making a namespace and adopting it are one code.

use crate::{Netns, NetnsError, error::errno};
use futures_util::TryStreamExt as _;
use rtnetlink::{
    Handle, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
    packet_route::{
        address::AddressAttribute,
        link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage},
        neighbour::NeighbourState,
        route::{RouteAddress, RouteAttribute, RouteHeader, RouteProtocol, RouteScope, RouteType},
        rule::RuleAction,
    },
};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    os::fd::{AsFd as _, AsRawFd as _},
};

const MAX_LINK_NAME: usize = 15;

/// A netlink connection inside a namespace. Needs a tokio runtime; its task ends when it is dropped.
#[derive(Debug)]
pub struct Rtnl {
    handle: Handle,
    namespace: String,
    task: tokio::task::JoinHandle<()>,
}

/// A pair of virtual Ethernet devices to be made.
#[derive(Debug)]
pub struct Veth<'a> {
    /// The near end's name.
    pub name: &'a str,
    /// The near end's MAC address; `None` lets the kernel choose.
    pub mac: Option<[u8; 6]>,
    /// The far end's name.
    pub peer: &'a str,
    /// The far end's MAC address.
    pub peer_mac: Option<[u8; 6]>,
    /// Where the far end is put.
    pub peer_netns: &'a Netns,
}

/// What a route does with what it matches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// Sends it on.
    Unicast,
    /// Delivers it to this machine.
    Local,
    /// Drops it silently.
    Blackhole,
}

/// A route to be added.
#[derive(Clone, Copy, Debug)]
pub struct Route {
    /// Network and prefix length.
    pub to: (IpAddr, u8),
    /// What it does.
    pub kind: RouteKind,
    /// The device, by index.
    pub link: Option<u32>,
    /// The next hop; taken to be on the link.
    pub via: Option<IpAddr>,
    /// The source address for what starts here.
    pub source: Option<IpAddr>,
    /// The table.
    pub table: u32,
}

/// A routing rule to be added.
#[derive(Clone, Debug)]
pub struct Rule {
    /// IPv6 instead of IPv4.
    pub v6: bool,
    /// Lower comes first.
    pub priority: u32,
    /// The packet mark that it needs.
    pub mark: Option<u32>,
    /// The device that it came in by.
    pub from_link: Option<String>,
    /// The table that it looks up.
    pub table: u32,
}

impl Rtnl {
    /// Opens a connection inside the namespace.
    pub fn connect(netns: &Netns) -> Result<Self, NetnsError> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, handle, _) = netns
            .run(|| {
                let _in_runtime = runtime.enter();
                rtnetlink::new_connection()
            })?
            .map_err(|source| NetnsError::Socket { name: netns.name().to_owned(), source })?;
        Ok(Self { handle, namespace: netns.name().to_owned(), task: tokio::spawn(connection) })
    }

    /// The link's index, if there is one of this name.
    pub async fn find_link(&self, name: &str) -> Result<Option<u32>, NetnsError> {
        Ok(self.get_link(name).await?.map(|link| link.header.index))
    }

    /// Whether there is a link of this name that is set up.
    pub async fn is_up(&self, name: &str) -> Result<bool, NetnsError> {
        Ok(self.get_link(name).await?.is_some_and(|link| link.header.flags.contains(LinkFlags::Up)))
    }

    async fn get_link(&self, name: &str) -> Result<Option<LinkMessage>, NetnsError> {
        check_link_name(name)?;
        match self.handle.link().get().match_name(name).execute().try_next().await {
            Ok(link) => Ok(link),
            Err(error) if errno(&error) == Some(libc::ENODEV) => Ok(None),
            Err(source) => Err(NetnsError::Netlink { what: format!("look up link `{name}`"), source }),
        }
    }

    /// The link's index.
    pub async fn link(&self, name: &str) -> Result<u32, NetnsError> {
        self.find_link(name)
            .await?
            .ok_or_else(|| NetnsError::NoLink { link: name.to_owned(), namespace: self.namespace.clone() })
    }

    /// The names and indexes of every link.
    pub async fn links(&self) -> Result<Vec<(String, u32)>, NetnsError> {
        let mut stream = std::pin::pin!(self.handle.link().get().execute());
        let mut found = Vec::new();
        while let Some(link) = stream.try_next().await.map_err(wrap(|| "list the links".into()))? {
            let name = link.attributes.iter().find_map(|attribute| match attribute {
                LinkAttribute::IfName(name) => Some(name.clone()),
                _ => None,
            });
            found.extend(name.map(|name| (name, link.header.index)));
        }
        Ok(found)
    }

    /// Makes a veth pair, both ends down; answers the near end's index.
    pub async fn add_veth(&self, veth: &Veth<'_>) -> Result<u32, NetnsError> {
        check_link_name(veth.name)?;
        check_link_name(veth.peer)?;
        let mut peer = LinkMessageBuilder::<LinkUnspec>::new()
            .name(veth.peer)
            .setns_by_fd(veth.peer_netns.as_fd().as_raw_fd());
        if let Some(mac) = veth.peer_mac {
            peer = peer.address(mac.to_vec());
        }
        let mut near =
            LinkVeth::new(veth.name, veth.peer).set_info_data(InfoData::Veth(InfoVeth::Peer(peer.build())));
        if let Some(mac) = veth.mac {
            near = near.address(mac.to_vec());
        }
        let what = || format!("make the veth pair `{}`, `{}`", veth.name, veth.peer);
        self.handle.link().add(near.build()).execute().await.map_err(wrap(what))?;
        self.link(veth.name).await
    }

    /// Sets MAC address and MTU.
    pub async fn configure_link(&self, index: u32, mac: Option<[u8; 6]>, mtu: u32) -> Result<(), NetnsError> {
        let mut message = LinkUnspec::new_with_index(index).mtu(mtu);
        if let Some(mac) = mac {
            message = message.address(mac.to_vec());
        }
        let what = || format!("configure link {index}");
        self.handle.link().change(message.build()).execute().await.map_err(wrap(what))
    }

    /// Gives the link another name. It must be down.
    pub async fn rename_link(&self, index: u32, name: &str) -> Result<(), NetnsError> {
        check_link_name(name)?;
        let message = LinkUnspec::new_with_index(index).name(name).build();
        let what = || format!("rename link {index} to `{name}`");
        self.handle.link().change(message).execute().await.map_err(wrap(what))
    }

    /// Sets the link up.
    pub async fn set_up(&self, index: u32) -> Result<(), NetnsError> {
        let message = LinkUnspec::new_with_index(index).up().build();
        let what = || format!("set link {index} up");
        self.handle.link().change(message).execute().await.map_err(wrap(what))
    }

    /// Sets the link down.
    pub async fn set_down(&self, index: u32) -> Result<(), NetnsError> {
        let message = LinkUnspec::new_with_index(index).down().build();
        let what = || format!("set link {index} down");
        self.handle.link().change(message).execute().await.map_err(wrap(what))
    }

    /// Removes the link, if it is there.
    pub async fn delete_link(&self, name: &str) -> Result<(), NetnsError> {
        let Some(index) = self.find_link(name).await? else { return Ok(()) };
        match self.handle.link().del(index).execute().await {
            Err(error) if errno(&error) != Some(libc::ENODEV) => {
                Err(wrap(|| format!("remove link `{name}`"))(error))
            }
            _ => Ok(()),
        }
    }

    /// Gives the link an address. IPv6 addresses are used at once, without duplicate detection; neither family gets a
    /// route to the prefix (a /32 or /128 needs none, and the main table stays empty).
    pub async fn add_address(&self, index: u32, address: IpAddr, prefix: u8) -> Result<(), NetnsError> {
        let mut request = self.handle.address().add(index, address, prefix).replace();
        let flags = libc::IFA_F_NOPREFIXROUTE | if address.is_ipv6() { libc::IFA_F_NODAD } else { 0 };
        request.message_mut().attributes.push(AddressAttribute::Flags(
            rtnetlink::packet_route::address::AddressFlags::from_bits_retain(flags),
        ));
        request.execute().await.map_err(wrap(|| format!("give link {index} the address {address}/{prefix}")))
    }

    /// Adds a route, or replaces the one to the same destination.
    pub async fn add_route(&self, route: &Route) -> Result<(), NetnsError> {
        let what = || format!("add the route to {}/{} in table {}", route.to.0, route.to.1, route.table);
        let kind = match route.kind {
            RouteKind::Unicast => RouteType::Unicast,
            RouteKind::Local => RouteType::Local,
            RouteKind::Blackhole => RouteType::BlackHole,
        };
        let scope = match (route.kind, route.via) {
            (RouteKind::Local, _) => RouteScope::Host,
            (RouteKind::Unicast, None) => RouteScope::Link,
            _ => RouteScope::Universe,
        };
        macro_rules! build {
            ($family:ty, $variant:path) => {{
                let mut builder = RouteMessageBuilder::<$family>::new()
                    .kind(kind)
                    .protocol(RouteProtocol::Static)
                    .scope(scope)
                    .table_id(route.table);
                if let $variant(network) = route.to.0 {
                    builder = builder.destination_prefix(network, route.to.1);
                }
                if let Some(link) = route.link {
                    builder = builder.output_interface(link);
                }
                if let Some($variant(via)) = route.via {
                    builder = builder.gateway(via).onlink();
                }
                if let Some($variant(source)) = route.source {
                    builder = builder.pref_source(source);
                }
                builder.build()
            }};
        }
        let message = match route.to.0 {
            IpAddr::V4(_) => build!(Ipv4Addr, IpAddr::V4),
            IpAddr::V6(_) => build!(Ipv6Addr, IpAddr::V6),
        };
        self.handle.route().add(message).replace().execute().await.map_err(wrap(what))
    }

    /// The main table's routes of one family: network, prefix length, index of the link. Default routes are left out.
    pub async fn routes(&self, v6: bool) -> Result<Vec<(IpAddr, u8, Option<u32>)>, NetnsError> {
        let request = if v6 {
            RouteMessageBuilder::<Ipv6Addr>::new().build()
        } else {
            RouteMessageBuilder::<Ipv4Addr>::new().build()
        };
        let mut stream = std::pin::pin!(self.handle.route().get(request).execute());
        let mut found = Vec::new();
        while let Some(route) = stream.try_next().await.map_err(wrap(|| "list the routes".into()))? {
            if route.header.table != RouteHeader::RT_TABLE_MAIN {
                continue;
            }
            let (mut network, mut link) = (None, None);
            for attribute in &route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(v4)) => network = Some(IpAddr::V4(*v4)),
                    RouteAttribute::Destination(RouteAddress::Inet6(v6)) => network = Some(IpAddr::V6(*v6)),
                    RouteAttribute::Oif(index) => link = Some(*index),
                    _ => {}
                }
            }
            found.extend(network.map(|network| (network, route.header.destination_prefix_length, link)));
        }
        Ok(found)
    }

    /// Adds a rule, unless it is there.
    pub async fn add_rule(&self, rule: &Rule) -> Result<(), NetnsError> {
        let mut request =
            self.handle.rule().add().priority(rule.priority).table_id(rule.table).action(RuleAction::ToTable);
        if let Some(mark) = rule.mark {
            request = request.fw_mark(mark);
        }
        if let Some(link) = &rule.from_link {
            request = request.input_interface(link.clone());
        }
        let done = if rule.v6 { request.v6().execute().await } else { request.v4().execute().await };
        match done {
            Err(error) if errno(&error) != Some(libc::EEXIST) => {
                Err(wrap(|| format!("add the rule for table {}", rule.table))(error))
            }
            _ => Ok(()),
        }
    }

    /// Adds a permanent neighbour entry: nobody is asked, and nobody's answer changes it.
    pub async fn add_neighbour(&self, index: u32, address: IpAddr, mac: [u8; 6]) -> Result<(), NetnsError> {
        self.handle
            .neighbours()
            .add(index, address)
            .link_layer_address(&mac)
            .state(NeighbourState::Permanent)
            .replace()
            .execute()
            .await
            .map_err(wrap(|| format!("set the neighbour {address} on link {index}")))
    }
}

impl Drop for Rtnl {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn wrap(what: impl FnOnce() -> String) -> impl FnOnce(rtnetlink::Error) -> NetnsError {
    move |source| NetnsError::Netlink { what: what(), source }
}

pub(crate) fn check_link_name(name: &str) -> Result<(), NetnsError> {
    let ok = (1..=MAX_LINK_NAME).contains(&name.len())
        && name != "."
        && name != ".."
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.".contains(&b));
    if ok { Ok(()) } else { Err(NetnsError::Name(name.to_owned(), MAX_LINK_NAME)) }
}
