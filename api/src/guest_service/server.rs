//! Serves the guest service's connections. Guests are hostile and share the daemon's descriptors: each may hold few
//! connections, and a slow one loses its own. Must never let one guest keep another from being served.

use axum::{Router, extract::ConnectInfo};
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tower::ServiceExt as _;

use crate::http::Lingering;

/// Connections of one guest at a time; its agent holds two.
const CONNECTIONS: usize = 16;
/// For a request's head, and between requests.
const PATIENCE: Duration = Duration::from_secs(10);
/// For running requests when the daemon ends.
const GRACE: Duration = Duration::from_secs(2);
const MAX_HEADERS: usize = 32;
/// Of all headers together.
const MAX_HEAD: usize = 8 * 1024;

/// How many connections each guest holds. A guest's address is its own: the gate has checked it.
#[derive(Clone, Debug, Default)]
struct Held(Arc<Mutex<HashMap<IpAddr, usize>>>);

/// One of a guest's connections; given back when it is dropped.
#[derive(Debug)]
struct Place {
    held: Held,
    guest: IpAddr,
}

impl Held {
    /// A place, unless the guest has all that it may have.
    fn take(&self, guest: IpAddr) -> Option<Place> {
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = held.entry(guest).or_default();
        (*count < CONNECTIONS).then(|| {
            *count += 1;
            Place { held: self.clone(), guest }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut held = self.held.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = held.get_mut(&self.guest) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.guest);
            }
        }
    }
}

/// Serves one listener until told to stop, then lets running requests end.
pub(super) async fn serve(listener: TcpListener, router: Router, stop: CancellationToken) {
    let (held, graceful) = (Held::default(), GracefulShutdown::new());
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .max_headers(MAX_HEADERS)
        .max_buf_size(MAX_HEAD);
    loop {
        let (stream, peer) = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Out of descriptors, most likely: waiting lets others end.
                    tracing::warn!(%error, "guest_service.accept_failed");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        // One too many is closed at once.
        let Some(place) = held.take(peer.ip().to_canonical()) else { continue };
        let router = router.clone();
        let service = service_fn(move |mut request: hyper::Request<hyper::body::Incoming>| {
            request.extensions_mut().insert(ConnectInfo::<SocketAddr>(peer));
            router.clone().oneshot(request.map(axum::body::Body::new))
        });
        let connection = graceful.watch(http.serve_connection(TokioIo::new(Lingering::new(stream)), service));
        tokio::spawn(async move {
            let _place = place;
            if let Err(error) = connection.await {
                tracing::debug!(%error, "guest_service.connection_ended");
            }
        });
    }
    drop(listener);
    let _ = tokio::time::timeout(GRACE, graceful.shutdown()).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::get;
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::TcpStream,
    };

    async fn answered(stream: &mut TcpStream) -> bool {
        let asked = stream.write_all(b"GET / HTTP/1.1\r\nHost: 169.254.169.254\r\n\r\n").await;
        let mut answer = [0u8; 12];
        asked.is_ok() && stream.read_exact(&mut answer).await.is_ok() && &answer == b"HTTP/1.1 200"
    }

    #[tokio::test]
    async fn a_guest_that_holds_many_connections_keeps_nobody_else_from_being_served() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", get(|| async { "hello" }));
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, router, stop.clone()));
        // Each address of the loopback network stands for a guest.
        let connect = async |from: &str| {
            let socket = tokio::net::TcpSocket::new_v4().unwrap();
            socket.bind(from.parse().unwrap()).unwrap();
            socket.connect(address).await.unwrap()
        };
        let mut held = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut stream = connect("127.0.0.1:0").await;
            assert!(answered(&mut stream).await);
            held.push(stream);
        }
        assert!(!answered(&mut connect("127.0.0.1:0").await).await, "one more than it may have");
        assert!(answered(&mut connect("127.0.0.2:0").await).await, "another guest");
        drop(held.pop());
        let mut again = false;
        for _ in 0..100 {
            again = answered(&mut connect("127.0.0.1:0").await).await;
            if again {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(again, "a place was not given back");
        stop.cancel();
        server.await.unwrap();
    }
}
