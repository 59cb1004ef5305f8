//! Clients that write what they are told to, octet by octet, and return all that came back. To be run in the guest's namespace.

use rustls::{
    ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned,
    client::{EchGreaseConfig, EchMode, danger},
    crypto::{CryptoProvider, aws_lc_rs},
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use std::{
    io::{self, Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::Arc,
    thread,
    time::Duration,
};

/// Longer than the daemon lets a first flight take.
const PATIENCE: Duration = Duration::from_secs(20);
/// A frame that the kernel drops is answered by nothing.
const CONNECT: Duration = Duration::from_secs(3);

pub fn connect(to: impl Into<SocketAddr>) -> io::Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&to.into(), CONNECT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    Ok(stream)
}

/// All that comes until the end, however it comes.
pub fn drain(stream: &mut impl Read) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = stream.read_to_end(&mut all);
    all
}

/// Clear text: writes, says that it is done, reads to the end.
pub fn tcp(to: impl Into<SocketAddr>, bytes: &[u8]) -> Vec<u8> {
    let Ok(mut stream) = connect(to) else { return Vec::new() };
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    drain(&mut stream)
}

/// Clear text, in pieces of this size with a rest between them.
pub fn dribble(to: impl Into<SocketAddr>, bytes: &[u8], size: usize) -> Vec<u8> {
    let Ok(mut stream) = connect(to) else { return Vec::new() };
    for piece in bytes.chunks(size) {
        if stream.write_all(piece).is_err() {
            break;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let _ = stream.shutdown(Shutdown::Write);
    drain(&mut stream)
}

/// An attacker trusts every certificate.
#[derive(Debug)]
struct Whatever(Arc<CryptoProvider>);

impl danger::ServerCertVerifier for Whatever {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<danger::ServerCertVerified, rustls::Error> {
        Ok(danger::ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<danger::HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// What a client offers in its hello.
#[derive(Clone, Default)]
pub struct Offer {
    pub alpn: Vec<Vec<u8>>,
    /// A post-quantum key share, and nothing else.
    pub post_quantum: bool,
    /// An encrypted inner hello beside the outer name.
    pub ech: bool,
}

impl Offer {
    pub fn alpn(protocols: &[&str]) -> Self {
        Self { alpn: protocols.iter().map(|name| name.as_bytes().to_vec()).collect(), ..Self::default() }
    }

    pub fn config(&self) -> Arc<ClientConfig> {
        let mut provider = aws_lc_rs::default_provider();
        if self.post_quantum {
            provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
        }
        let provider = Arc::new(provider);
        let builder = ClientConfig::builder_with_provider(provider.clone());
        let builder = if self.ech {
            let suite = aws_lc_rs::hpke::ALL_SUPPORTED_SUITES[0];
            let (public, _) = suite.generate_key_pair().unwrap();
            builder.with_ech(EchMode::Grease(EchGreaseConfig::new(suite, public))).unwrap()
        } else {
            builder.with_safe_default_protocol_versions().unwrap()
        };
        let builder = builder.dangerous().with_custom_certificate_verifier(Arc::new(Whatever(provider)));
        let mut config = builder.with_no_client_auth();
        config.alpn_protocols.clone_from(&self.alpn);
        Arc::new(config)
    }

    /// TLS over the stream, once the handshake is done. An address as a name leaves SNI out.
    pub fn tls<S: Read + Write>(
        &self,
        name: &str,
        stream: S,
    ) -> io::Result<StreamOwned<ClientConnection, S>> {
        let name = ServerName::try_from(name.to_owned()).unwrap();
        let client = ClientConnection::new(self.config(), name).map_err(io::Error::other)?;
        let mut stream = StreamOwned::new(client, stream);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock)?;
        }
        Ok(stream)
    }
}

/// HTTP/1.1 in TLS; what came back, or the words for why there was none.
pub fn https(to: impl Into<SocketAddr>, name: &str, request: &[u8]) -> Vec<u8> {
    spoken(connect(to).and_then(|stream| Offer::alpn(&["http/1.1"]).tls(name, stream)), request)
}

/// Writes a request and reads to the end.
pub fn spoken<S: Read + Write>(stream: io::Result<S>, request: &[u8]) -> Vec<u8> {
    match stream {
        Ok(mut stream) => {
            let _ = stream.write_all(request);
            let _ = stream.flush();
            drain(&mut stream)
        }
        Err(error) => format!("no TLS: {error}").into_bytes(),
    }
}

/// Whether an answer of HTTP/1 has this status.
pub fn has_status(got: &[u8], status: u16) -> bool {
    got.starts_with(format!("HTTP/1.1 {status}").as_bytes())
}
