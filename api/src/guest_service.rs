//! The guest service, 169.254.169.254 port 80: what a guest may learn of itself, and how changes reach it.
//!
//! A guest is known by its address, which the gate has checked. Answers hold placeholders, never secrets. Must not serve
//! anything of another VM, nor anything of the API; what a guest reports changes its own agent alone.

mod answers;
mod server;

use answers::{Answers, Octets};
use axum::{
    Json, Router,
    body::{Body, Bytes},
    extract::{ConnectInfo, DefaultBodyLimit, Query, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, put},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tapgate_model::HostName;
use tapgate_proxy::ServiceListeners;
use tapgate_store::AgentStatus;
use tokio_util::sync::CancellationToken;

use crate::engine::{
    Guests,
    agents::{AgentError, MAX_LOG},
};

/// The largest report.
const MAX_REPORT: usize = 16 << 10;

/// How long a question that waits for news is held.
const HOLD: Duration = Duration::from_secs(30);

/// What the routes work with.
struct Service {
    guests: Guests,
    answers: Answers,
}

/// The service's routes.
pub(crate) fn router(guests: Guests) -> Router {
    Router::new()
        .route("/v1/user-data", get(user_data))
        .route("/v1/vm", get(vm))
        .route("/v1/agent", get(agent))
        .route("/v1/agent/status", put(agent_status).layer(DefaultBodyLimit::max(MAX_REPORT)))
        .route("/v1/agent/log", put(agent_log).layer(DefaultBodyLimit::max(MAX_LOG)))
        .route("/v1/git-credential", get(git_credential))
        .fallback(|| async {
            (StatusCode::NOT_FOUND, "the guest service has /v1/vm, /v1/user-data and /v1/agent\n")
        })
        .with_state(Arc::new(Service { guests, answers: Answers::new() }))
}

/// Serves both families until told to stop.
pub(crate) async fn serve(
    listeners: ServiceListeners,
    router: Router,
    stop: CancellationToken,
) -> std::io::Result<()> {
    let serve = |listener: std::net::TcpListener| {
        let (router, stop) = (router.clone(), stop.clone());
        async move {
            let listener =
                listener.set_nonblocking(true).and_then(|()| tokio::net::TcpListener::from_std(listener));
            server::serve(listener?, router, stop).await;
            std::io::Result::Ok(())
        }
    };
    let v6 = listeners.v6.map(&serve);
    tokio::try_join!(serve(listeners.v4), async {
        match v6 {
            Some(v6) => v6.await,
            None => Ok(()),
        }
    })?;
    Ok(())
}

async fn vm(State(service): State<Arc<Service>>, ConnectInfo(peer): ConnectInfo<SocketAddr>) -> Response {
    match service.guests.by_address(peer.ip()) {
        Some(vm) => Json(serde_json::json!({ "id": vm })).into_response(),
        None => StatusCode::FORBIDDEN.into_response(),
    }
}

/// The seed's user-data as it would be now. With `If-None-Match` the answer waits until it differs, 30 s at most, then 304.
async fn user_data(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let Some(vm) = service.guests.by_address(peer.ip()) else { return StatusCode::FORBIDDEN.into_response() };
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let mut news = service.guests.news();
    let deadline = tokio::time::Instant::now() + HOLD;
    loop {
        news.mark_unchanged();
        let text = match service.answers.user_data(&service.guests, &vm).await {
            Ok(text) => text,
            Err(error) => {
                tracing::error!(%vm, %error, "guest_service.user_data_unreadable");
                return StatusCode::SERVICE_UNAVAILABLE.into_response();
            }
        };
        let tag: String =
            Sha256::digest(text.as_bytes()).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let tag = format!("\"{tag}\"");
        let headers = [(header::ETAG, tag.clone())];
        if known.as_ref() != Some(&tag) {
            let kind = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
            return (headers, kind, body(text)).into_response();
        }
        drop(text);
        let changed = tokio::select! {
            () = service.guests.stopped() => false,
            changed = tokio::time::timeout_at(deadline, news.changed()) => matches!(changed, Ok(Ok(()))),
        };
        if !changed {
            return (StatusCode::NOT_MODIFIED, headers).into_response();
        }
    }
}

/// All connections send the same octets.
fn body(text: Arc<str>) -> Body {
    Body::from(Bytes::from_owner(Octets(text)))
}

impl IntoResponse for AgentError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::None => StatusCode::NOT_FOUND,
            Self::Order(_) => StatusCode::CONFLICT,
            Self::Often => StatusCode::TOO_MANY_REQUESTS,
            Self::Internal(error) => {
                tracing::error!(%error, "guest_service.agent_failed");
                // The records' faults are none of the guest's business.
                return StatusCode::SERVICE_UNAVAILABLE.into_response();
            }
        };
        (status, format!("{self}\n")).into_response()
    }
}

/// The task of the agent that lives in this VM; 404 where none does.
async fn agent(State(service): State<Arc<Service>>, ConnectInfo(peer): ConnectInfo<SocketAddr>) -> Response {
    let Some(vm) = service.guests.by_address(peer.ip()) else { return StatusCode::FORBIDDEN.into_response() };
    match service.answers.task(&service.guests, &vm).await {
        Ok(task) => ([(header::CONTENT_TYPE, "application/json")], body(task)).into_response(),
        Err(error) => error.into_response(),
    }
}

/// How far the agent is.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Report {
    status: String,
    failure_reason: Option<String>,
}

async fn agent_status(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    body: Bytes,
) -> Response {
    let Some(vm) = service.guests.by_address(peer.ip()) else { return StatusCode::FORBIDDEN.into_response() };
    let report: Result<Report, _> = serde_json::from_slice(&body);
    let read =
        report.ok().and_then(|report| Some((AgentStatus::from_word(&report.status)?, report.failure_reason)));
    let Some((status, failure)) = read else {
        return (StatusCode::UNPROCESSABLE_ENTITY, "send {\"status\": \"running\" or \"idle\"}\n")
            .into_response();
    };
    match service.guests.report(&vm, status, failure).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => error.into_response(),
    }
}

/// The end of what the agent shows, whole; it replaces the one before.
async fn agent_log(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    body: Bytes,
) -> Response {
    let Some(vm) = service.guests.by_address(peer.ip()) else { return StatusCode::FORBIDDEN.into_response() };
    match service.guests.keep_log(&vm, String::from_utf8_lossy(&body).into_owned()).await {
        Ok(()) => StatusCode::NO_CONTENT.into_response(),
        Err(error) => error.into_response(),
    }
}

#[derive(Deserialize)]
struct CredentialOf {
    host: String,
}

/// User and password of git at a host: the password is a placeholder. 404 where no secret names the host.
async fn git_credential(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    Query(CredentialOf { host }): Query<CredentialOf>,
) -> Response {
    let Some(vm) = service.guests.by_address(peer.ip()) else { return StatusCode::FORBIDDEN.into_response() };
    let name = host.split(':').next().unwrap_or_default();
    let Ok(name) = HostName::parse(name) else { return StatusCode::NOT_FOUND.into_response() };
    match service.guests.credential(&vm, &name).await {
        Ok(Some(password)) => {
            Json(serde_json::json!({ "username": "x-access-token", "password": password })).into_response()
        }
        Ok(None) => StatusCode::NOT_FOUND.into_response(),
        Err(error) => error.into_response(),
    }
}
