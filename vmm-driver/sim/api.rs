//! HTTP over the Unix socket: one handler for each request, strict about what it is.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::sync::Arc;
use tokio::net::UnixListener;

/// A request as the specifications know it.
pub struct Call {
    pub method: String,
    pub path: String,
    pub body: Value,
}

/// What is answered: a body or none, or words of refusal.
pub type Answer = Result<Option<Value>, String>;

pub fn serve(listener: UnixListener, handle: impl Fn(Call) -> Answer + Send + Sync + 'static) {
    let handle = Arc::new(handle);
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let handle = handle.clone();
            let service = service_fn(move |request| answer(request, handle.clone()));
            tokio::spawn(
                hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
            );
        }
    });
}

async fn answer(
    request: Request<Incoming>,
    handle: Arc<impl Fn(Call) -> Answer>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let (head, body) = request.into_parts();
    let bytes = body.collect().await.unwrap().to_bytes();
    let body = match bytes.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&bytes).unwrap_or(Value::String("not JSON".into())),
    };
    let call = Call { method: head.method.to_string(), path: head.uri.to_string(), body };
    let what = format!("{} {}", call.method, call.path);
    let (status, body) = match handle(call) {
        Ok(Some(body)) => (200, body.to_string()),
        Ok(None) => (204, String::new()),
        Err(words) => {
            eprintln!("refused {what}: {words}");
            (400, json!({ "fault_message": words }).to_string())
        }
    };
    Ok(Response::builder().status(status).body(Full::new(Bytes::from(body))).unwrap())
}
