//! The fixed points of the world: who lives where, under which name. Names are reserved for examples (RFC 2606),
//! addresses for documentation (RFC 5737, RFC 3849).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// One host of the world's internet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Site {
    /// Its first name, and the name of its packet counter (dots as underscores).
    pub name: &'static str,
    /// Its address.
    pub v4: Ipv4Addr,
    /// Its address.
    pub v6: Ipv6Addr,
}

const fn site(name: &'static str, v4: [u8; 4], last: u16) -> Site {
    let [a, b, c, d] = v4;
    Site { name, v4: Ipv4Addr::new(a, b, c, d), v6: Ipv6Addr::new(0x2001, 0xdb8, 0x113, 0, 0, 0, 0, last) }
}

/// The world's name server.
pub const DNS: Site = site("ns.example.net", [203, 0, 113, 53], 0x53);
/// Answers HTTP and HTTPS.
pub const API: Site = site("api.example.com", [203, 0, 113, 10], 0x10);
/// Answers HTTP and HTTPS; `/echo` sends back what it was sent.
pub const ECHO: Site = site("echo.example.com", [203, 0, 113, 11], 0x11);
/// Serves git over HTTPS to whoever knows the token.
pub const GIT: Site = site("git.example.com", [203, 0, 113, 12], 0x12);
/// An ordinary site that nobody made a rule for.
pub const OTHER: Site = site("www.example.org", [203, 0, 113, 13], 0x13);
/// Its certificate is signed by an authority that nobody trusts.
pub const UNTRUSTED: Site = site("untrusted.example.com", [203, 0, 113, 14], 0x14);
/// Plain TCP and UDP: echo on port 7, an endless download on port 9000; no TLS.
pub const FILES: Site = site("files.example.net", [198, 51, 100, 20], 0x20);
/// The attacker's host: takes whatever comes.
pub const EVIL: Site = site("evil.example.net", [198, 51, 100, 66], 0x66);

/// All of them.
pub const ALL: [Site; 8] = [DNS, API, ECHO, GIT, OTHER, UNTRUSTED, FILES, EVIL];
/// Those that speak HTTP and HTTPS.
pub const WEB: [Site; 6] = [API, ECHO, GIT, OTHER, UNTRUSTED, EVIL];
/// Those of an attacker: every octet that they get is written down.
pub const HOSTILE: [Site; 2] = [UNTRUSTED, EVIL];
/// Where [`EVIL`] listens for TLS and HTTP besides the usual ports: DNS over TLS, SOCKS, proxies.
pub const EVIL_PORTS: [u16; 5] = [853, 1080, 3128, 8080, 8443];

/// A name whose first answer is [`ECHO`]'s address, and every later one an address inside.
pub const REBIND: &str = "rebind.example.net";
/// What [`REBIND`] answers in turn after the first time.
pub const REBIND_LATER: [Ipv4Addr; 2] = [Ipv4Addr::LOCALHOST, Ipv4Addr::new(169, 254, 169, 254)];
/// Names that resolve to addresses which no name may open.
pub const INWARD: [(&str, Ipv4Addr); 3] = [
    ("metadata.example.net", Ipv4Addr::new(169, 254, 169, 254)),
    ("private.example.net", Ipv4Addr::new(10, 0, 0, 1)),
    ("self.example.net", HOST_V4),
];

/// `v4-A-B-C-D` and `v6-` with 32 hexadecimal digits below it are names that resolve to that address, for no time at all.
pub const INWARD_ZONE: &str = "inward.example.net";

/// The name below [`INWARD_ZONE`] that resolves to the address.
pub fn inward(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("v4-{}.{INWARD_ZONE}", v4.to_string().replace('.', "-")),
        IpAddr::V6(v6) => format!("v6-{:032x}.{INWARD_ZONE}", v6.to_bits()),
    }
}

/// The address that such a name resolves to.
pub fn of_inward(name: &str) -> Option<IpAddr> {
    let label = name.strip_suffix(INWARD_ZONE)?.strip_suffix('.')?;
    if let Some(v4) = label.strip_prefix("v4-") {
        return v4.replace('-', ".").parse().ok().map(IpAddr::V4);
    }
    let bits = u128::from_str_radix(label.strip_prefix("v6-")?, 16).ok()?;
    Some(IpAddr::V6(Ipv6Addr::from_bits(bits)))
}

/// The daemon's host.
pub const HOST_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// The daemon's host.
pub const HOST_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 0x10);
/// The internet's router towards the host; people reach guests from here by SSH.
pub const ROUTER_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// The internet's router towards the host.
pub const ROUTER_V6: Ipv6Addr = Ipv6Addr::new(0x2001, 0xdb8, 0, 1, 0, 0, 0, 1);

/// Echo, TCP and UDP.
pub const ECHO_PORT: u16 = 7;
/// A plain HTTP server whose `/endless` never ends.
pub const DOWNLOAD_PORT: u16 = 9000;

impl Site {
    /// Both addresses.
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// The name of its packet counter.
    pub fn counter(&self) -> String {
        self.name.replace('.', "_")
    }
}
