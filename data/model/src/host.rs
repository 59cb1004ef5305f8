//! Host names and the patterns that match them: parsed once, compared as bytes ever after.
//!
//! A name is in lower case, IDNA A-label form, without the trailing dot. An address literal is never a name, in
//! none of the spellings that some resolver would accept (WHATWG URL "ends in a number" check).

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Longest name in octets without the trailing dot (RFC 1035 §2.3.4).
const MAX_NAME: usize = 253;
/// Longest label in octets (RFC 1035 §2.3.4).
const MAX_LABEL: usize = 63;

/// Why a text is not a host name or pattern.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// An IP address in any spelling.
    #[error("an address is not a host name; use a cidr rule for addresses")]
    AddressLiteral,
    /// A character, label or length that no host name has.
    #[error(
        "not a valid host name: letters, digits, hyphens and dots, labels of at most 63 characters, 253 in all"
    )]
    Invalid,
    /// A name with something around it, as in a URL.
    #[error("a host is a name alone: leave scheme, port and path away, as in api.example.com")]
    NotAlone,
    /// A wildcard that is neither `*` nor a whole first label.
    #[error("a wildcard is `*` (every name) or the whole first label, as in `*.example.com`")]
    Wildcard,
}

/// A normalised host name.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(Box<str>);

impl HostName {
    /// Reads a name that a person wrote: Unicode is mapped to A-labels (UTS 46).
    pub fn parse(text: &str) -> Result<Self, HostError> {
        if text.is_ascii() {
            return Self::parse_wire(text.as_bytes());
        }
        let ascii = idna::domain_to_ascii_strict(text).map_err(|_| HostError::Invalid)?;
        Self::parse_wire(ascii.as_bytes())
    }

    /// Reads a name off the wire (SNI, `Host`, `:authority`, a DNS question): ASCII only, nothing is mapped but case.
    pub fn parse_wire(bytes: &[u8]) -> Result<Self, HostError> {
        let bytes = bytes.strip_suffix(b".").unwrap_or(bytes);
        if bytes.is_empty() || bytes.len() > MAX_NAME {
            return Err(HostError::Invalid);
        }
        if bytes.contains(&b':') || bytes.contains(&b'[') {
            let text = std::str::from_utf8(bytes).map_err(|_| HostError::Invalid)?;
            let inner = text.trim_start_matches('[').trim_end_matches(']');
            let literal = inner.parse::<std::net::Ipv6Addr>().is_ok();
            return Err(if literal { HostError::AddressLiteral } else { HostError::Invalid });
        }
        for label in bytes.split(|b| *b == b'.') {
            let edges = label.first() != Some(&b'-') && label.last() != Some(&b'-');
            let letters = label.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'-' || *b == b'_');
            if label.is_empty() || label.len() > MAX_LABEL || !edges || !letters {
                return Err(HostError::Invalid);
            }
        }
        let name: String = bytes.iter().map(|b| char::from(b.to_ascii_lowercase())).collect();
        if ends_in_a_number(&name) {
            return Err(HostError::AddressLiteral);
        }
        Ok(Self(name.into()))
    }

    /// The name, without trailing dot.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name without its first label, if anything remains.
    pub fn parent(&self) -> Option<&str> {
        self.0.split_once('.').map(|(_, rest)| rest)
    }
}

/// The WHATWG URL standard's check: a host whose last label is a number is an IPv4 address or an error, never a name.
fn ends_in_a_number(name: &str) -> bool {
    let last = name.rsplit('.').next().unwrap_or(name);
    let hex = last.strip_prefix("0x").is_some_and(|h| h.bytes().all(|b| b.is_ascii_hexdigit()));
    hex || last.bytes().all(|b| b.is_ascii_digit())
}

/// An exact name, `*.name` (exactly one more label), or `*` (every name).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum HostPattern {
    /// `*`
    Any,
    /// One name.
    Exact(HostName),
    /// `*.` and this name.
    Subdomain(HostName),
}

impl HostPattern {
    /// Whether the pattern covers the name.
    pub fn matches(&self, name: &HostName) -> bool {
        match self {
            Self::Any => true,
            Self::Exact(own) => own == name,
            Self::Subdomain(own) => name.parent() == Some(own.as_str()),
        }
    }

    /// Whether it names hosts, rather than being `*`.
    pub fn is_explicit(&self) -> bool {
        !matches!(self, Self::Any)
    }
}

impl FromStr for HostPattern {
    type Err = HostError;
    fn from_str(text: &str) -> Result<Self, HostError> {
        if text == "*" {
            return Ok(Self::Any);
        }
        let (_, bare) = text.split_once("://").unwrap_or(("", text));
        let (bare, path) = bare.split_once('/').map_or((bare, false), |(bare, _)| (bare, true));
        let port =
            bare.rsplit_once(':').filter(|(name, port)| !name.contains(':') && port.parse::<u16>().is_ok());
        if path || bare.len() < text.len() || port.is_some() {
            return Err(HostError::NotAlone);
        }
        let (wild, rest) = match text.strip_prefix("*.") {
            Some(rest) => (true, rest),
            None => (false, text),
        };
        if rest.contains('*') {
            return Err(HostError::Wildcard);
        }
        let name = HostName::parse(rest)?;
        Ok(if wild { Self::Subdomain(name) } else { Self::Exact(name) })
    }
}

/// Lets a map keyed by names be asked with a plain string that is already normalised.
impl std::borrow::Borrow<str> for HostName {
    fn borrow(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("*"),
            Self::Exact(name) => name.fmt(f),
            Self::Subdomain(name) => write!(f, "*.{name}"),
        }
    }
}

impl fmt::Debug for HostPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for HostName {
    type Err = HostError;
    fn from_str(text: &str) -> Result<Self, HostError> {
        Self::parse(text)
    }
}

impl TryFrom<String> for HostName {
    type Error = HostError;
    fn try_from(text: String) -> Result<Self, HostError> {
        Self::parse(&text)
    }
}

impl TryFrom<String> for HostPattern {
    type Error = HostError;
    fn try_from(text: String) -> Result<Self, HostError> {
        text.parse()
    }
}

impl From<HostName> for String {
    fn from(name: HostName) -> String {
        name.0.into()
    }
}

impl From<HostPattern> for String {
    fn from(pattern: HostPattern) -> String {
        pattern.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn name(text: &str) -> HostName {
        HostName::parse(text).unwrap()
    }

    #[test]
    fn names_are_normalised() {
        assert_eq!(name("API.GitHub.COM.").as_str(), "api.github.com");
        assert_eq!(name("b\u{fc}cher.example").as_str(), "xn--bcher-kva.example");
        assert_eq!(name("_acme.example.com").as_str(), "_acme.example.com");
        assert_eq!(name("localhost").as_str(), "localhost");
    }

    #[test]
    fn address_literals_of_every_spelling_are_not_names() {
        for text in [
            "127.0.0.1",
            "2130706433",
            "0x7f000001",
            "0x7f.1",
            "0177.0.0.1",
            "127.1",
            "[::1]",
            "::1",
            "1.2.3.4.",
            "a.1",
            "1.2.3.0x",
            "\u{ff11}\u{ff12}\u{ff17}.0.0.1",
        ] {
            assert!(HostName::parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rubbish_is_no_name() {
        let long = format!("{}.example", "a".repeat(64));
        let longer = "a.".repeat(127) + "example";
        for text in [
            "",
            ".",
            "..",
            "a..b",
            ".a",
            "-a.b",
            "a-.b",
            "a b",
            "user@host",
            "host:80",
            "a/b",
            "a\r\nb",
            "a\0b",
            "*",
            "a%2eb",
            &long,
            &longer,
        ] {
            assert!(HostName::parse(text).is_err(), "{text:?}");
        }
        assert!(HostName::parse_wire("b\u{fc}cher".as_bytes()).is_err());
        assert!(HostName::parse_wire("a\u{3002}b".as_bytes()).is_err());
    }

    #[test]
    fn a_wildcard_is_exactly_one_label() {
        let pattern: HostPattern = "*.example.com".parse().unwrap();
        assert!(pattern.matches(&name("a.example.com")));
        assert!(!pattern.matches(&name("example.com")));
        assert!(!pattern.matches(&name("a.b.example.com")));
        assert!(!pattern.matches(&name("aexample.com")));
        assert!("*".parse::<HostPattern>().unwrap().matches(&name("x.y.z")));
        for text in ["**", "*a.com", "a.*.com", "*.*.com", "*.", "", "*.1.2.3.4"] {
            assert!(text.parse::<HostPattern>().is_err(), "{text:?}");
        }
        for text in
            ["https://a.example", "a.example/", "a.example:443", "*.a.example:80", "https://a.example:1/b"]
        {
            assert_eq!(text.parse::<HostPattern>(), Err(HostError::NotAlone), "{text}");
        }
        assert_eq!("2001:db8::1".parse::<HostPattern>(), Err(HostError::AddressLiteral));
    }
}
