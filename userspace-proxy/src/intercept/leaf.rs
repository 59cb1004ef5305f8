//! Certificates for the names that a VM's TLS is opened for: minted once for each VM and name, each with a key of its
//! own, short-lived, kept with the VM and gone with it. Nothing is shared between VMs; a VM's names share the key that session
//! tickets are sealed with, and a ticket says which name it is for. Must never keep what grows with handshakes.

use super::ca::{BACKDATED, CaError, VmCa};
use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, KeyPair, KeyUsagePurpose};
use rustls::{
    ServerConfig,
    crypto::{CryptoProvider, aws_lc_rs::Ticketer},
    server::{NoServerSessionStorage, ProducesTickets},
};
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};
use tapgate_model::HostName;

/// How long a certificate holds from now on; browsers and platforms bound what they accept.
const LIFE: Duration = Duration::from_secs(7 * 24 * 60 * 60);
/// It is replaced long before it ends.
const CACHED: Duration = Duration::from_secs(24 * 60 * 60);
/// Certificates kept for one VM, of some 3 KiB each.
const MOST: usize = 1024;

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

/// The server side of opened TLS of one VM.
#[derive(Default)]
pub(crate) struct Leaves(Mutex<Kept>);

#[derive(Default)]
struct Kept {
    /// Seals session tickets, so that none of them is kept here.
    ticketer: Option<Arc<dyn ProducesTickets>>,
    leaves: HashMap<(HostName, Alpn), Leaf>,
}

struct Leaf {
    /// Empty until it is minted, by whoever comes first.
    config: Arc<Mutex<Option<Arc<ServerConfig>>>>,
    minted: Instant,
    used: Instant,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Leaves {
    /// The configuration that answers as this name towards this VM.
    pub(crate) fn config(
        &self,
        provider: &Arc<CryptoProvider>,
        ca: &VmCa,
        name: &HostName,
        alpn: Alpn,
    ) -> Result<Arc<ServerConfig>, CaError> {
        let (place, ticketer) = lock(&self.0).place(name, alpn)?;
        let mut config = lock(&place);
        if let Some(config) = &*config {
            return Ok(config.clone());
        }
        let minted = Arc::new(mint(provider, ca, ticketer, name, alpn)?);
        Ok(config.insert(minted).clone())
    }
}

type Place = (Arc<Mutex<Option<Arc<ServerConfig>>>>, Arc<dyn ProducesTickets>);

impl Kept {
    /// Where the configuration is, or is to be; for a new one, the one that was not used for longest may have to go.
    fn place(&mut self, name: &HostName, alpn: Alpn) -> Result<Place, CaError> {
        let ticketer = match &self.ticketer {
            Some(ticketer) => ticketer.clone(),
            None => self.ticketer.insert(Ticketer::new().map_err(parse)?).clone(),
        };
        let now = Instant::now();
        let key = (name.clone(), alpn);
        if let Some(leaf) = self.leaves.get_mut(&key)
            && now.duration_since(leaf.minted) < CACHED
        {
            leaf.used = now;
            return Ok((leaf.config.clone(), ticketer));
        }
        if self.leaves.len() >= MOST {
            let oldest = self.leaves.iter().min_by_key(|(_, leaf)| leaf.used).map(|(key, _)| key.clone());
            oldest.and_then(|oldest| self.leaves.remove(&oldest));
        }
        let leaf = Leaf { config: Arc::default(), minted: now, used: now };
        let config = leaf.config.clone();
        self.leaves.insert(key, leaf);
        Ok((config, ticketer))
    }
}

fn parse(error: rustls::Error) -> CaError {
    CaError::Parse(error.to_string())
}

fn mint(
    provider: &Arc<CryptoProvider>,
    ca: &VmCa,
    ticketer: Arc<dyn ProducesTickets>,
    name: &HostName,
    alpn: Alpn,
) -> Result<ServerConfig, CaError> {
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
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .map_err(parse)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(parse)?;
    config.ignore_client_order = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.ticketer = ticketer;
    config.alpn_protocols = match alpn {
        Alpn::Http1 => vec![Alpn::Http1.word().to_vec()],
        Alpn::Http2 => vec![Alpn::Http2.word().to_vec(), Alpn::Http1.word().to_vec()],
    };
    // Who speaks 1.0 alone says so.
    config.alpn_protocols.push(b"http/1.0".to_vec());
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::VmId;

    fn of(leaves: &Leaves, ca: &VmCa, name: &str) -> Arc<ServerConfig> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        leaves.config(&provider, ca, &name.parse().unwrap(), Alpn::Http1).unwrap()
    }

    #[test]
    fn certificates_are_minted_once_for_each_vm_and_name() {
        let (leaves, ca) = (Leaves::default(), VmCa::generate(&VmId::generate()).unwrap());
        let first = of(&leaves, &ca, "a.example");
        assert!(Arc::ptr_eq(&first, &of(&leaves, &ca, "a.example")));
        assert!(!Arc::ptr_eq(&first, &of(&leaves, &ca, "b.example")));
    }

    #[test]
    fn a_vm_keeps_so_many_certificates_and_nothing_of_sessions_and_all_go_with_it() {
        let (leaves, ca) = (Leaves::default(), VmCa::generate(&VmId::generate()).unwrap());
        let (first, used) = (of(&leaves, &ca, "first.example"), of(&leaves, &ca, "used.example"));
        assert!(first.ticketer.enabled() && !first.session_storage.can_cache());
        for n in 0..MOST {
            of(&leaves, &ca, &format!("n{n}.example"));
            assert!(Arc::ptr_eq(&used, &of(&leaves, &ca, "used.example")), "what is in use stays");
        }
        assert_eq!(lock(&leaves.0).leaves.len(), MOST);
        let [first, used] = [first, used].map(|config| Arc::downgrade(&config));
        assert!(first.upgrade().is_none(), "the one not used for longest went");
        assert!(used.upgrade().is_some());
        drop(leaves);
        assert!(used.upgrade().is_none());
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
