//! One name server as an operator writes it. Owns the notation only; asks nothing.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};
use tapgate_model::HostName;

/// What DNS-over-HTTPS is asked at if nothing else is written (RFC 8484 §4.1.1's example).
const QUERY_PATH: &str = "/dns-query";

/// A name server: where it is, and how it is spoken to.
///
/// Written `192.0.2.53`, `192.0.2.53:5353` or `[2001:db8::53]:53` for plain DNS (UDP, and TCP for what is long),
/// `tls://192.0.2.53#dns.example` for DNS over TLS (RFC 7858), and `https://192.0.2.53/dns-query#dns.example` for DNS over
/// HTTPS (RFC 8484). The name is what the server's certificate is verified for; the address is not resolved from it, so
/// that no other name server is needed to find this one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resolver {
    /// Address and port.
    pub at: SocketAddr,
    /// How it is spoken to.
    pub by: Transport,
}

/// How a name server is spoken to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Transport {
    /// In clear text.
    Plain,
    /// Over TLS, verified for the name.
    Tls(HostName),
    /// Over HTTP/2 and TLS, verified for the name, at the path.
    Https(HostName, String),
}

/// A name server that cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is no name server: write an address such as 192.0.2.53 or 192.0.2.53:53, tls://192.0.2.53#dns.example, or \
     https://192.0.2.53/dns-query#dns.example"
)]
pub struct BadResolver(String);

fn at(text: &str, port: u16) -> Option<SocketAddr> {
    let address = text.trim_start_matches('[').trim_end_matches(']');
    text.parse().ok().or_else(|| Some(SocketAddr::new(address.parse::<IpAddr>().ok()?, port)))
}

fn parse(text: &str) -> Option<Resolver> {
    if let Some(rest) = text.strip_prefix("tls://") {
        let (address, name) = rest.split_once('#')?;
        return Some(Resolver { at: at(address, 853)?, by: Transport::Tls(name.parse().ok()?) });
    }
    if let Some(rest) = text.strip_prefix("https://") {
        let (rest, name) = rest.split_once('#')?;
        let (address, path) = rest.find('/').map_or((rest, QUERY_PATH), |slash| rest.split_at(slash));
        let plain = path.bytes().all(|b| b.is_ascii_graphic() && !matches!(b, b'?' | b'{' | b'}'));
        let by = Transport::Https(name.parse().ok()?, path.to_owned());
        return plain.then_some(Resolver { at: at(address, 443)?, by });
    }
    Some(Resolver { at: at(text, 53)?, by: Transport::Plain })
}

impl FromStr for Resolver {
    type Err = BadResolver;

    fn from_str(text: &str) -> Result<Self, BadResolver> {
        parse(text).ok_or_else(|| BadResolver(text.to_owned()))
    }
}

impl From<SocketAddr> for Resolver {
    fn from(at: SocketAddr) -> Self {
        Self { at, by: Transport::Plain }
    }
}

impl fmt::Display for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.by {
            Transport::Plain => write!(f, "{}", self.at),
            Transport::Tls(name) => write!(f, "tls://{}#{name}", self.at),
            Transport::Https(name, path) => write!(f, "https://{}{path}#{name}", self.at),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_read_as_written() {
        for (text, canonical) in [
            ("192.0.2.53", "192.0.2.53:53"),
            ("192.0.2.53:5353", "192.0.2.53:5353"),
            ("2001:db8::53", "[2001:db8::53]:53"),
            ("[2001:db8::53]:5353", "[2001:db8::53]:5353"),
            ("tls://192.0.2.53#dns.example", "tls://192.0.2.53:853#dns.example"),
            ("tls://[2001:db8::53]#DNS.example", "tls://[2001:db8::53]:853#dns.example"),
            ("https://192.0.2.53#dns.example", "https://192.0.2.53:443/dns-query#dns.example"),
            ("https://192.0.2.53:8443/q#dns.example", "https://192.0.2.53:8443/q#dns.example"),
        ] {
            assert_eq!(text.parse::<Resolver>().unwrap().to_string(), canonical);
            assert_eq!(canonical.parse::<Resolver>().unwrap().to_string(), canonical);
        }
        for text in [
            "",
            "dns",
            "dns.example",
            "192.0.2.53#x",
            "tls://192.0.2.53",
            "tls://dns.example#dns.example",
            "tls://192.0.2.53#",
            "https://192.0.2.53/a b#dns.example",
            "https://192.0.2.53/dns-query{?dns}#dns.example",
            "quic://192.0.2.53#dns.example",
            "192.0.2.53:99999",
        ] {
            assert!(text.parse::<Resolver>().unwrap_err().to_string().contains("tls://"), "{text}");
        }
    }
}
