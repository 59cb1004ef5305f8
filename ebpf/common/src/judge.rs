//! The decision table: what becomes of a frame, and why. Pure; the programs carry the verdict out.
//!
//! The rows are judged in the order of the table and the first that fits decides. Must never let a frame out that no
//! row lets out: whatever is not recognised is dropped.

use crate::{
    Reason,
    maps::{Listener, VM_IPV6, VM_SECRETS, VM_WARN, Vm, mapped},
    net::{DNS_PORT, GATEWAY_MAC, GATEWAY_V4, GATEWAY_V6, GUEST_SERVICE_PORT, GUEST_SERVICE_V4},
    packet::{self, ETHERNET, Ethertype, Header, ICMP, ICMP6, IPV6, Packet, TCP, UDP},
    range::{Class, classify_v4, classify_v6},
};

/// What becomes of a frame from a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// To the gateway's own stack: ARP, neighbour discovery, ping.
    Gateway(Reason),
    /// To the gateway's own stack, if it belongs to a connection that the daemon began; refused otherwise.
    Answer,
    /// To a listener of the proxy.
    Proxy(Listener, Reason),
    /// Out by the uplink.
    Uplink(Reason),
    /// Out by the uplink though no rule allows it.
    Tolerate(Reason),
    /// Dropped without a word.
    Drop(Reason),
    /// Refused with a TCP reset or an ICMP port unreachable.
    Refuse(Reason),
}

/// What the judge looks up.
pub trait Tables {
    /// Whether the address is one of the host's own.
    fn is_host(&self, address: &[u8; 16]) -> bool;
    /// Whether the address lies in a range that guests' addresses come from.
    fn is_guest(&self, address: &[u8; 16], v6: bool) -> bool;
    /// Whether a `cidr` rule of one of these groups covers the address.
    fn has_rule(&self, rules: &[u32; 2], v6: bool, address: &[u8; 16]) -> bool;
}

/// The first row and the frames that are not IP: who sent it and what it is. `Err` is the verdict already.
#[inline(always)]
pub fn read(packet: &(impl Packet + ?Sized), vm: &Vm, header: &mut Header) -> Result<(), Verdict> {
    let frame = packet::ethernet(packet).map_err(Verdict::Drop)?;
    if frame.source != vm.mac_octets() {
        return Err(Verdict::Drop(Reason::Spoofed));
    }
    match frame.kind {
        Ethertype::Vlan => return Err(Verdict::Drop(Reason::Vlan)),
        Ethertype::Other => return Err(Verdict::Drop(Reason::Ethertype)),
        Ethertype::Arp => return Err(arp(packet, vm)),
        Ethertype::V4 => packet::ipv4(packet, header).map_err(Verdict::Drop)?,
        Ethertype::V6 if vm.flags & VM_IPV6 == 0 => return Err(Verdict::Drop(Reason::Ipv6)),
        Ethertype::V6 => packet::ipv6(packet, header).map_err(Verdict::Drop)?,
    }
    let neighbour = header.v6 && header.protocol == ICMP6 && matches!(header.icmp, 130..=137 | 141..=143);
    let own = vm.own(header.v6);
    if header.source != own && !(neighbour && header.source == link_local(&vm.mac_octets())) {
        return Err(Verdict::Drop(Reason::Spoofed));
    }
    if neighbour {
        return Err(discovery(packet, header, vm));
    }
    if frame.destination != GATEWAY_MAC {
        return Err(Verdict::Drop(astray(&frame.destination)));
    }
    Ok(())
}

/// Why a frame to this MAC address, not the gateway's, goes nowhere.
#[inline(always)]
fn astray(destination: &[u8; 6]) -> Reason {
    match destination {
        [0xff, 0xff, 0xff, 0xff, 0xff, 0xff] => Reason::Broadcast,
        [first, ..] if first & 1 == 1 => Reason::Multicast,
        _ => Reason::OtherVm,
    }
}

/// The link-local address that a guest makes of its MAC address (RFC 4291, appendix A): its kernel asks for the gateway
/// from it. No other is let through, so that a guest leaves one neighbour entry behind and not thousands.
#[inline(always)]
const fn link_local(mac: &[u8; 6]) -> [u8; 16] {
    let [a, b, c, d, e, f] = *mac;
    [0xfe, 0x80, 0, 0, 0, 0, 0, 0, a ^ 2, b, c, 0xff, 0xfe, d, e, f]
}

/// ARP: the guest's plain question for the gateway, and nothing else.
#[inline(always)]
fn arp(packet: &(impl Packet + ?Sized), vm: &Vm) -> Verdict {
    let Some(h) = packet.read::<28>(ETHERNET) else { return Verdict::Drop(Reason::Malformed) };
    let [h0, h1, h2, h3, h4, h5, h6, h7, s0, s1, s2, s3, s4, s5, p0, p1, p2, p3, ..] = h;
    // Ethernet, IPv4, their lengths, a question.
    if [h0, h1, h2, h3, h4, h5, h6, h7] != [0, 1, 8, 0, 6, 4, 0, 1] {
        return Verdict::Drop(Reason::Neighbour);
    }
    if [s0, s1, s2, s3, s4, s5] != vm.mac_octets() || [p0, p1, p2, p3] != vm.v4.to_ne_bytes() {
        return Verdict::Drop(Reason::Spoofed);
    }
    if [h[24], h[25], h[26], h[27]] != GATEWAY_V4 {
        return Verdict::Drop(Reason::Neighbour);
    }
    Verdict::Gateway(Reason::Service)
}

/// Neighbour discovery: the guest's question for the gateway and its answers to the gateway's questions. Router
/// solicitations and advertisements, redirects and group reports go nowhere.
#[inline(always)]
fn discovery(packet: &(impl Packet + ?Sized), header: &Header, vm: &Vm) -> Verdict {
    let (Some(hops), Some(body)) = (packet.read::<1>(ETHERNET + 7), packet.read::<24>(ETHERNET + IPV6))
    else {
        return Verdict::Drop(Reason::Neighbour);
    };
    if hops != [255] || header.icmp != 135 {
        return Verdict::Drop(Reason::Neighbour);
    }
    let mut target = [0; 16];
    target.copy_from_slice(&body[8..24]);
    // The option with the sender's link-layer address must say the truth: it becomes a neighbour entry.
    let option = packet.read::<8>(ETHERNET + IPV6 + 24);
    let honest = match option {
        Some([1, 1, mac @ ..]) => mac == vm.mac_octets(),
        Some(_) => false,
        None => packet.length() <= ETHERNET + IPV6 + 24,
    };
    if target != GATEWAY_V6 || !honest {
        return Verdict::Drop(Reason::Neighbour);
    }
    Verdict::Gateway(Reason::Service)
}

/// The second row: what the gateway itself serves, whatever the rules are.
#[inline(always)]
pub fn service(header: &Header) -> Option<Verdict> {
    let gateway = is_gateway(header);
    match header.protocol {
        TCP | UDP if header.port == DNS_PORT && dns_may_go_to(header) => Some(if header.protocol == TCP {
            Verdict::Proxy(Listener::DnsTcp, Reason::Service)
        } else {
            Verdict::Proxy(Listener::DnsUdp, Reason::Service)
        }),
        TCP if header.port == GUEST_SERVICE_PORT && header.destination == mapped(GUEST_SERVICE_V4) => {
            Some(Verdict::Proxy(Listener::Service, Reason::Service))
        }
        TCP if gateway && !header.opens() => Some(Verdict::Answer),
        ICMP | ICMP6 if gateway && header.pings() => Some(Verdict::Gateway(Reason::Service)),
        _ if gateway => Some(refuse(header, Reason::HostAddress)),
        _ => None,
    }
}

/// DNS is answered whatever address the guest asked, unless the stack could not answer from it.
#[inline(always)]
fn dns_may_go_to(header: &Header) -> bool {
    use Reason::{Broadcast, Loopback, Multicast, Reserved};
    !matches!(class(header), Class::Denied(Loopback | Multicast | Broadcast | Reserved))
}

#[inline(always)]
fn is_gateway(header: &Header) -> bool {
    header.destination == if header.v6 { GATEWAY_V6 } else { mapped(GATEWAY_V4) }
}

#[inline(always)]
fn class(header: &Header) -> Class {
    let a = &header.destination;
    if header.v6 { classify_v6(*a) } else { classify_v4([a[12], a[13], a[14], a[15]]) }
}

/// The rows after the gateway's services.
#[inline(always)]
pub fn judge(header: &Header, vm: &Vm, tables: &impl Tables) -> Verdict {
    let class = class(header);
    if let Class::Denied(reason) = class {
        return refuse(header, reason);
    }
    if tables.is_guest(&header.destination, header.v6) {
        return refuse(header, Reason::OtherVm);
    }
    if tables.is_host(&header.destination) {
        return refuse(header, Reason::HostAddress);
    }
    let icmp = header.protocol == if header.v6 { ICMP6 } else { ICMP };
    if header.protocol != TCP && header.protocol != UDP && !icmp {
        return Verdict::Drop(Reason::Protocol);
    }
    if icmp && !header.pings() && !reports(header) {
        return Verdict::Drop(Reason::Protocol);
    }
    let web = matches!(header.port, 80 | 443) && vm.flags & VM_SECRETS != 0;
    if tables.has_rule(&vm.rules, header.v6, &header.destination) {
        return match header.protocol {
            TCP if web => Verdict::Proxy(Listener::Tcp, Reason::Cidr),
            // QUIC would carry past the proxy what a secret could apply to.
            UDP if web && header.port == 443 => Verdict::Refuse(Reason::Quic),
            _ => Verdict::Uplink(Reason::Cidr),
        };
    }
    if let Class::Private = class {
        return refuse(header, Reason::Private);
    }
    match header.protocol {
        TCP => Verdict::Proxy(Listener::Tcp, Reason::NoRule),
        UDP if header.port == 443 => Verdict::Refuse(Reason::Quic),
        _ if vm.flags & VM_WARN != 0 && (header.protocol == UDP || header.pings()) => {
            Verdict::Tolerate(Reason::NoRule)
        }
        _ => refuse(header, Reason::NoRule),
    }
}

/// Whether an ICMP message reports a failure: what path MTU discovery and traceroute live on.
#[inline(always)]
fn reports(header: &Header) -> bool {
    if header.v6 { matches!(header.icmp, 1..=4) } else { matches!(header.icmp, 3 | 11 | 12) }
}

/// TCP and UDP learn at once that they are refused; anything else hears nothing.
#[inline(always)]
fn refuse(header: &Header, reason: Reason) -> Verdict {
    let silent = matches!(reason, Reason::Broadcast | Reason::Multicast | Reason::Loopback);
    if (header.protocol == TCP || header.protocol == UDP) && !silent {
        Verdict::Refuse(reason)
    } else {
        Verdict::Drop(reason)
    }
}
