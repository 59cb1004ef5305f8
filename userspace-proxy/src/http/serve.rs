//! Serves HTTP on one stream of a guest, until it ends, the rules cut it, or the daemon stops.

use super::{
    body::BoxError,
    guard::{GuardedIo, MAX_HEAD},
    http2::server,
    interim::WithInterim,
    received::Received,
    request::HttpConn,
};
use crate::{intercept::leaf::Alpn, proxy::DRAIN};
use http::Request;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use std::{
    convert::Infallible,
    pin::{Pin, pin},
    sync::Arc,
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

/// What HTTP/1 reads at once where the VM has many connections: a head that the guard let through, and no less.
const LEAST_BUFFER: usize = MAX_HEAD + 16 * 1024;

/// Serves until the end. `revoked` lets requests under way see their own end first, if the guest lets them.
pub(crate) async fn serve<S>(conn: HttpConn, stream: S, revoked: CancellationToken)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let patience = conn.shared.config.timeouts.keep_alive;
    let stopped = conn.shared.stop.clone();
    let stop = async move {
        tokio::select! {
            () = revoked.cancelled() => {}
            () = stopped.cancelled() => {}
        }
    };
    let served = match conn.alpn {
        Alpn::Http1 => http1(conn, stream, stop, patience).await.map_err(BoxError::from),
        Alpn::Http2 => http2(conn, stream, stop, patience).await.map_err(BoxError::from),
    };
    if let Err(error) = served {
        tracing::debug!(%error, "a guest's HTTP connection ended");
    }
}

async fn http1<S>(
    conn: HttpConn,
    stream: S,
    stop: impl Future<Output = ()>,
    patience: Duration,
) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let window = conn.entry.guest_windows.take();
    let (stream, interim) = WithInterim::new(stream);
    let stream = GuardedIo::new(stream);
    let conn = Arc::new(conn.guarded(stream.refusal(), stream.switch()));
    let watched = conn.clone();
    let service = service_fn(move |request: Request<hyper::body::Incoming>| {
        let (conn, interim) = (conn.clone(), interim.clone());
        // Made where it stays: it is large, and would be copied to there.
        async move { Ok::<_, Infallible>(conn.handle(request.map(Received::Http1), interim).await) }
    });
    let connection = pin!(
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(patience)
            .half_close(true)
            .preserve_header_case(true)
            .max_buf_size(window.size.of_buffer(LEAST_BUFFER))
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
    );
    finish(&watched, connection, stop, |connection| connection.graceful_shutdown()).await
}

async fn http2<S>(
    conn: HttpConn,
    stream: S,
    stop: impl Future<Output = ()>,
    patience: Duration,
) -> Result<(), h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let window = conn.entry.guest_windows.take();
    let conn = Arc::new(conn);
    let watched = conn.clone();
    let close = CancellationToken::new();
    let connection = pin!(server::serve(conn, stream, window.size, close.clone()));
    // Of HTTP/1 the library sees to it itself.
    let stop = async {
        tokio::select! {
            () = stop => {}
            () = watched.under_way.none_for(patience, &watched.requests) => {}
        }
    };
    finish(&watched, connection, stop, |_| close.cancel()).await
}

/// Waits for the end. A guest that reads nothing is not waited for when it is to end.
async fn finish<C, E>(
    conn: &HttpConn,
    mut connection: Pin<&mut C>,
    stop: impl Future<Output = ()>,
    end: impl FnOnce(Pin<&mut C>),
) -> Result<(), E>
where
    C: Future<Output = Result<(), E>>,
{
    let overdue = conn.under_way.overdue(&conn.entry.live, conn.shared.config.timeouts.idle, DRAIN);
    let (stop, overdue) = (pin!(stop), pin!(overdue));
    tokio::select! {
        biased;
        () = overdue => return Ok(()),
        () = stop => end(connection.as_mut()),
        ended = connection.as_mut() => return ended,
    }
    timeout(DRAIN, connection).await.unwrap_or(Ok(()))
}
