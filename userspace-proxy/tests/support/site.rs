//! The world's own HTTP servers: what they answer, and what they and the attacker saw.

use super::ATTACKER;
use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::{
    convert::Infallible,
    net::Ipv4Addr,
    sync::{Arc, Mutex},
};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};

/// A request as a server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub server: Ipv4Addr,
    pub line: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

/// Everything that servers saw, raw bytes of the attacker's included.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<(Vec<Seen>, Vec<u8>)>>);

impl Log {
    pub fn seen(&self) -> Vec<Seen> {
        self.0.lock().unwrap().0.clone()
    }
    pub fn forget(&self) {
        self.0.lock().unwrap().0.clear();
    }
    pub fn attacker_got(&self, needle: &str) -> bool {
        let log = self.0.lock().unwrap();
        log.1.windows(needle.len()).any(|window| window == needle.as_bytes())
    }
}

/// A stream whose input at the attacker's address is kept.
pub(super) struct Tap<S> {
    pub(super) inner: S,
    pub(super) log: Log,
    pub(super) at: Ipv4Addr,
}

impl<S: AsyncRead + Unpin> AsyncRead for Tap<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let polled = std::pin::Pin::new(&mut self.inner).poll_read(cx, buf);
        if self.at == ATTACKER {
            self.log.0.lock().unwrap().1.extend_from_slice(&buf.filled()[before..]);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.inner).poll_write(cx, buf)
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

pub(super) async fn http_on<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    log: Log,
    at: Ipv4Addr,
    http2: bool,
) {
    let service = hyper::service::service_fn(move |request| answer(request, log.clone(), at));
    let io = TokioIo::new(stream);
    if http2 {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(io, service)
            .await;
    } else {
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await;
    }
}

/// Echoes the request's headers and body; the path says in what coding.
async fn answer(
    mut request: Request<hyper::body::Incoming>,
    log: Log,
    at: Ipv4Addr,
) -> Result<Response<http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>>, Infallible> {
    if request.headers().contains_key("upgrade") && request.uri().path() != "/no-websocket" {
        return Ok(websocket(request, log, at));
    }
    let path = request.uri().path().to_owned();
    let line = format!("{} {} {:?}", request.method(), request.uri(), request.version());
    let headers = request.headers().clone();
    let collected = request.body_mut().collect().await.map(|all| (all.trailers().cloned(), all.to_bytes()));
    let (trailers, body) = collected.unwrap_or_default();
    let mut echo: String =
        headers.iter().map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap())).collect();
    for (name, value) in trailers.iter().flatten() {
        echo += &format!("trailer {name}: {}\n", value.to_str().unwrap());
    }
    echo += std::str::from_utf8(&body).unwrap_or("(binary)");
    log.0.lock().unwrap().0.push(Seen { server: at, line, headers: headers.clone(), body });
    if path == "/late" {
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    }
    let coding = path.strip_prefix("/coded/");
    let bytes = match coding {
        Some(coding) => encode(coding, echo.as_bytes()).await,
        None => echo.into_bytes(),
    };
    // In small pieces, so that values are split.
    let size = if request.version() == http::Version::HTTP_2 { 64 } else { 7 };
    let pieces: Vec<_> =
        bytes.chunks(size).map(|c| Ok(http_body::Frame::data(Bytes::copy_from_slice(c)))).collect();
    let sum = [("x-sum", headers.get("authorization"))].into_iter();
    let sum: HeaderMap = sum.filter_map(|(k, v)| Some((k.parse().ok()?, v?.clone()))).collect();
    let sum = (path == "/trailers").then(|| Ok(http_body::Frame::trailers(sum)));
    let body = http_body_util::StreamBody::new(futures_util::stream::iter(pieces.into_iter().chain(sum)));
    let mut response = Response::new(body.boxed_unsync());
    if path == "/trailers" {
        response.headers_mut().insert("trailer", "x-sum".parse().unwrap());
    }
    if path == "/length" {
        *response.body_mut() = Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync();
    }
    if let Some(coding) = coding {
        response.headers_mut().insert("content-encoding", coding.parse().unwrap());
    }
    if let Some(authorization) = headers.get("authorization") {
        response.headers_mut().insert("x-echo", authorization.clone());
        let location = format!("https://elsewhere.example/?t={}", authorization.to_str().unwrap());
        response.headers_mut().insert("location", location.parse().unwrap());
    }
    response.headers_mut().insert("alt-svc", "h3=\":443\"".parse().unwrap());
    Ok(response)
}

fn websocket(
    mut request: Request<hyper::body::Incoming>,
    log: Log,
    at: Ipv4Addr,
) -> Response<http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>> {
    let upgrade = hyper::upgrade::on(&mut request);
    let seen = Seen {
        server: at,
        line: format!("{} {}", request.method(), request.uri()),
        headers: request.headers().clone(),
        body: Bytes::new(),
    };
    log.0.lock().unwrap().0.push(seen);
    let key = request.headers().get("sec-websocket-key").map_or(&b""[..], |key| key.as_bytes());
    let key = if request.uri().path() == "/wrong-accept" { b"another" } else { key };
    let accept = [key, b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    let accept = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &accept);
    let accept = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, accept);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        let mut buffer = [0; 64];
        while let Ok(length @ 1..) = stream.read(&mut buffer).await {
            stream.write_all(&buffer[..length]).await.unwrap();
        }
    });
    Response::builder()
        .status(101)
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-accept", accept)
        .body(Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync())
        .unwrap()
}

async fn encode(coding: &str, bytes: &[u8]) -> Vec<u8> {
    use async_compression::tokio::bufread as codecs;
    let mut out = Vec::new();
    match coding {
        "gzip" => codecs::GzipEncoder::new(bytes).read_to_end(&mut out).await,
        "deflate" => codecs::ZlibEncoder::new(bytes).read_to_end(&mut out).await,
        "br" => codecs::BrotliEncoder::new(bytes).read_to_end(&mut out).await,
        "zstd" => codecs::ZstdEncoder::new(bytes).read_to_end(&mut out).await,
        _ => return bytes.to_vec(),
    }
    .unwrap();
    out
}
