//! tapgate's proxy, in a process of its own: real listeners, two VMs, audit events counted and dropped.

use crate::stage::{NAME, PLAIN, RESOLVER, SECRET};
use anyhow::{Context as _, Result};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tapgate_model::{
    AuditEvent, AuditSink, GuestNet, Mode, Rule, RuleId, RuleSet, RuleTarget, SecretBinding, SecretValue,
    UserId, VmId, VmPolicy,
};
use tapgate_proxy::{Limits, Listeners, PolicyTable, Proxy, ProxyConfig, VmCa};
use tokio_util::sync::CancellationToken;

#[derive(Default)]
struct Count(AtomicU64);

impl AuditSink for Count {
    fn record(&self, event: AuditEvent) {
        drop(event);
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

/// Serves until killed.
pub fn serve(dir: &Path) -> Result<()> {
    let ca = std::fs::read_to_string(dir.join("ca.pem"))?;
    let key = std::fs::read_to_string(dir.join("ca.key"))?;
    let limits = Limits { connections: 20_000, new_per_second: 1_000_000, ..Limits::default() };
    let table = Arc::new(PolicyTable::new(limits));
    for (slot, guest) in [(0, PLAIN), (1, SECRET)] {
        let net = GuestNet::new(slot, Ipv4Addr::new(10, 214, 0, 0), None);
        anyhow::ensure!(net.v4 == guest, "the guest of slot {slot} has {}", net.v4);
        let vm_ca = Arc::new(VmCa::from_pem(&ca, &key)?);
        table.insert(net, vm_ca, Arc::new(policy(guest == SECRET)?));
    }
    let config = ProxyConfig {
        resolvers: vec![SocketAddr::from((RESOLVER, 5300)).into()],
        extra_roots: vec![CertificateDer::from_pem_slice(ca.as_bytes())?],
        ..ProxyConfig::default()
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let listeners = Listeners::bind().context("the listeners")?;
        let proxy = Proxy::new(config, table, Arc::new(Count::default()));
        Ok(proxy.serve(listeners, CancellationToken::new()).await?)
    })
}

fn policy(secret: bool) -> Result<VmPolicy> {
    let rule = Rule { id: RuleId::generate(), target: RuleTarget::Host(NAME.parse()?) };
    let secrets = match secret {
        false => Vec::new(),
        true => vec![SecretBinding {
            name: "token".into(),
            env_var: "TOKEN".into(),
            hosts: vec![NAME.parse()?],
            value: SecretValue::new(b"ghp_realvalue0123456789".to_vec())?,
        }],
    };
    Ok(VmPolicy {
        vm: VmId::generate(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Enforce,
        rules: RuleSet::new([rule]),
        secrets: secrets.into(),
        secrets_over_http: tapgate_model::policy::SecretsOverHttp::Explicit,
    })
}
