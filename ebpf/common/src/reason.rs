//! The fixed vocabulary of verdicts: why a frame, a connection, a request or a question was let out or not.
//!
//! One word for each row of the decision table. The discriminants index the per-reason counters of the
//! BPF maps, so they are stable: add at the end, never renumber.

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident = $value:literal => $word:literal,)+) => {
        /// Why something was decided as it was. [`Reason::word`] is what the API, metrics and logs show.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        #[repr(u8)]
        #[non_exhaustive]
        pub enum Reason { $($(#[$doc])* $variant = $value,)+ }

        impl Reason {
            /// Every reason, in the order of its discriminants.
            pub const ALL: &[Reason] = &[$(Reason::$variant,)+];
            /// How many reasons there are: the length of a per-reason counter array.
            pub const COUNT: usize = Self::ALL.len();

            /// The word for people, programs and the audit log.
            pub const fn word(self) -> &'static str {
                match self { $(Reason::$variant => $word,)+ }
            }

            /// The reason with this discriminant.
            pub const fn from_u8(value: u8) -> Option<Self> {
                match value { $($value => Some(Reason::$variant),)+ _ => None }
            }

            /// The reason with this word.
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Reason::$variant),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// A gateway service: ARP/ND for the gateway, DNS, the guest service, ping of the gateway.
    Service = 0 => "service",
    /// The destination lies in a `cidr` rule.
    Cidr = 1 => "cidr",
    /// The name matches a `host` rule.
    Host = 2 => "host",
    /// The address was given to this VM for an allowed name by the gateway's DNS.
    Pin = 3 => "pin",
    /// An answer in a connection that the daemon itself began (SSH to the guest).
    Answer = 4 => "answer",
    /// No rule allows it.
    NoRule = 5 => "no_rule",
    /// Not the VM's own MAC or IP address.
    Spoofed = 6 => "spoofed",
    /// A VLAN tag, in the frame or in the skb's metadata.
    Vlan = 7 => "vlan",
    /// An ethertype that is neither IPv4, IPv6 nor ARP.
    Ethertype = 8 => "ethertype",
    /// IPv4 options.
    IpOptions = 9 => "ip_options",
    /// An IP fragment, of either family.
    Fragment = 10 => "fragment",
    /// An IPv6 extension header (routing, hop-by-hop, destination options, any other).
    Ipv6Extension = 11 => "ipv6_extension",
    /// Too short, inconsistent lengths, or bytes that are not what they claim to be.
    Malformed = 12 => "malformed",
    /// An address of the host itself, or of the gateway outside its services.
    HostAddress = 13 => "host_address",
    /// Another VM's address.
    OtherVm = 14 => "other_vm",
    /// Loopback or the unspecified address.
    Loopback = 15 => "loopback",
    /// Link-local, cloud metadata addresses included.
    LinkLocal = 16 => "link_local",
    /// Multicast.
    Multicast = 17 => "multicast",
    /// Broadcast.
    Broadcast = 18 => "broadcast",
    /// Reserved or otherwise not routable.
    Reserved = 19 => "reserved",
    /// A private range (RFC 1918, CGNAT, ULA) that no `cidr` rule covers.
    Private = 20 => "private",
    /// UDP port 443: refused so that clients fall back to TCP.
    Quic = 21 => "quic",
    /// An IP protocol other than TCP, UDP and ICMP.
    Protocol = 22 => "protocol",
    /// IPv6 where this VM has none.
    Ipv6 = 23 => "ipv6",
    /// ARP or neighbour discovery that is not a plain question for the gateway.
    Neighbour = 24 => "neighbour",
    /// A connection that names no host where a name is needed.
    NoName = 25 => "no_name",
    /// The host is given as an address literal, which is not a name.
    AddressLiteral = 26 => "address_literal",
    /// SNI, `Host`/`:authority` or the request target name different hosts.
    NameMismatch = 27 => "name_mismatch",
    /// A name that is not a valid host name.
    BadName = 28 => "bad_name",
    /// A TLS ClientHello that does not parse, is too long or too slow.
    BadHello = 29 => "bad_hello",
    /// An HTTP request that does not parse or is ambiguous.
    BadRequest = 30 => "bad_request",
    /// The name resolved to addresses in denied or private ranges only.
    Rebinding = 31 => "rebinding",
    /// The name does not resolve.
    Unresolved = 32 => "unresolved",
    /// The upstream could not be reached.
    Unreachable = 33 => "unreachable",
    /// The upstream's certificate does not verify for the name.
    Unverified = 34 => "unverified",
    /// A DNS question of a type, class or form that is not answered.
    DnsQuestion = 35 => "dns_question",
    /// A limit of the VM (connections, rate, size).
    Limit = 36 => "limit",
    /// The rules changed and no longer allow an established connection.
    Revoked = 37 => "revoked",
    /// A tap or an address that belongs to no known VM.
    UnknownVm = 38 => "unknown_vm",
    /// `CONNECT`, `Upgrade` to another protocol, or another way to make a tunnel of the proxy.
    Tunnel = 39 => "tunnel",
    /// A lookup or a hand-over in the datapath failed; the frame is dropped (fail closed).
    Fault = 40 => "fault",
    /// The guest did not accept the certificate under which its TLS was opened.
    Untrusted = 41 => "untrusted",
    /// The daemon was killed while it was under way: what moved and how it would have ended is not known.
    DaemonEnded = 42 => "daemon_ended",
}
