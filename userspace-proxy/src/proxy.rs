//! The proxy itself: what all connections share, and the loops that accept them. Dials from the network namespace that it
//! runs in; the listeners may be of another.

use crate::{
    config::ProxyConfig,
    conn::{self, Accepted},
    dial::Dialer,
    dns,
    http::{pool::Pool, upstream::Connector},
    intercept::leaf::Leaves,
    listener::{Family, Listeners},
    resolve::Resolve,
    splice::Pipes,
    table::PolicyTable,
    trust::Trust,
};
use std::{io, net::TcpListener as StdListener, sync::Arc, time::Duration};
use tapgate_model::AuditSink;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long connections are given to end when the daemon stops.
const DRAIN: Duration = Duration::from_secs(5);
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
    pub(crate) leaves: Leaves,
    pub(crate) pool: Pool,
    pub(crate) pipes: Pipes,
    pub(crate) stop: CancellationToken,
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
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let trust = Trust::new(provider.clone(), &self.config.extra_roots);
        let resolve = Resolve::new(&self.config, trust.client(&[])?)
            .map_err(|error| ProxyError::Resolver(error.to_string()))?;
        let patience = self.config.timeouts.connect;
        let dialer = Dialer { resolve, table: self.table.clone(), patience };
        Ok(Arc::new(Shared {
            connector: Connector::new(dialer, &trust, patience)?,
            leaves: Leaves::new(provider),
            pool: Pool::default(),
            pipes: Pipes::default(),
            config: self.config,
            table: self.table,
            sink: self.sink,
            stop,
        }))
    }

    /// Serves until the token is cancelled; connections under way are given a moment to end.
    pub async fn serve(self, listeners: Listeners, stop: CancellationToken) -> Result<(), ProxyError> {
        let shared = self.share(stop.clone())?;
        let tasks = TaskTracker::new();
        let Listeners { v4, v6 } = listeners;
        for family in [Some(v4), v6].into_iter().flatten() {
            let Family { tcp, dns_udp, dns_tcp, .. } = family;
            tasks.spawn(accept(shared.clone(), listener(tcp)?, tasks.clone(), Kind::Tcp));
            tasks.spawn(accept(shared.clone(), listener(dns_tcp)?, tasks.clone(), Kind::Dns));
            let socket = tokio::net::UdpSocket::from_std(dns_udp)?;
            tasks.spawn(dns::udp::serve(shared.clone(), socket, tasks.clone()));
        }
        tasks.spawn(sweep(shared));
        stop.cancelled().await;
        tasks.close();
        if tokio::time::timeout(DRAIN, tasks.wait()).await.is_err() {
            tracing::info!(left = tasks.len(), "connections are cut, for the daemon stops");
        }
        Ok(())
    }

    /// Handles connections that somebody else accepts, each to its end; for a front end without transparent sockets.
    pub async fn handle_all(
        self,
        mut accepted: tokio::sync::mpsc::Receiver<Accepted>,
        stop: CancellationToken,
    ) -> Result<(), ProxyError> {
        let shared = self.share(stop.clone())?;
        let tasks = TaskTracker::new();
        loop {
            tokio::select! {
                next = accepted.recv() => match next {
                    Some(accepted) => drop(tasks.spawn(conn::handle(shared.clone(), accepted))),
                    None => break,
                },
                () = stop.cancelled() => break,
            }
        }
        tasks.close();
        let _ = tokio::time::timeout(DRAIN, tasks.wait()).await;
        Ok(())
    }
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

async fn accept(shared: Arc<Shared>, listener: TcpListener, tasks: TaskTracker, kind: Kind) {
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
            Kind::Tcp => drop(tasks.spawn(conn::handle(shared.clone(), accepted))),
            Kind::Dns => drop(tasks.spawn(dns::tcp::serve(shared.clone(), accepted))),
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
