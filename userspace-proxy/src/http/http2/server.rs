//! The side of a server: accepts a guest's streams, and answers each by a task of its own, with what comes before its answer.

use super::{
    MAX_FRAME, Promise, Streamed, Tunnel,
    outbox::Outbox,
    ping::{Activity, KeepAlive, Open, Patience},
    pipe::Pipe,
    set_content_length, strip_connection,
};
use crate::{
    http::{
        body::Body,
        guard::MAX_HEAD,
        interim::Interim,
        received::Received,
        request::{HttpConn, Untouched},
    },
    window::Size,
};
use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    server::{Builder, SendResponse},
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, header};
use http_body::Body as _;
use jiff::{Timestamp, fmt::rfc2822::DateTimePrinter};
use std::{
    future::poll_fn,
    pin::{Pin, pin},
    sync::Arc,
    task::{Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::oneshot,
};
use tokio_util::sync::CancellationToken;

/// Streams of one connection at one time.
const STREAMS: u32 = 128;
/// Streams that a guest may reset before the connection is closed: a rapid reset costs it the connection.
const RESETS: usize = 64;
/// What of a stream may wait for the connection's task.
const MAX_SEND: usize = 256 * 1024;
const PATIENCE: Patience =
    Patience { interval: Duration::from_secs(60), answer: Duration::from_secs(30), idle: true };

/// Serves until the end. Once it is to close it takes no more streams, and ends with the last.
pub(crate) async fn serve<S>(
    conn: Arc<HttpConn>,
    stream: S,
    size: Size,
    close: CancellationToken,
) -> Result<(), h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let outbox = Outbox::new();
    let mut connection = Builder::new()
        .enable_connect_protocol()
        .max_concurrent_streams(STREAMS)
        .max_pending_accept_reset_streams(RESETS)
        .max_local_error_reset_streams(Some(RESETS))
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(u32::try_from(MAX_HEAD).unwrap_or(u32::MAX))
        .max_send_buffer_size(MAX_SEND)
        .initial_window_size(size.of_stream())
        .initial_connection_window_size(size.of_connection())
        .handshake(outbox.of(stream))
        .await?;
    let mut alive = KeepAlive::new(connection.ping_pong(), PATIENCE);
    let activity = alive.activity();
    let mut close = Some(Box::pin(close.cancelled_owned()));
    poll_fn(|cx| {
        if let Some(waiting) = &mut close
            && waiting.as_mut().poll(cx).is_ready()
        {
            close = None;
            connection.graceful_shutdown();
        }
        if alive.poll(cx).is_ready() {
            connection.abrupt_shutdown(Reason::NO_ERROR);
        }
        loop {
            match ready!(connection.poll_accept(cx)) {
                Some(Ok((request, respond))) => {
                    let open = activity.open();
                    open.note();
                    let ours = (outbox.clone(), activity.clone());
                    tokio::spawn(exchange(conn.clone(), request, respond, ours, open));
                }
                Some(Err(error)) => return Poll::Ready(Err(error)),
                None => return Poll::Ready(Ok(())),
            }
        }
    })
    .await
}

/// What a CONNECT leaves to be kept, if it is granted.
struct Kept {
    from: RecvStream,
    keep: oneshot::Sender<Tunnel>,
    open: Open,
}

/// One request and its answer.
async fn exchange(
    conn: Arc<HttpConn>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    (outbox, activity): (Outbox, Activity),
    open: Open,
) {
    let interim = Interim::default();
    let (mut parts, stream) = request.into_parts();
    let (body, kept) = if parts.method == Method::CONNECT {
        // It has no content (RFC 9110 §9.3.6), and what follows a request in its stead would be taken for some.
        let announced = parts.headers.remove(header::CONTENT_LENGTH);
        if announced.is_some_and(|length| length.as_bytes() != b"0") {
            return respond.send_reset(Reason::PROTOCOL_ERROR);
        }
        let (keep, promise) = Promise::new();
        parts.extensions.insert(promise);
        (Received::Nothing, Some(Kept { from: stream, keep, open }))
    } else {
        let mut body = Streamed::new(stream, &parts.headers, open);
        let expect = parts.headers.get(header::EXPECT);
        if expect.is_some_and(|expect| expect.as_bytes().eq_ignore_ascii_case(b"100-continue")) {
            let interim = interim.clone();
            body = body.asking(move || interim.ask());
        }
        (Received::Http2(body), None)
    };
    let request = Request::from_parts(parts, body);
    let Some(answer) = answered(&conn, request, &interim, &mut respond, &outbox).await else { return };
    if answer.extensions().get::<Untouched>().is_some() {
        // Clients send it again by themselves, which they may not after an answer (RFC 9113 §8.7).
        return respond.send_reset(Reason::REFUSED_STREAM);
    }
    if let Err(error) = reply(answer, respond, kept, outbox, &activity).await {
        tracing::debug!(%error, "a guest did not take an answer whole");
    }
}

/// The answer, unless the guest resets the stream before. What comes before it goes out meanwhile.
async fn answered(
    conn: &Arc<HttpConn>,
    request: Request<Received>,
    interim: &Interim,
    respond: &mut SendResponse<Bytes>,
    outbox: &Outbox,
) -> Option<Response<Body>> {
    let mut handling = pin!(conn.clone().handle(request, interim.clone()));
    let (mut answer, mut waiting) = (None, None::<Pin<Box<dyn Future<Output = _> + Send>>>);
    poll_fn(|cx| {
        if answer.is_none()
            && let Poll::Ready(now) = handling.as_mut().poll(cx)
        {
            answer = Some(now);
        }
        if respond.poll_reset(cx).is_ready() {
            return Poll::Ready(None);
        }
        loop {
            if let Some(head) = &mut waiting {
                if let Some(head) = ready!(head.as_mut().poll(cx))
                    && let Err(error) = respond.send_informational(head)
                {
                    tracing::debug!(%error, "a head before an answer was left out");
                }
                waiting = None;
            }
            match interim.next(cx) {
                Some(head) => waiting = Some(Box::pin(admitted(conn.clone(), outbox.clone(), head))),
                None => break,
            }
        }
        answer.take().map_or(Poll::Pending, |answer| Poll::Ready(Some(answer)))
    })
    .await
}

/// A head before an answer, once there is room for it.
async fn admitted(conn: Arc<HttpConn>, outbox: Outbox, mut head: Response<()>) -> Option<Response<()>> {
    let fields = head.headers_mut();
    strip_connection(fields);
    if fields.is_empty() {
        // It has to carry its share, and a date may stand in any (RFC 9110 §6.6.1).
        set_date(fields);
        if !conn.entry.heads.take_head(fields) {
            return None;
        }
    }
    outbox.head(fields, 0).await.map(|()| head)
}

async fn reply(
    answer: Response<Body>,
    mut respond: SendResponse<Bytes>,
    kept: Option<Kept>,
    outbox: Outbox,
    activity: &Activity,
) -> Result<(), h2::Error> {
    let (mut parts, body) = answer.into_parts();
    strip_connection(&mut parts.headers);
    parts.headers.remove(header::TE);
    set_date(&mut parts.headers);
    let kept = kept.filter(|_| parts.status.is_success());
    if kept.is_some() {
        // What follows is a tunnel's, without a length (RFC 9110 §9.3.6).
        parts.headers.remove(header::CONTENT_LENGTH);
    }
    // One that is nothing but a head is done with here, however long it waits.
    let body = Some(body).filter(|body| kept.is_none() && !body.is_end_stream());
    if let Some(length) = body.as_ref().and_then(|body| body.size_hint().exact()) {
        set_content_length(&mut parts.headers, length);
    }
    {
        let mut room = pin!(outbox.head(&mut parts.headers, 0));
        let room = poll_fn(|cx| match room.as_mut().poll(cx) {
            Poll::Pending => respond.poll_reset(cx).map(|_| None),
            room => room,
        });
        if room.await.is_none() {
            return Ok(());
        }
    }
    let ended = body.is_none() && kept.is_none();
    let to = begin(&mut respond, Response::from_parts(parts, ()), ended)?;
    if let Some(kept) = kept {
        let _ = kept.keep.send(Tunnel::new(kept.from, to, kept.open));
    } else if let Some(body) = body {
        Pipe::new(body, to, outbox, activity.open()).await?;
    }
    Ok(())
}

fn begin(
    respond: &mut SendResponse<Bytes>,
    head: Response<()>,
    ended: bool,
) -> Result<h2::SendStream<Bytes>, h2::Error> {
    respond.send_response(head, ended).inspect_err(|_| respond.send_reset(Reason::INTERNAL_ERROR))
}

fn set_date(headers: &mut HeaderMap) {
    if !headers.contains_key(header::DATE)
        && let Ok(now) = DateTimePrinter::new().timestamp_to_rfc9110_string(&Timestamp::now())
        && let Ok(now) = HeaderValue::try_from(now)
    {
        headers.insert(header::DATE, now);
    }
}
