//! The proxy itself: what all connections share, and the loops that accept them. Dials from the network namespace that it
//! runs in; the listeners may be of another.

use crate::{
    config::ProxyConfig,
    confine::confine,
    conn::{self, Accepted},
    dial::Dialer,
    dns,
    http::{pool::Pool, upstream::Connector},
    listener::{Family, Listeners},
    resolve::Resolve,
    splice::Pipes,
    table::PolicyTable,
    trust::Trust,
};
use rustls::{CipherSuite, crypto::CryptoProvider};
use std::{io, net::TcpListener as StdListener, sync::Arc, time::Duration};
use tapgate_model::AuditSink;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long connections are given to end when the daemon stops, or the rules cut them.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);
/// The name of the proxy's threads.
const THREADS: &str = "proxy";
/// Between two sweeps of what rests.
const SWEEP: Duration = Duration::from_secs(30);

/// A proxy that cannot start.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// TLS cannot be set up.
    #[error("TLS cannot be set up: {0}")]
    Tls(#[from] rustls::Error),
    /// No resolver.
    #[error("no resolver: {0}; set `resolvers`, or mend /etc/resolv.conf")]
    Resolver(String),
    /// Its threads cannot be started or confined.
    #[error("the proxy's own threads cannot be started or confined: {0}; the kernel must offer seccomp")]
    Threads(io::Error),
    /// A listener is unusable.
    #[error("a listener cannot be used: {0}")]
    Listener(#[from] io::Error),
}

/// What all connections share.
pub(crate) struct Shared {
    pub(crate) config: ProxyConfig,
    pub(crate) table: Arc<PolicyTable>,
    pub(crate) sink: Arc<dyn AuditSink>,
    pub(crate) connector: Connector,
    pub(crate) provider: Arc<CryptoProvider>,
    pub(crate) pool: Pool,
    pub(crate) pipes: Pipes,
    pub(crate) stop: CancellationToken,
    /// What is waited for when the daemon stops.
    pub(crate) tasks: TaskTracker,
}

/// The proxy.
pub struct Proxy {
    config: ProxyConfig,
    table: Arc<PolicyTable>,
    sink: Arc<dyn AuditSink>,
}

/// Microseconds since the Unix epoch.
pub(crate) fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}

impl Proxy {
    /// A proxy that reads this table and reports to this sink.
    pub fn new(config: ProxyConfig, table: Arc<PolicyTable>, sink: Arc<dyn AuditSink>) -> Self {
        Self { config, table, sink }
    }

    fn share(self, stop: CancellationToken) -> Result<Arc<Shared>, ProxyError> {
        let provider = Arc::new(provider());
        let trust = Trust::new(provider.clone(), &self.config.extra_roots);
        let resolve = Resolve::new(&self.config, trust.client(&[])?)
            .map_err(|error| ProxyError::Resolver(error.to_string()))?;
        let patience = self.config.timeouts.connect;
        let dialer = Dialer { resolve, table: self.table.clone(), patience };
        Ok(Arc::new(Shared {
            connector: Connector::new(dialer, &trust, patience)?,
            provider,
            pool: Pool::default(),
            pipes: Pipes::default(),
            config: self.config,
            table: self.table,
            sink: self.sink,
            stop,
            tasks: TaskTracker::new(),
        }))
    }

    /// Serves until the token is cancelled, on threads of its own that are [confined](confine) before they meet an octet of a
    /// guest; connections under way are given a moment to end.
    pub async fn serve(self, listeners: Listeners, stop: CancellationToken) -> Result<(), ProxyError> {
        let (done, ended) = tokio::sync::oneshot::channel();
        let own = move || drop(done.send(self.serve_confined(listeners, stop)));
        std::thread::Builder::new().name(THREADS.into()).spawn(own).map_err(ProxyError::Threads)?;
        ended.await.unwrap_or_else(|_| Err(ProxyError::Threads(io::Error::other("one of them panicked"))))
    }

    /// What needs files is read first; every thread that is started afterwards inherits the confinement.
    fn serve_confined(self, listeners: Listeners, stop: CancellationToken) -> Result<(), ProxyError> {
        let shared = self.share(stop)?;
        confine().map_err(ProxyError::Threads)?;
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(THREADS).build();
        runtime.map_err(ProxyError::Threads)?.block_on(serve(shared, listeners))
    }

    /// Handles connections that somebody else accepts, each to its end; for a front end without transparent sockets.
    pub async fn handle_all(
        self,
        mut accepted: tokio::sync::mpsc::Receiver<Accepted>,
        stop: CancellationToken,
    ) -> Result<(), ProxyError> {
        let shared = self.share(stop.clone())?;
        loop {
            tokio::select! {
                next = accepted.recv() => match next {
                    Some(accepted) => drop(shared.tasks.spawn(conn::handle(shared.clone(), accepted))),
                    None => break,
                },
                () = stop.cancelled() => break,
            }
        }
        shared.tasks.close();
        let _ = tokio::time::timeout(DRAIN, shared.tasks.wait()).await;
        Ok(())
    }
}

/// TLS as both sides speak it: AES-128 first, which is as far from being broken and takes a third less time; its hash has
/// instructions of its own where SHA-384 has none.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    let first = [CipherSuite::TLS13_AES_128_GCM_SHA256];
    provider.cipher_suites.sort_by_key(|suite| !first.contains(&suite.suite()));
    provider
}

async fn serve(shared: Arc<Shared>, listeners: Listeners) -> Result<(), ProxyError> {
    let tasks = &shared.tasks;
    let Listeners { v4, v6 } = listeners;
    for family in [Some(v4), v6].into_iter().flatten() {
        let Family { tcp, dns_udp, dns_tcp, .. } = family;
        tasks.spawn(accept(shared.clone(), listener(tcp)?, Kind::Tcp));
        tasks.spawn(accept(shared.clone(), listener(dns_tcp)?, Kind::Dns));
        let socket = tokio::net::UdpSocket::from_std(dns_udp)?;
        tasks.spawn(dns::udp::serve(shared.clone(), socket));
    }
    tasks.spawn(sweep(shared.clone()));
    shared.stop.cancelled().await;
    tasks.close();
    if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
        tracing::info!(left = tasks.len(), "connections are cut, for the daemon stops");
    }
    Ok(())
}

#[derive(Clone, Copy)]
enum Kind {
    Tcp,
    Dns,
}

fn listener(listener: StdListener) -> io::Result<TcpListener> {
    listener.set_nonblocking(true)?;
    TcpListener::from_std(listener)
}

async fn accept(shared: Arc<Shared>, listener: TcpListener, kind: Kind) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = shared.stop.cancelled() => return,
        };
        let (stream, guest) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Out of descriptors or memory: those held may be given back soon.
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let Ok(destination) = stream.local_addr() else { continue };
        let accepted = Accepted { stream, guest, destination };
        match kind {
            Kind::Tcp => drop(shared.tasks.spawn(conn::handle(shared.clone(), accepted))),
            Kind::Dns => drop(shared.tasks.spawn(dns::tcp::serve(shared.clone(), accepted))),
        }
    }
}

async fn sweep(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = tokio::time::sleep(SWEEP) => shared.pool.sweep(),
            () = shared.stop.cancelled() => return,
        }
    }
}
