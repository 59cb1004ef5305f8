//! `Host`, `:authority` and the authority of a URL: a name and perhaps a port, nothing else.

use std::net::{Ipv4Addr, Ipv6Addr};
use tapgate_model::{HostName, Reason, host::HostError};

/// Who a request is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Authority {
    /// A name, or an address literal (which is not a name).
    pub host: Named,
    /// The port, if one is written.
    pub port: Option<u16>,
}

/// A host as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Named {
    /// By name.
    Name(HostName),
    /// By address, in the one spelling that is an address everywhere.
    Address(std::net::IpAddr),
}

impl Authority {
    /// Reads `name`, `name:port`, `192.0.2.1:port`, `[2001:db8::1]:port`. No user information, no escapes, no empty port.
    pub fn parse(bytes: &[u8]) -> Result<Self, Reason> {
        let text = std::str::from_utf8(bytes).map_err(|_| Reason::BadName)?;
        let (host, port) = match text.rfind(']') {
            Some(end) => {
                let (literal, rest) = text.split_at(end + 1);
                let port = match rest {
                    "" => None,
                    _ => Some(rest.strip_prefix(':').ok_or(Reason::BadName)?),
                };
                (literal, port)
            }
            None => match text.split_once(':') {
                Some((host, port)) => (host, Some(port)),
                None => (text, None),
            },
        };
        let port = port.map(parse_port).transpose()?;
        if let Some(inner) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
            let address = inner.parse::<Ipv6Addr>().map_err(|_| Reason::BadName)?;
            return Ok(Self { host: Named::Address(address.into()), port });
        }
        match HostName::parse_wire(host.as_bytes()) {
            Ok(name) => Ok(Self { host: Named::Name(name), port }),
            Err(HostError::AddressLiteral) => match host.parse::<Ipv4Addr>() {
                Ok(address) => Ok(Self { host: Named::Address(address.into()), port }),
                Err(_) => Err(Reason::AddressLiteral),
            },
            Err(_) => Err(Reason::BadName),
        }
    }

    /// Whether both name the same host, ports aside.
    pub fn same_host(&self, other: &Self) -> bool {
        self.host == other.host
    }
}

fn parse_port(text: &str) -> Result<u16, Reason> {
    if text.is_empty() || text.len() > 5 || !text.bytes().all(|b| b.is_ascii_digit()) {
        return Err(Reason::BadName);
    }
    text.parse().ok().filter(|port| *port != 0).ok_or(Reason::BadName)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_addresses_and_ports() {
        let name = |text: &str| Authority::parse(text.as_bytes()).unwrap();
        assert_eq!(name("A.Example.").host, Named::Name("a.example".parse().unwrap()));
        assert_eq!(name("a.example:8443").port, Some(8443));
        assert_eq!(name("192.0.2.1").host, Named::Address("192.0.2.1".parse().unwrap()));
        assert_eq!(name("[2001:db8::1]:443").host, Named::Address("2001:db8::1".parse().unwrap()));
    }

    #[test]
    fn every_other_form_is_refused() {
        for text in [
            "",
            ":",
            ":80",
            "a:",
            "a:0",
            "a:65536",
            "a:+80",
            "a:80:80",
            "a:8o",
            "u@a",
            "u:p@a",
            "a/b",
            "a,b",
            "a b",
            " a",
            "a\r\n",
            "a\0",
            "a%2eb",
            "a\u{3002}b",
            "a..b",
            "[::1",
            "::1]",
            "[::1]x",
            "[::1]]",
            "[fe80::1%25eth0]",
            "[v1.a]",
            "127.1",
            "0x7f000001",
            "2130706433",
            "0177.0.0.1",
            "1.2.3.4.",
            "a#b",
            "a?b",
            "a\\b",
        ] {
            assert!(Authority::parse(text.as_bytes()).is_err(), "{text:?}");
        }
        assert!(Authority::parse(b"a\xff").is_err());
    }
}
