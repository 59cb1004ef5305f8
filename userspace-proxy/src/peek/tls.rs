//! A ClientHello, however it is split over records and segments: name and protocols offered, by rustls' own parser.
//!
//! Must never answer before the whole hello is there, and never consume: the bytes are replayed upstream.

use rustls::server::Acceptor;
use std::io;
use tapgate_model::{HostName, host::HostError};

/// The content type of a TLS record that carries handshake messages.
pub(crate) const HANDSHAKE: u8 = 22;

/// Whether this is, or begins, a record that some servers pass over before the hello: an alert, or a change of ciphers. No client begins
/// so; the name in the hello behind it would go by unread. Of every version, since none is agreed on yet.
pub(crate) fn before_hello(bytes: &[u8]) -> bool {
    [[21, 3, 0, 0, 2], [20, 3, 0, 0, 1]].iter().any(|record| {
        bytes
            .iter()
            .zip(record)
            .enumerate()
            .all(|(at, (byte, of_record))| at == 2 && *byte <= 4 || byte == of_record)
    })
}

/// What a hello says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hello {
    /// The name in SNI: none, one, or one that no host has.
    pub name: Option<Result<HostName, HostError>>,
    /// Whether HTTP/2 is offered by ALPN.
    pub http2: bool,
    /// Whether HTTP/2 alone is offered: whoever offers it cannot be answered in anything else.
    pub http2_only: bool,
    /// Whether HTTP could be spoken: ALPN offers a version of it, or offers nothing.
    pub http: bool,
    /// Whether ALPN is there at all.
    pub alpn_offered: bool,
    /// What ALPN offers, in its order, where none of it is HTTP.
    pub protocols: Vec<Vec<u8>>,
}

/// Why a hello is none.
#[derive(Debug, thiserror::Error)]
#[error("the TLS ClientHello does not parse: {0}")]
pub struct BadHello(String);

/// Reads a hello as its bytes come in.
pub struct HelloReader {
    acceptor: Option<Acceptor>,
    seen: usize,
}

impl Default for HelloReader {
    fn default() -> Self {
        Self { acceptor: Some(Acceptor::default()), seen: 0 }
    }
}

impl HelloReader {
    /// Looks at all bytes so far; those seen before are not looked at again.
    pub fn advance(&mut self, all: &[u8]) -> Result<Option<Hello>, BadHello> {
        let Some(mut acceptor) = self.acceptor.take() else {
            return Err(BadHello("already read".into()));
        };
        let mut new = all.get(self.seen..).unwrap_or_default();
        loop {
            if !new.is_empty() {
                let before = new.len();
                acceptor
                    .read_tls(&mut new as &mut dyn io::Read)
                    .map_err(|error| BadHello(error.to_string()))?;
                self.seen += before - new.len();
            }
            match acceptor.accept() {
                Ok(Some(accepted)) => return Ok(Some(describe(&accepted.client_hello()))),
                Ok(None) if new.is_empty() => break,
                Ok(None) => {}
                Err((error, _alert)) => return Err(BadHello(error.to_string())),
            }
        }
        self.acceptor = Some(acceptor);
        Ok(None)
    }
}

fn describe(hello: &rustls::server::ClientHello<'_>) -> Hello {
    let offered: Option<Vec<&[u8]>> = hello.alpn().map(Iterator::collect);
    let offers = |protocol: &[u8]| offered.as_ref().is_some_and(|all| all.contains(&protocol));
    let http2 = offers(b"h2");
    let http1 = offers(b"http/1.1") || offers(b"http/1.0");
    let others = offered.as_ref().filter(|_| !http2 && !http1);
    Hello {
        protocols: others.map_or(Vec::new(), |all| all.iter().map(|word| word.to_vec()).collect()),
        name: hello.server_name().map(|name| HostName::parse_wire(name.as_bytes())),
        http2,
        http2_only: http2 && !http1,
        alpn_offered: offered.is_some(),
        http: http2 || http1 || offered.is_none(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    fn hello(name: &str, alpn: &[&[u8]]) -> Vec<u8> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|p| p.to_vec()).collect();
        let name = name.to_owned().try_into().unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut bytes).unwrap();
        }
        bytes
    }

    /// The same handshake message over records of at most `size` octets.
    fn in_records(hello: &[u8], size: usize) -> Vec<u8> {
        let (mut message, mut rest) = (Vec::new(), hello);
        while let [_, _, _, high, low, after @ ..] = rest {
            let (part, next) = after.split_at(usize::from(u16::from_be_bytes([*high, *low])));
            message.extend(part);
            rest = next;
        }
        message.chunks(size).fold(Vec::new(), |mut all, part| {
            all.extend([HANDSHAKE, 3, 1]);
            all.extend(u16::try_from(part.len()).unwrap().to_be_bytes());
            all.extend(part);
            all
        })
    }

    #[test]
    fn a_hello_is_read_whole_or_not_at_all() {
        let bytes = hello("API.Example.com", &[b"h2", b"http/1.1"]);
        let mut reader = HelloReader::default();
        for end in 0..bytes.len() {
            assert_eq!(reader.advance(&bytes[..end]).unwrap(), None, "{end} of {}", bytes.len());
        }
        let read = reader.advance(&bytes).unwrap().unwrap();
        assert_eq!(read.name, Some("api.example.com".parse()));
        assert!(read.http && read.http2);
    }

    #[test]
    fn records_of_one_octet_are_put_together() {
        for size in [1, 2, 3, 100] {
            let bytes = in_records(&hello("a.example", &[]), size);
            let read = HelloReader::default().advance(&bytes).unwrap().unwrap();
            assert_eq!(read.name, Some("a.example".parse()), "{size}");
            assert!(read.http && !read.http2);
        }
    }

    #[test]
    fn a_hello_of_more_than_one_full_record_is_read() {
        let long: Vec<Vec<u8>> = (0..90u8).map(|n| vec![n; 250]).collect();
        let alpn: Vec<&[u8]> = long.iter().map(Vec::as_slice).collect();
        let bytes = hello("a.example", &alpn);
        assert!(bytes.len() > 20_000);
        for bytes in [&bytes, &in_records(&bytes, 999)] {
            let mut reader = HelloReader::default();
            assert_eq!(reader.advance(&bytes[..17_000]).unwrap(), None);
            let read = reader.advance(bytes).unwrap().unwrap();
            assert_eq!(read.name, Some("a.example".parse()));
            assert!(!read.http, "it offers other protocols only");
        }
    }

    #[test]
    fn the_outer_name_is_the_name_whatever_is_encrypted() {
        use rustls::{
            client::{EchGreaseConfig, EchMode},
            crypto::{aws_lc_rs::hpke::DH_KEM_X25519_HKDF_SHA256_AES_128, hpke::Hpke as _},
        };
        let suite = DH_KEM_X25519_HKDF_SHA256_AES_128;
        let (key, _) = suite.generate_key_pair().unwrap();
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_ech(EchMode::Grease(EchGreaseConfig::new(suite, key)))
            .unwrap()
            .with_root_certificates(rustls::RootCertStore::empty())
            .with_no_client_auth();
        let name = "outer.example".try_into().unwrap();
        let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        let read = HelloReader::default().advance(&bytes).unwrap().unwrap();
        assert_eq!(read.name, Some("outer.example".parse()));
    }

    #[test]
    fn values_that_mean_nothing_are_skipped() {
        // GREASE (RFC 8701): a cipher suite and an extension that nobody knows.
        let mut bytes = hello("a.example", &[b"h2"]);
        let mut add = |at: usize, more: u16| {
            let old = u16::from_be_bytes([bytes[at], bytes[at + 1]]);
            bytes[at..at + 2].copy_from_slice(&(old + more).to_be_bytes());
            usize::from(old)
        };
        // Lengths: of the record, of the message, of the session id, of the suites, of the compressions, of the extensions.
        add(3, 6);
        add(7, 6);
        let suites = 5 + 4 + 2 + 32 + 1 + 32;
        let compressions = suites + 2 + add(suites, 2);
        add(compressions + 2, 4);
        bytes.splice(suites + 2..suites + 2, [0x0a, 0x0a]);
        bytes.extend([0x1a, 0x1a, 0, 0]);
        let read = HelloReader::default().advance(&bytes).unwrap().unwrap();
        assert_eq!(read.name, Some("a.example".parse()));
        assert!(read.http2);
    }

    #[test]
    fn an_address_is_no_name() {
        let read = HelloReader::default().advance(&hello("192.0.2.1", &[b"imap"])).unwrap().unwrap();
        assert_eq!(read.name, None);
        assert!(!read.http);
    }

    #[test]
    fn rubbish_is_an_error_and_never_a_panic() {
        let good = hello("a.example", &[]);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0xff;
            let _ = HelloReader::default().advance(&bad);
        }
        assert!(HelloReader::default().advance(b"\x16\x03\x01\x00\x04\x02\x00\x00\x00").is_err());
    }
}
