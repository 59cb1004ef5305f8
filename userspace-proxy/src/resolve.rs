//! Names to addresses and records, by the resolvers that the operator chose. Owns the one resolver and its cache.
//!
//! Must never decide whether an address may be used: that is the dialer's and the DNS server's to ask of the policy.

use crate::{
    config::ProxyConfig,
    resolver::{Resolver, Transport},
};
use hickory_resolver::{
    TokioResolver,
    config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig, ResolverOpts},
    lookup::Lookup,
    net::{NetError, runtime::TokioRuntimeProvider},
    proto::rr::{Name, RData, RecordType},
};
use std::{net::IpAddr, time::Duration};
use tapgate_model::HostName;

/// Answers kept.
const CACHE: u64 = 16 * 1024;
/// No answer is kept longer, whatever its TTL says.
const MAX_TTL: Duration = Duration::from_secs(3600);

/// Resolves names.
#[derive(Clone)]
pub(crate) struct Resolve(TokioResolver);

impl Resolve {
    /// A resolver that asks the configured servers, or the system's; the next one where one fails.
    pub(crate) fn new(config: &ProxyConfig, tls: rustls::ClientConfig) -> Result<Self, NetError> {
        let mut builder = if config.resolvers.is_empty() {
            TokioResolver::builder_tokio()?
        } else {
            let servers = config.resolvers.iter().map(server).collect();
            let config = ResolverConfig::from_parts(None, Vec::new(), servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        set(builder.options_mut());
        Ok(Self(builder.with_tls_config(tls).build()?))
    }

    /// Every address of the name, IPv6 and IPv4 taking turns. Only the name itself: no search domains.
    pub(crate) async fn addresses(&self, name: &HostName) -> Result<Vec<IpAddr>, NetError> {
        let name = fqdn(name)?;
        let (v6, v4) = tokio::join!(
            self.0.lookup(name.clone(), RecordType::AAAA),
            self.0.lookup(name.clone(), RecordType::A),
        );
        if let (Err(_), Err(error)) = (&v6, &v4) {
            return Err(error.clone());
        }
        let of = |lookup: Result<Lookup, NetError>| {
            let records = lookup.map(|lookup| lookup.answers().to_vec()).unwrap_or_default();
            records.into_iter().filter_map(|record| match record.data {
                RData::A(a) => Some(IpAddr::V4(a.0)),
                RData::AAAA(aaaa) => Some(IpAddr::V6(aaaa.0)),
                _ => None,
            })
        };
        let (mut v6, mut v4) = (of(v6), of(v4));
        let mut all = Vec::new();
        loop {
            let before = all.len();
            all.extend(v6.next());
            all.extend(v4.next());
            if all.len() == before {
                return Ok(all);
            }
        }
    }

    /// The records of one type.
    pub(crate) async fn records(&self, name: &HostName, kind: RecordType) -> Result<Lookup, NetError> {
        self.0.lookup(fqdn(name)?, kind).await
    }
}

fn server(resolver: &Resolver) -> NameServerConfig {
    let mut connections = match &resolver.by {
        Transport::Plain => vec![ConnectionConfig::udp(), ConnectionConfig::tcp()],
        Transport::Tls(name) => vec![ConnectionConfig::tls(name.as_str().into())],
        Transport::Https(name, path) => {
            vec![ConnectionConfig::https(name.as_str().into(), Some(path.as_str().into()))]
        }
    };
    for connection in &mut connections {
        connection.port = resolver.at.port();
    }
    NameServerConfig::new(resolver.at.ip(), true, connections)
}

fn fqdn(name: &HostName) -> Result<Name, NetError> {
    let mut fqdn = Name::from_ascii(name.as_str())?;
    fqdn.set_fqdn(true);
    Ok(fqdn)
}

fn set(options: &mut ResolverOpts) {
    options.use_hosts_file = ResolveHosts::Never;
    options.cache_size = CACHE;
    options.positive_max_ttl = Some(MAX_TTL);
    options.negative_max_ttl = Some(Duration::from_secs(300));
    options.timeout = Duration::from_secs(3);
    options.max_active_requests = 1024;
    options.try_tcp_on_error = true;
    options.case_randomization = false;
}
