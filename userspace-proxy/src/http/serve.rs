//! Serves HTTP on one stream of a guest, until it ends, the rules cut it, or the daemon stops.

use super::{
    guard::{GuardedIo, MAX_HEAD},
    interim::WithInterim,
    request::HttpConn,
};
use crate::{intercept::leaf::Alpn, proxy::DRAIN};
use hyper::{
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
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

/// Streams of one HTTP/2 connection at one time.
const STREAMS: u32 = 128;
/// Streams that a guest may reset before the connection is closed: a rapid reset costs it the connection.
const RESETS: usize = 64;
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
        Alpn::Http1 => http1(conn, stream, stop, patience).await,
        Alpn::Http2 => http2(conn, stream, stop, patience).await,
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
    let conn = Arc::new(conn.guarded(stream.refusal(), stream.switch(), interim));
    let watched = conn.clone();
    let service = service_fn(move |request| {
        let conn = conn.clone();
        async move { Ok::<_, Infallible>(conn.handle(request).await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience)
        .half_close(true)
        .preserve_header_case(true)
        .max_buf_size(window.size.of_buffer(LEAST_BUFFER))
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades();
    finish(&watched, connection, stop, |connection| connection.graceful_shutdown()).await
}

async fn http2<S>(
    conn: HttpConn,
    stream: S,
    stop: impl Future<Output = ()>,
    patience: Duration,
) -> Result<(), hyper::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let window = conn.entry.guest_windows.take();
    let conn = Arc::new(conn);
    let watched = conn.clone();
    let service = service_fn(move |request| {
        let conn = conn.clone();
        async move { Ok::<_, Infallible>(conn.handle(request).await) }
    });
    let connection = http2::Builder::new(TokioExecutor::new())
        .timer(TokioTimer::new())
        .enable_connect_protocol()
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(RESETS)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .max_send_buf_size(256 * 1024)
        .initial_stream_window_size(window.size.of_stream())
        .initial_connection_window_size(window.size.of_connection())
        .keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(30))
        .serve_connection(TokioIo::new(stream), service);
    // Of HTTP/1 the library sees to it itself.
    let stop = async {
        tokio::select! {
            () = stop => {}
            () = watched.under_way.none_for(patience, &watched.requests) => {}
        }
    };
    finish(&watched, connection, stop, |connection| connection.graceful_shutdown()).await
}

/// Waits for the end. A guest that reads nothing is not waited for when it is to end.
async fn finish<C>(
    conn: &HttpConn,
    connection: C,
    stop: impl Future<Output = ()>,
    end: impl FnOnce(Pin<&mut C>),
) -> Result<(), hyper::Error>
where
    C: Future<Output = Result<(), hyper::Error>>,
{
    let overdue = conn.under_way.overdue(&conn.entry.live, conn.shared.config.timeouts.idle, DRAIN);
    let (mut connection, stop, overdue) = (pin!(connection), pin!(stop), pin!(overdue));
    tokio::select! {
        biased;
        () = overdue => return Ok(()),
        () = stop => end(connection.as_mut()),
        ended = connection.as_mut() => return ended,
    }
    timeout(DRAIN, connection).await.unwrap_or(Ok(()))
}
