//! Serving connections, over TLS if there is a certificate, bounds on headers and on how slowly they come.
//!
//! Must never let a slow or endless client hold more than its one connection.

use super::busy::Requests;
use super::{Lingering, Peer, Prompt, Taking, tls::Tls};
use axum::Router;
use axum::extract::ConnectInfo;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::{LazyConfigAcceptor, rustls::server::Acceptor};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::ServiceExt as _;

/// Connections at a time.
const CONNECTIONS: usize = 4096;
/// Of those, of one address.
const OF_ONE: usize = CONNECTIONS / 4;
/// For the first octets, for a request's headers, and for the TLS handshake.
const PATIENCE: Duration = Duration::from_secs(10);
/// For running requests when the daemon ends.
const GRACE: Duration = Duration::from_secs(5);
/// A connection on which nothing was asked for so long is ended, as kindly as its protocol can.
const IDLE: Duration = Duration::from_secs(120);
/// For a client to take anything of an answer that waits for it.
const UNTAKEN: Duration = Duration::from_secs(30);
const MAX_HEADERS: usize = 64;
/// Of all headers together.
const MAX_HEAD: usize = 16 * 1024;

/// Serves until it is told to stop, then lets running requests end.
pub async fn serve(listener: TcpListener, router: Router, tls: Option<Arc<Tls>>, stop: CancellationToken) {
    serve_idling(listener, router, tls, stop, IDLE).await;
}

/// The same, with another time after which a connection without a request is ended.
pub async fn serve_idling(
    listener: TcpListener,
    router: Router,
    tls: Option<Arc<Tls>>,
    stop: CancellationToken,
    idle: Duration,
) {
    let turns = Arc::new(Semaphore::new(CONNECTIONS));
    let guests = Guests::default();
    let connections = TaskTracker::new();
    let mut http = Builder::new(TokioExecutor::new());
    http.http1()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD);
    http.http2()
        .timer(TokioTimer::new())
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .max_concurrent_streams(64)
        .keep_alive_interval(Duration::from_secs(30))
        .keep_alive_timeout(PATIENCE);
    let http = Arc::new(http);
    loop {
        let turn = tokio::select! {
            () = stop.cancelled() => break,
            turn = turns.clone().acquire_owned() => turn,
        };
        let (stream, peer) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: waiting lets others end.
                    tracing::warn!(%error, "api.accept_failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        let Some(guest) = guests.enter(Peer::of(peer.ip())) else {
            tracing::debug!(%peer, "api.too_many_connections");
            continue;
        };
        let _ = stream.set_nodelay(true);
        let stream = Lingering::new(Taking::new(stream, UNTAKEN.min(idle)));
        let (http, router, tls) = (http.clone(), router.clone(), tls.clone());
        let stop = stop.clone();
        connections.spawn(async move {
            let (_turn, _guest) = (turn, guest);
            let requests = Requests::new();
            let end = async {
                tokio::select! {
                    () = stop.cancelled() => {}
                    () = requests.idle(idle) => {}
                }
            };
            match tls {
                None => connection(&http, stream, peer, router, &requests, end, idle).await,
                Some(tls) => {
                    tls.refresh();
                    let config = tls.current();
                    if let Ok(Ok(stream)) = tokio::time::timeout(PATIENCE, handshake(stream, config)).await {
                        connection(&http, stream, peer, router, &requests, end, idle).await;
                    }
                }
            }
        });
    }
    drop(listener);
    connections.close();
    let _ = tokio::time::timeout(GRACE, connections.wait()).await;
}

/// How many connections each address has.
#[derive(Clone, Default)]
struct Guests(Arc<Mutex<HashMap<Peer, usize>>>);

/// One connection that counts, until it is dropped.
struct Guest(Guests, Peer);

impl Guests {
    fn enter(&self, peer: Peer) -> Option<Guest> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(peer).or_default();
        if *count >= OF_ONE {
            return None;
        }
        *count += 1;
        Some(Guest(self.clone(), peer))
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut counts = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = counts.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.1);
            }
        }
    }
}

async fn handshake(
    stream: Lingering<Taking<TcpStream>>,
    config: Arc<ServerConfig>,
) -> std::io::Result<tokio_rustls::server::TlsStream<Lingering<Taking<TcpStream>>>> {
    LazyConfigAcceptor::new(Acceptor::default(), stream).await?.into_stream(config).await
}

/// Serves one connection until it ends by itself, or its running requests have after `end`, or so `long` after it.
async fn connection<I>(
    http: &Builder<TokioExecutor>,
    stream: I,
    peer: SocketAddr,
    router: Router,
    requests: &Requests,
    end: impl Future<Output = ()>,
    long: Duration,
) where
    I: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
{
    let counted = requests.clone();
    let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
        let one = counted.begin();
        request.extensions_mut().insert(ConnectInfo(peer));
        let answer = router.clone().oneshot(request.map(axum::body::Body::new));
        async move { answer.await.map(|response| one.answered(response)) }
    });
    let connection =
        http.serve_connection_with_upgrades(TokioIo::new(Prompt::new(stream, PATIENCE)), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = end => {
            connection.as_mut().graceful_shutdown();
            // What was answered may still be on its way, but over HTTP/2 a client may never make room for it.
            match tokio::time::timeout(long, connection).await {
                Ok(ended) => ended,
                Err(_) => return tracing::debug!("api.connection_cut"),
            }
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "api.connection_ended");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_has_no_more_than_its_part() {
        let guests = Guests::default();
        let (one, other) = (Peer::of([192, 0, 2, 1].into()), Peer::of([192, 0, 2, 2].into()));
        let all: Vec<_> = (0..OF_ONE).map(|_| guests.enter(one).unwrap()).collect();
        assert!(guests.enter(one).is_none());
        assert!(guests.enter(other).is_some());
        drop(all);
        assert!(guests.0.lock().unwrap().is_empty(), "who has left is forgotten");
        assert!(guests.enter(one).is_some());
    }
}
