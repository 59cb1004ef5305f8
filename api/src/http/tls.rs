//! The certificate of the REST API: read from its files, and again when they change. Must never let go of a good one for a
//! bad one.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;
use tokio_rustls::rustls::{self, ServerConfig};

/// A certificate that is read again when its files change.
#[derive(Debug)]
pub struct Tls {
    cert: PathBuf,
    key: PathBuf,
    current: arc_swap::ArcSwap<Loaded>,
}

#[derive(Debug)]
struct Loaded {
    config: Arc<ServerConfig>,
    changed: Changed,
    until_us: i64,
}

/// When each of the files was written; one may be older than the other, and be exchanged for one that is older still.
type Changed = [Option<SystemTime>; 2];

/// Why a certificate cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// A file does not hold what it should.
    #[error("cannot read {path}: {source}; it must be PEM")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// There is no certificate in the file, or none that can be read.
    #[error("{path} holds no certificate")]
    None {
        /// The file.
        path: PathBuf,
    },
    /// Certificate and key do not fit, or are not for servers.
    #[error("cannot use the certificate for TLS: {0}")]
    Unusable(#[from] rustls::Error),
}

impl Tls {
    /// Reads a certificate chain and its key, both in PEM.
    pub fn load(cert: PathBuf, key: PathBuf) -> Result<Self, TlsError> {
        let current = arc_swap::ArcSwap::from_pointee(read(&cert, &key)?);
        Ok(Self { cert, key, current })
    }

    /// What is shown now.
    pub(super) fn current(&self) -> Arc<ServerConfig> {
        self.current.load().config.clone()
    }

    /// When the certificate ends, in microseconds since 1970.
    pub fn until_us(&self) -> i64 {
        self.current.load().until_us
    }

    /// Looks whether the files changed, and takes the new ones if they are good; else the old ones stay.
    pub(super) fn refresh(&self) {
        if changed(&self.cert, &self.key) == self.current.load().changed {
            return;
        }
        match read(&self.cert, &self.key) {
            Ok(loaded) => {
                self.current.store(Arc::new(loaded));
                tracing::info!(cert = %self.cert.display(), "tls.reloaded");
            }
            Err(error) => tracing::error!(%error, "tls.reload_failed: the certificate before stays in use"),
        }
    }
}

fn changed(cert: &PathBuf, key: &PathBuf) -> Changed {
    [cert, key].map(|path| std::fs::metadata(path).and_then(|meta| meta.modified()).ok())
}

fn read(cert: &PathBuf, key: &PathBuf) -> Result<Loaded, TlsError> {
    use rustls::pki_types::pem::PemObject as _;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    let changed = changed(cert, key);
    let pem = |path: &PathBuf| {
        let path = path.clone();
        move |source| TlsError::Pem { path, source }
    };
    let chain: Vec<_> = CertificateDer::pem_file_iter(cert).and_then(Iterator::collect).map_err(pem(cert))?;
    let first = chain.first().and_then(|first| x509_parser::parse_x509_certificate(first).ok());
    let (_, first) = first.ok_or_else(|| TlsError::None { path: cert.clone() })?;
    let until_us = first.validity().not_after.timestamp().saturating_mul(1_000_000);
    let private = PrivateKeyDer::from_pem_file(key).map_err(pem(key))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, private)?;
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Loaded { config: Arc::new(config), changed, until_us })
}
