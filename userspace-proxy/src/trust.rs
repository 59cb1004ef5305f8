//! What upstreams' certificates are verified against. One set of roots for everything that the proxy asks: HTTP upstreams
//! and name servers alike. Must never make a configuration that verifies nothing.

use rustls::{ClientConfig, RootCertStore, crypto::CryptoProvider};
use rustls_pki_types::CertificateDer;
use std::sync::Arc;

/// The roots, and what computes.
#[derive(Clone)]
pub(crate) struct Trust {
    provider: Arc<CryptoProvider>,
    roots: Arc<RootCertStore>,
}

impl Trust {
    /// The system's roots and the given ones.
    pub(crate) fn new(provider: Arc<CryptoProvider>, extra: &[CertificateDer<'static>]) -> Self {
        let mut roots = RootCertStore::empty();
        let system = rustls_native_certs::load_native_certs();
        for error in &system.errors {
            tracing::warn!(%error, "a root certificate of the system was left out");
        }
        roots.add_parsable_certificates(system.certs);
        roots.add_parsable_certificates(extra.iter().cloned());
        if roots.is_empty() {
            tracing::warn!("no root certificates: no upstream will verify; install ca-certificates");
        }
        Self { provider, roots: Arc::new(roots) }
    }

    /// A client that offers these protocols.
    pub(crate) fn client(&self, alpn: &[&[u8]]) -> Result<ClientConfig, rustls::Error> {
        let mut config = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()?
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|word| word.to_vec()).collect();
        Ok(config)
    }
}
