//! The side of a client: many requests at a time on one connection, each with what comes before its answer.

use super::{
    MAX_FRAME, Streamed,
    outbox::Outbox,
    ping::{Activity, KeepAlive, Patience},
    pipe::Pipe,
    set_content_length, strip_connection,
};
use crate::{http::body::Body, window::Size};
use bytes::Bytes;
use h2::{
    Reason,
    client::{Builder, ResponseFuture, SendRequest},
};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::Body as _;
use std::{
    future::poll_fn,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::Mutex,
    task::AbortHandle,
};

/// Longest head of an answer.
const MAX_HEAD: u32 = 256 * 1024;
/// Streams that are begun before the server has said how many it takes.
const FIRST_STREAMS: usize = 100;
/// Streams that may be reset for the server's errors before the connection is given up.
const RESETS: usize = 1024;
/// What of a stream may wait for the connection's task.
const MAX_SEND: usize = 1024 * 1024;
const PATIENCE: Patience =
    Patience { interval: Duration::from_secs(30), answer: Duration::from_secs(20), idle: false };

/// A handle on one connection; it ends when all are dropped and no stream is open. A request waits its turn where the server
/// takes no more at a time, so that it is given back if the connection ends before.
#[derive(Clone)]
pub(crate) struct Sender {
    requests: Arc<Mutex<SendRequest<Bytes>>>,
    /// It takes no more requests.
    ended: Arc<AtomicBool>,
    outbox: Outbox,
    activity: Activity,
}

/// Begins HTTP/2 on a stream.
pub(crate) async fn begin<S>(stream: S, size: Size) -> Result<Sender, h2::Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let outbox = Outbox::new();
    let (requests, mut connection) = Builder::new()
        .initial_window_size(size.of_stream())
        .initial_connection_window_size(size.of_connection())
        .max_frame_size(MAX_FRAME)
        .max_header_list_size(MAX_HEAD)
        .max_send_buffer_size(MAX_SEND)
        .initial_max_send_streams(FIRST_STREAMS)
        .max_local_error_reset_streams(Some(RESETS))
        .enable_push(false)
        .handshake(outbox.of(stream))
        .await?;
    let mut alive = KeepAlive::new(connection.ping_pong(), PATIENCE);
    let activity = alive.activity();
    let ended = Arc::<AtomicBool>::default();
    let ours = (outbox.clone(), ended.clone());
    tokio::spawn(async move {
        let end = poll_fn(|cx| match alive.poll(cx) {
            Poll::Ready(()) => Poll::Ready(Ok(())),
            Poll::Pending => Pin::new(&mut connection).poll(cx),
        });
        if let Err(error) = end.await {
            tracing::debug!(%error, "an upstream's HTTP/2 connection ended");
        }
        let (outbox, ended) = ours;
        ended.store(true, Ordering::Release);
        outbox.close();
    });
    Ok(Sender { requests: Arc::new(Mutex::new(requests)), ended, outbox, activity })
}

/// Ends a body's task with the wait for the answer, or with an answer that is dropped before its end. With the last of its
/// handles the stream is reset.
pub(super) struct Sending(Option<AbortHandle>);

impl Drop for Sending {
    fn drop(&mut self) {
        if let Some(task) = &self.0 {
            task.abort();
        }
    }
}

impl Sending {
    /// The answer was whole: the rest of the body may come after it.
    pub(super) fn let_go(&mut self) {
        self.0 = None;
    }
}

impl Sender {
    /// Whether it takes requests still. One that is being sent now is no hindrance; but whoever was given a request back is never
    /// told to try here again, though others hold the lock: they would hand it to each other for good.
    pub(crate) fn is_open(&self) -> bool {
        if self.ended.load(Ordering::Acquire) {
            return false;
        }
        let Ok(mut requests) = self.requests.try_lock() else { return true };
        !matches!(requests.poll_ready(&mut Context::from_waker(Waker::noop())), Poll::Ready(Err(_)))
    }

    /// Sends; gives the request back if none of it was sent. `heard` is called with each head that comes before the answer.
    pub(crate) async fn send(
        &self,
        request: Request<Body>,
        heard: impl Fn(StatusCode, &HeaderMap),
    ) -> Result<Response<Streamed>, (h2::Error, Option<Request<Body>>)> {
        let open = self.activity.open();
        let (answer, sending) = {
            let mut requests = self.requests.lock().await;
            if let Err(error) = poll_fn(|cx| requests.poll_ready(cx)).await {
                self.ended.store(true, Ordering::Release);
                return Err((error, Some(request)));
            }
            let (mut parts, body) = request.into_parts();
            strip_connection(&mut parts.headers);
            let no_body =
                matches!(parts.method, Method::GET | Method::HEAD | Method::DELETE | Method::CONNECT);
            if let Some(length) = body.size_hint().exact().filter(|length| *length > 0 || !no_body) {
                set_content_length(&mut parts.headers, length);
            }
            let path = parts.uri.path_and_query().map_or(0, |path| path.as_str().len());
            // It has to carry its place, and without one any type would be taken too (RFC 9110 §12.5.1).
            if parts.headers.is_empty() {
                parts.headers.insert(header::ACCEPT, HeaderValue::from_static("*/*"));
            }
            if self.outbox.head(&mut parts.headers, path).await.is_none() {
                return Err((Reason::CANCEL.into(), Some(Request::from_parts(parts, body))));
            }
            let ended = body.is_end_stream();
            let head = Request::from_parts(parts, ());
            let (answer, to) = requests.send_request(head, ended).map_err(|error| (error, None))?;
            // Where the server takes no more at a time, this waits until it takes this one. That the connection ends meanwhile
            // says nothing of this request, which may be on its way: its answer does.
            let _ = poll_fn(|cx| requests.poll_ready(cx)).await;
            let rest = if ended {
                None
            } else {
                begun(Pipe::new(body, to, self.outbox.clone(), self.activity.open())).await
            };
            (answer, Sending(rest))
        };
        let answer = heads(answer, heard).await.map_err(|error| (error, None))?;
        open.note();
        let (parts, stream) = answer.into_parts();
        let body = Streamed::new(stream, &parts.headers, open).answering(sending);
        Ok(Response::from_parts(parts, body))
    }
}

/// Writes as much of a body as goes at once, and the rest by a task of its own.
async fn begun(mut pipe: Pipe) -> Option<AbortHandle> {
    let log = |ended: Result<(), h2::Error>| {
        if let Err(error) = ended {
            tracing::debug!(%error, "a request's body was not taken whole");
        }
    };
    match poll_fn(|cx| Poll::Ready(Pin::new(&mut pipe).poll(cx))).await {
        Poll::Ready(ended) => {
            log(ended);
            None
        }
        Poll::Pending => Some(tokio::spawn(async move { log(pipe.await) }).abort_handle()),
    }
}

/// The answer. One is only asked for when nothing can come before it any more: the library leaves out what it finds on its way.
async fn heads(
    mut answer: ResponseFuture,
    heard: impl Fn(StatusCode, &HeaderMap),
) -> Result<Response<h2::RecvStream>, h2::Error> {
    poll_fn(|cx| {
        while let Some(Ok(head)) = ready!(answer.poll_informational(cx)) {
            let (parts, ()) = head.into_parts();
            heard(parts.status, &parts.headers);
        }
        Pin::new(&mut answer).poll(cx)
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{http::body::full, window::Windows};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    #[tokio::test]
    async fn what_gave_a_request_back_is_not_open_though_its_lock_is_held() {
        let (ours, theirs) = tokio::io::duplex(4096);
        let served = tokio::spawn(async move {
            let mut served = h2::server::handshake(theirs).await.unwrap();
            served.abrupt_shutdown(Reason::NO_ERROR);
            while served.accept().await.is_some() {}
        });
        let sender = begin(ours, Windows::default().take().size).await.unwrap();
        served.await.unwrap();
        let sent =
            sender.send(Request::get("https://a.example/").body(full(Bytes::new())).unwrap(), |_, _| ());
        assert!(matches!(sent.await, Err((_, Some(_)))));
        let _another_is_sending = sender.requests.lock().await;
        assert!(!sender.is_open());
    }

    fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
        let length = u8::try_from(payload.len()).unwrap();
        [&[0, 0, length, kind, flags, 0, 0, 0, stream], payload].concat()
    }

    /// Reads until the head of this stream.
    async fn head_of(stream: u8, from: &mut (impl tokio::io::AsyncRead + Unpin)) {
        loop {
            let mut head = [0; 9];
            from.read_exact(&mut head).await.unwrap();
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            from.read_exact(&mut vec![0; length as usize]).await.unwrap();
            if (head[3], head[8]) == (1, stream) {
                return;
            }
        }
    }

    /// A server that lets a connection go says at first that it still takes what is on its way (RFC 9113 §6.8). A request that
    /// waited for its turn meanwhile, and was sent, is not taken for one that the server did not look at.
    #[tokio::test]
    async fn a_request_that_was_sent_after_all_is_answered_though_the_server_lets_go() {
        let (ours, mut theirs) = tokio::io::duplex(4096);
        let (waits, waiting) = tokio::sync::oneshot::channel();
        let (sent, first) = tokio::sync::oneshot::channel();
        let served = tokio::spawn(async move {
            theirs.read_exact(&mut [0; 24]).await.unwrap();
            let one_at_a_time = [0, 3, 0, 0, 0, 1];
            theirs.write_all(&frame(4, 0, 0, &one_at_a_time)).await.unwrap();
            head_of(1, &mut theirs).await;
            sent.send(()).unwrap();
            waiting.await.unwrap();
            let go_away = frame(7, 0, 0, &[0x7f, 0xff, 0xff, 0xff, 0, 0, 0, 0]);
            let answer = |stream| frame(1, 5, stream, &[0x88]);
            theirs.write_all(&[go_away, answer(1)].concat()).await.unwrap();
            head_of(3, &mut theirs).await;
            theirs.write_all(&answer(3)).await.unwrap();
        });
        let sender = begin(ours, Windows::default().take().size).await.unwrap();
        let request = || Request::post("https://a.example/").body(full(Bytes::from_static(b"body"))).unwrap();
        let one = tokio::spawn({
            let (sender, request) = (sender.clone(), request());
            async move { sender.send(request, |_, _| ()).await.map(|answer| answer.status()).ok() }
        });
        first.await.unwrap();
        let other = sender.send(request(), |_, _| ());
        let later = async {
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
            waits.send(()).unwrap();
        };
        let (answer, ()) = tokio::join!(other, later);
        assert_eq!(answer.map_err(|(error, _)| error).unwrap().status(), StatusCode::OK);
        assert_eq!(one.await.unwrap(), Some(StatusCode::OK));
        served.await.unwrap();
    }
}
