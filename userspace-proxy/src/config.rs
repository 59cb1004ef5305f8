//! What can be set about the proxy: resolvers, trust, patience and bounds. Owns values only, with defaults that suit a host.

use crate::resolver::Resolver;
use rustls_pki_types::CertificateDer;
use std::time::Duration;

/// Settings of a [`crate::Proxy`].
#[derive(Clone, Debug, Default)]
pub struct ProxyConfig {
    /// Name servers to ask; none means the system's (`/etc/resolv.conf`).
    pub resolvers: Vec<Resolver>,
    /// Certificates trusted for upstreams besides the system's roots, such as a company's own CA.
    pub extra_roots: Vec<CertificateDer<'static>>,
    /// How long to wait for what.
    pub timeouts: Timeouts,
}

/// Deadlines.
#[derive(Clone, Copy, Debug)]
pub struct Timeouts {
    /// For the whole first flight: ClientHello or HTTP request head, and for a TLS handshake.
    pub hello: Duration,
    /// How long a guest may be silent before its connection counts as one where the server speaks first.
    pub server_first: Duration,
    /// To resolve a name and connect to one of its addresses.
    pub connect: Duration,
    /// Without a byte in either direction, after which a connection that is spliced, or a request that is under way, is ended;
    /// within twice this time.
    pub idle: Duration,
    /// Between two requests on one HTTP connection; within twice this time over HTTP/2.
    pub keep_alive: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            hello: Duration::from_secs(10),
            server_first: Duration::from_millis(500),
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(3600),
            keep_alive: Duration::from_secs(120),
        }
    }
}

/// Bounds for one VM. A VM that hits one is refused; others notice nothing.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Connections open at one time.
    pub connections: usize,
    /// New connections a second, sustained; a burst of twice as many is let through.
    pub new_per_second: u32,
    /// Octets a second through the proxy, both ways together; none means no bound.
    pub octets_per_second: Option<u64>,
    /// DNS questions a second, sustained, over UDP and TCP; a burst of twice as many is let through.
    pub dns_per_second: u32,
    /// DNS questions being answered, and names looked up to dial them, at one time.
    pub dns_in_flight: usize,
    /// Addresses kept as given to the VM by DNS.
    pub pins: usize,
}

impl Limits {
    /// Sockets towards upstreams at one time: one for each connection, and as many that rest, or are asked for by a
    /// connection that has others already (streams of HTTP/2, one address tried beside another).
    pub(crate) fn upstreams(&self) -> usize {
        self.connections.saturating_mul(2)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 2048,
            new_per_second: 1000,
            octets_per_second: None,
            // Two for each new connection.
            dns_per_second: 2000,
            dns_in_flight: 64,
            pins: 4096,
        }
    }
}
