//! The world's certificate authority, and the certificates of its hosts: one for each name, signed anew for each
//! world. One host's certificate is signed by an authority that nobody was told of.

use crate::sites;
use anyhow::{Context as _, Result};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    crypto::aws_lc_rs,
    server::{ClientHello, ResolvesServerCert},
    sign::CertifiedKey,
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio_rustls::TlsAcceptor;

/// The file of the authority's certificate in the world's folder.
pub const CA_FILE: &str = "ca.pem";

/// The file of this host's own certificate in the world's folder.
pub fn certificate_file(folder: &Path, name: &str) -> PathBuf {
    folder.join(format!("{name}.pem"))
}

/// Makes the authorities and certificates, writes them down and returns what accepts TLS with them.
pub fn acceptor(folder: &Path) -> Result<TlsAcceptor> {
    let (trusted, pem) = authority("tapgate test world")?;
    let (unknown, _) = authority("nobody's authority")?;
    let mut keys = HashMap::new();
    let names = sites::WEB.map(|site| site.name).into_iter().chain([sites::REBIND]);
    for name in names.chain(sites::INWARD.map(|(name, _)| name)) {
        let issuer = if name == sites::UNTRUSTED.name { &unknown } else { &trusted };
        keys.insert(name, Arc::new(certificate(folder, name, issuer)?));
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions()?;
    let mut config = builder.with_no_client_auth().with_cert_resolver(Arc::new(ByName(keys)));
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    // The authority last: whoever sees its file sees all of them.
    fs::write(folder.join(CA_FILE), pem)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn authority(name: &str) -> Result<(Issuer<'static, KeyPair>, String)> {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate()?;
    let pem = params.self_signed(&key)?.pem();
    Ok((Issuer::new(params, key), pem))
}

fn certificate(folder: &Path, name: &str, issuer: &Issuer<'_, KeyPair>) -> Result<CertifiedKey> {
    let mut params = CertificateParams::new([name.to_owned()])?;
    params.distinguished_name.push(DnType::CommonName, name);
    params.use_authority_key_identifier_extension = true;
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth];
    let key = KeyPair::generate()?;
    let certificate = params.signed_by(&key, issuer)?;
    fs::write(certificate_file(folder, name), certificate.pem())?;
    let der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signing = aws_lc_rs::sign::any_supported_type(&der).context("a key that cannot sign")?;
    Ok(CertifiedKey::new(vec![certificate.der().clone()], signing))
}

/// The certificate for the name asked for; without a name, that of an ordinary site.
#[derive(Debug)]
struct ByName(HashMap<&'static str, Arc<CertifiedKey>>);

impl ResolvesServerCert for ByName {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let name = hello.server_name().unwrap_or(sites::OTHER.name);
        self.0.get(name).or_else(|| self.0.get(sites::OTHER.name)).cloned()
    }
}
