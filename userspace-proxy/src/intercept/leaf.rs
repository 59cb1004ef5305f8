//! Certificates for the names that a VM's TLS is opened for: minted once for each VM and name, each with a key of its
//! own, short-lived, cached. Nothing is shared between VMs or names, session tickets included.

use super::ca::{BACKDATED, CaError, VmCa};
use moka::sync::Cache;
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use rustls::{ServerConfig, crypto::CryptoProvider};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};
use tapgate_model::HostName;

/// How long a certificate holds from now on; browsers and platforms bound what they accept.
const LIFE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// It is replaced long before it ends.
const CACHED: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates kept over all VMs.
const MOST: u64 = 8192;

/// What was negotiated with the upstream and is offered to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Alpn {
    Http1,
    Http2,
}

impl Alpn {
    /// The protocol's name on the wire.
    pub(crate) const fn word(self) -> &'static [u8] {
        match self {
            Self::Http1 => b"http/1.1",
            Self::Http2 => b"h2",
        }
    }
}

/// The server side of opened TLS, by VM (told by its CA) and name.
pub(crate) struct Leaves {
    provider: Arc<CryptoProvider>,
    configs: Cache<(u64, HostName, Alpn), Arc<ServerConfig>>,
}

impl Leaves {
    /// None minted yet.
    pub(crate) fn new(provider: Arc<CryptoProvider>) -> Self {
        Self { provider, configs: Cache::builder().max_capacity(MOST).time_to_live(CACHED).build() }
    }

    /// The configuration that answers as this name towards this VM.
    pub(crate) fn config(
        &self,
        ca: &VmCa,
        name: &HostName,
        alpn: Alpn,
    ) -> Result<Arc<ServerConfig>, Arc<CaError>> {
        let key = (ca.number, name.clone(), alpn);
        self.configs.try_get_with(key, || self.mint(ca, name, alpn).map(Arc::new))
    }

    fn mint(&self, ca: &VmCa, name: &HostName, alpn: Alpn) -> Result<ServerConfig, CaError> {
        let key = KeyPair::generate().map_err(CaError::Make)?;
        let now = SystemTime::now();
        let mut params = CertificateParams::new(vec![name.as_str().to_owned()]).map_err(CaError::Make)?;
        params.distinguished_name = rcgen::DistinguishedName::new();
        // X.509 bounds the common name to 64 characters; clients read the alternative name only.
        let common = if name.as_str().len() <= 64 { name.as_str() } else { "tapgate" };
        params.distinguished_name.push(DnType::CommonName, common);
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + LIFE).into();
        let cert = params.signed_by(&key, &ca.issuer).map_err(CaError::Make)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let chain = vec![cert.der().clone(), ca.cert_der.clone()];
        let parse = |error: rustls::Error| CaError::Parse(error.to_string());
        let mut config = ServerConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(parse)?
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .map_err(parse)?;
        config.ignore_client_order = true;
        config.alpn_protocols = match alpn {
            Alpn::Http1 => vec![Alpn::Http1.word().to_vec()],
            Alpn::Http2 => vec![Alpn::Http2.word().to_vec(), Alpn::Http1.word().to_vec()],
        };
        // Who speaks 1.0 alone says so.
        config.alpn_protocols.push(b"http/1.0".to_vec());
        Ok(config)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::VmId;

    #[test]
    fn certificates_are_minted_once_for_each_vm_and_name() {
        let leaves = Leaves::new(Arc::new(rustls::crypto::aws_lc_rs::default_provider()));
        let ca = || VmCa::generate(&VmId::generate()).unwrap();
        let (ca, other) = (ca(), ca());
        let of = |ca, name: &str| leaves.config(ca, &name.parse().unwrap(), Alpn::Http1).unwrap();
        let first = of(&ca, "a.example");
        assert!(Arc::ptr_eq(&first, &of(&ca, "a.example")));
        assert!(!Arc::ptr_eq(&first, &of(&ca, "b.example")));
        assert!(!Arc::ptr_eq(&first, &of(&other, "a.example")));
    }

    #[test]
    fn a_ca_survives_being_stored() {
        let vm = VmId::generate();
        let ca = VmCa::generate(&vm).unwrap();
        let back = VmCa::from_pem(ca.cert_pem(), &ca.key_pem()).unwrap();
        assert_eq!(back.cert_der, ca.cert_der);
        assert!(!format!("{back:?}").contains("KEY"));
        assert!(VmCa::from_pem("rubbish", &ca.key_pem()).is_err());
        assert!(VmCa::from_pem(ca.cert_pem(), "rubbish").is_err());
    }
}
