//! The guest service, 169.254.169.254 port 80: what a guest may learn of itself, and how changes reach it.
//!
//! A guest is known by its address, which the gate has checked. Answers hold placeholders, never secrets. Must not serve
//! anything of another VM, nor anything of the API.

use axum::{
    Json, Router,
    extract::{ConnectInfo, State},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use sha2::{Digest as _, Sha256};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tapgate_proxy::ServiceListeners;
use tokio_util::sync::CancellationToken;

use crate::engine::Guests;

/// How long a question that waits for news is held.
const HOLD: Duration = Duration::from_secs(30);

/// The service's routes.
pub(crate) fn router(guests: Guests) -> Router {
    Router::new()
        .route("/v1/user-data", get(user_data))
        .route("/v1/vm", get(vm))
        .fallback(|| async { (StatusCode::NOT_FOUND, "the guest service has /v1/vm and /v1/user-data\n") })
        .with_state(Arc::new(guests))
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
            let service = router.into_make_service_with_connect_info::<SocketAddr>();
            axum::serve(listener?, service).with_graceful_shutdown(stop.cancelled_owned()).await
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

async fn vm(State(guests): State<Arc<Guests>>, ConnectInfo(peer): ConnectInfo<SocketAddr>) -> Response {
    match guests.by_address(peer.ip()) {
        Some(vm) => Json(serde_json::json!({ "id": vm })).into_response(),
        None => StatusCode::FORBIDDEN.into_response(),
    }
}

/// The seed's user-data as it would be now. With `If-None-Match` the answer waits until it differs, 30 s at most, then 304.
async fn user_data(
    State(guests): State<Arc<Guests>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    headers: HeaderMap,
) -> Response {
    let Some(vm) = guests.by_address(peer.ip()) else { return StatusCode::FORBIDDEN.into_response() };
    let known = headers.get(header::IF_NONE_MATCH).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let mut news = guests.news();
    let deadline = tokio::time::Instant::now() + HOLD;
    loop {
        news.mark_unchanged();
        let text = match guests.user_data(&vm).await {
            Ok(text) => text,
            Err(error) => {
                tracing::error!(%vm, %error, "guest_service.user_data_unreadable");
                return StatusCode::SERVICE_UNAVAILABLE.into_response();
            }
        };
        let tag: String = Sha256::digest(&text).iter().take(16).map(|byte| format!("{byte:02x}")).collect();
        let tag = format!("\"{tag}\"");
        let headers = [(header::ETAG, tag.clone())];
        if known.as_ref() != Some(&tag) {
            return (headers, text).into_response();
        }
        let changed = tokio::select! {
            () = guests.stopped() => false,
            changed = tokio::time::timeout_at(deadline, news.changed()) => matches!(changed, Ok(Ok(()))),
        };
        if !changed {
            return (StatusCode::NOT_MODIFIED, headers).into_response();
        }
    }
}
