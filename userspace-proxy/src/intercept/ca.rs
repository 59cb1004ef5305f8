//! One VM's certificate authority: made with the VM, trusted by its guest alone. The key is wiped on drop and is never
//! in logs or `Debug`.

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    fmt,
    time::{Duration, SystemTime},
};
use tapgate_model::VmId;
use zeroize::Zeroizing;

const DAY: Duration = Duration::from_secs(24 * 60 * 60);
/// Clocks of guests may be behind.
pub(crate) const BACKDATED: Duration = Duration::from_secs(2 * 24 * 60 * 60);
/// A VM's CA outlives the VM.
const LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// A CA that could not be made or read.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// Making or signing failed.
    #[error("the VM's CA could not be made: {0}")]
    Make(rcgen::Error),
    /// What was stored is not a CA.
    #[error("the stored CA of the VM does not parse: {0}; recreate the VM")]
    Parse(String),
    /// It could not be read yet.
    #[error("the VM's CA is not known yet")]
    Unknown,
}

/// One VM's CA.
pub struct VmCa {
    cert_pem: String,
    pub(crate) cert_der: CertificateDer<'static>,
    key_pem: Zeroizing<String>,
    pub(crate) issuer: Issuer<'static, KeyPair>,
}

impl VmCa {
    /// Makes a new one for the VM.
    pub fn generate(vm: &VmId) -> Result<Self, CaError> {
        let key = KeyPair::generate().map_err(CaError::Make)?;
        let key_pem = Zeroizing::new(key.serialize_pem());
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, "tapgate");
        params.distinguished_name.push(DnType::CommonName, format!("tapgate {vm}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.not_before = (now - BACKDATED).into();
        params.not_after = (now + LIFE + DAY).into();
        let cert = params.self_signed(&key).map_err(CaError::Make)?;
        Ok(Self {
            cert_pem: cert.pem(),
            cert_der: cert.der().clone(),
            key_pem,
            issuer: Issuer::new(params, key),
        })
    }

    /// Reads one back from what [`Self::cert_pem`] and [`Self::key_pem`] gave.
    pub fn from_pem(cert_pem: &str, key_pem: &str) -> Result<Self, CaError> {
        let parse = |error: &dyn fmt::Display| CaError::Parse(error.to_string());
        let key = KeyPair::from_pem(key_pem).map_err(|error| parse(&error))?;
        let cert_der = CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(|error| parse(&error))?;
        let issuer = Issuer::from_ca_cert_der(&cert_der, key).map_err(|error| parse(&error))?;
        Ok(Self {
            cert_pem: cert_pem.to_owned(),
            cert_der,
            key_pem: Zeroizing::new(key_pem.to_owned()),
            issuer,
        })
    }

    /// The certificate, for the guest's trust stores.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// The private key, for sealing at rest.
    pub fn key_pem(&self) -> Zeroizing<String> {
        self.key_pem.clone()
    }
}

impl fmt::Debug for VmCa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VmCa(..)")
    }
}
