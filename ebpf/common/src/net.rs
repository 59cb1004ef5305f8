//! The fixed points of the egress namespace: gateway addresses, service addresses, marks, tables.
//!
//! Every guest sees the same gateway; nothing here depends on a VM or on configuration.

/// The gateway that every guest routes through, on the egress namespace's loopback device (IPv4).
pub const GATEWAY_V4: [u8; 4] = [169, 254, 77, 1];
/// The gateway that every guest routes through (IPv6, link-local, on each tap).
pub const GATEWAY_V6: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];
/// The MAC address of the host's side of every tap (locally administered, unicast).
pub const GATEWAY_MAC: [u8; 6] = [0x02, 0x74, 0x67, 0x00, 0x00, 0x01];
/// The guest service (metadata, readiness, agent reports): this address, TCP port 80.
pub const GUEST_SERVICE_V4: [u8; 4] = [169, 254, 169, 254];
/// The guest service's TCP port.
pub const GUEST_SERVICE_PORT: u16 = 80;
/// DNS, UDP and TCP, is answered by the gateway whatever address the guest asked.
pub const DNS_PORT: u16 = 53;

/// `skb->mark` of a frame for the proxy's transparent listeners (rule → `TABLE_PROXY`, local).
pub const MARK_PROXY: u32 = 0x7467_0001;
/// `skb->mark` of a frame that may leave by the uplink (rule → `TABLE_UPLINK`).
pub const MARK_UPLINK: u32 = 0x7467_0002;
/// `skb->mark` of a frame that is refused with a TCP reset or an ICMP port unreachable.
pub const MARK_REJECT: u32 = 0x7467_0003;

/// Routing table that delivers everything locally, found by [`MARK_PROXY`] alone.
pub const TABLE_PROXY: u32 = 7701;
/// Routing table with the only way out, found by [`MARK_UPLINK`] alone.
pub const TABLE_UPLINK: u32 = 7702;
/// Routing table with the routes to guests, found by what comes from the uplink or the daemon itself.
pub const TABLE_GUESTS: u32 = 7703;

/// The transparent listeners' ports inside the egress namespace.
pub mod port {
    /// TCP of guests that is not for a gateway service.
    pub const TCP: u16 = 7710;
    /// DNS over UDP: the port that guests ask, for a datagram's answer must come from there.
    pub const DNS_UDP: u16 = super::DNS_PORT;
    /// DNS over TCP.
    pub const DNS_TCP: u16 = 7712;
    /// The guest service.
    pub const SERVICE: u16 = 7713;
}
