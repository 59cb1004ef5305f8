//! The world's web hosts: every request is written down with all of its headers, then answered.
//!
//! `/` greets; `/echo` sends back the request's headers and body; `/status/N` answers with N; `/endless` never ends;
//! `/hand-back/WAY` hands a key back; on the git host everything else is git's. Of an attacker's hosts every octet is
//! written down.

use super::{Ends, Shared, git, hand_back, tap::Tapped};
use crate::sites;
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, Limited, StreamBody, combinators::UnsyncBoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Frame, Incoming},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use serde_json::{Value, json};
use std::{convert::Infallible, io, time::Duration};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::TcpStream,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};

/// What is read of a request's body at most.
const MAX_BODY: usize = 64 << 20;
/// Where a key is handed back.
const HAND_BACK: &str = "/hand-back/";
/// What is written down of it.
const NOTED_BODY: usize = 4096;

pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

/// A whole body.
pub(super) fn whole(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).boxed_unsync()
}

/// Serves a connection in clear text.
pub(super) async fn clear(shared: Shared, stream: TcpStream, ends: Ends) {
    if sites::HOSTILE.contains(&ends.site) {
        let stream = Tapped::new(stream, shared.clone(), ends, "wire");
        connection(shared, stream, ends, None).await;
    } else {
        connection(shared, stream, ends, None).await;
    }
}

/// Serves whatever comes: TLS where it begins like that, else clear text.
pub(super) async fn either(shared: Shared, acceptor: TlsAcceptor, stream: TcpStream, ends: Ends) {
    let mut first = [0];
    match stream.peek(&mut first).await {
        Ok(1) if first[0] == 22 => secure(shared, acceptor, stream, ends).await,
        _ => clear(shared, stream, ends).await,
    }
}

/// Serves a connection behind TLS; the name that was asked for is written down even if nothing follows.
pub(super) async fn secure(shared: Shared, acceptor: TlsAcceptor, stream: TcpStream, ends: Ends) {
    let hostile = sites::HOSTILE.contains(&ends.site);
    if hostile {
        let accepted = acceptor.accept(Tapped::new(stream, shared.clone(), ends, "wire")).await;
        let Some((stream, sni)) = greeted(&shared, ends, accepted) else { return };
        connection(shared.clone(), Tapped::new(stream, shared, ends, "tls"), ends, sni).await;
    } else {
        let accepted = acceptor.accept(stream).await;
        let Some((stream, sni)) = greeted(&shared, ends, accepted) else { return };
        connection(shared, stream, ends, sni).await;
    }
}

/// Writes down how a handshake went; the stream, and the name that was asked for.
fn greeted<S>(
    shared: &Shared,
    ends: Ends,
    accepted: io::Result<TlsStream<S>>,
) -> Option<(TlsStream<S>, Option<String>)> {
    let (sni, fault) = match &accepted {
        Ok(stream) => (stream.get_ref().1.server_name().map(str::to_owned), None),
        Err(error) => (None, Some(error.to_string())),
    };
    shared.journal.note(&json!({
        "kind": "tls", "site": ends.site.name, "local": ends.local, "peer": ends.peer, "sni": sni, "fault": fault,
    }));
    Some((accepted.ok()?, sni))
}

async fn connection<S>(shared: Shared, stream: S, ends: Ends, sni: Option<String>)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let service = service_fn(move |request| {
        let (shared, sni) = (shared.clone(), sni.clone());
        async move { Ok::<_, Infallible>(answer(shared, request, ends, sni).await) }
    });
    // Clients that break off are ordinary here.
    let _ = auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
}

async fn answer(
    shared: Shared,
    request: Request<Incoming>,
    ends: Ends,
    sni: Option<String>,
) -> Response<Body> {
    let (parts, body) = request.into_parts();
    let (trailers, body) = match Limited::new(body, MAX_BODY).collect().await {
        Ok(body) => (body.trailers().cloned(), body.to_bytes()),
        Err(error) => return plain(StatusCode::BAD_REQUEST, format!("the body cannot be read: {error}\n")),
    };
    let listed = |fields: &HeaderMap| -> Vec<(String, String)> {
        fields
            .iter()
            .map(|(name, value)| (name.to_string(), String::from_utf8_lossy(value.as_bytes()).into_owned()))
            .collect()
    };
    let headers = listed(&parts.headers);
    let credentials = headers.iter().find(|(name, _)| name == "authorization").and_then(|(_, v)| basic(v));
    let seen = json!({
        "kind": "http", "site": ends.site.name, "local": ends.local, "peer": ends.peer, "sni": sni,
        "version": format!("{:?}", parts.version), "method": parts.method.as_str(), "target": parts.uri.to_string(),
        "headers": headers, "trailers": trailers.as_ref().map(listed), "basic": credentials,
        "body": String::from_utf8_lossy(&body[..body.len().min(NOTED_BODY)]),
    });
    shared.journal.note(&seen);
    let path = parts.uri.path();
    match path {
        "/" => plain(StatusCode::OK, format!("hello from {}\n", ends.site.name)),
        "/echo" => echo(&headers, &body),
        "/endless" => Response::new(endless()),
        _ if path.starts_with(HAND_BACK) => {
            let key = parts.headers.get("x-key").and_then(|key| key.to_str().ok()).unwrap_or_default();
            hand_back::answer(&path[HAND_BACK.len()..], key).await
        }
        _ if path.starts_with("/status/") => {
            let status =
                path["/status/".len()..].parse().ok().and_then(|code| StatusCode::from_u16(code).ok());
            plain(status.unwrap_or(StatusCode::BAD_REQUEST), format!("{path}\n"))
        }
        _ if ends.site == sites::GIT => git::answer(&shared, &parts, credentials.as_deref(), &body).await,
        _ => plain(StatusCode::NOT_FOUND, format!("nothing at {path}\n")),
    }
}

/// A short text.
pub(super) fn plain(status: StatusCode, text: String) -> Response<Body> {
    let mut response = Response::new(whole(text));
    *response.status_mut() = status;
    response
}

fn echo(headers: &[(String, String)], body: &Bytes) -> Response<Body> {
    let fields: Vec<Value> = headers.iter().map(|(name, value)| json!(format!("{name}: {value}"))).collect();
    let text = json!({ "headers": fields, "body": String::from_utf8_lossy(body) });
    let mut response = Response::new(whole(format!("{text:#}\n")));
    let json = hyper::header::HeaderValue::from_static("application/json");
    response.headers_mut().insert(hyper::header::CONTENT_TYPE, json);
    response
}

/// A kibibyte every few milliseconds, for as long as someone reads.
pub(super) fn endless() -> Body {
    let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Frame<Bytes>, Infallible>>(1);
    tokio::spawn(async move {
        while sender.send(Ok(Frame::data(Bytes::from_static(&[b'.'; 1024])))).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    let frames = futures_stream(receiver);
    StreamBody::new(frames).boxed_unsync()
}

pub(super) fn futures_stream<T>(
    receiver: tokio::sync::mpsc::Receiver<T>,
) -> impl futures_util::Stream<Item = T> {
    futures_util::stream::unfold(receiver, async |mut receiver| {
        let item = receiver.recv().await?;
        Some((item, receiver))
    })
}

/// The `user:password` of a Basic header.
fn basic(value: &str) -> Option<String> {
    let coded = value.strip_prefix("Basic ").or_else(|| value.strip_prefix("basic "))?;
    String::from_utf8(STANDARD.decode(coded.trim()).ok()?).ok()
}
