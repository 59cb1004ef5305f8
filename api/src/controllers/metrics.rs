//! `/metrics`, for the operator's monitoring. It tells of every account's VMs, so an account's key does not open it: the
//! token in `data_dir/metrics.token` does.

use crate::http::metrics::{Now, Token, expose};
use crate::http::{ApiError, AppState, Params, Peer, bearer};
use axum::extract::State;
use axum::http::{HeaderMap, header};
use axum::response::{IntoResponse as _, Response};
use std::collections::HashMap;

const TEXT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

pub(crate) async fn get(
    State(state): State<AppState>,
    peer: Peer,
    params: Params,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    params.finish()?;
    let limits = state.limits();
    limits.refused.peek(&peer)?;
    let given = bearer(&headers).map(Token::of);
    let Ok(given) = given else {
        limits.refused.take(&peer)?;
        return Err(ApiError::unauthorized("Send the token of DATA_DIR/metrics.token as `Bearer`"));
    };
    if state.settings().metrics_token.as_ref() != Some(&given) {
        limits.refused.take(&peer)?;
        return Err(ApiError::unauthorized("This is not the token of DATA_DIR/metrics.token"));
    }
    let now = gather(&state).await?;
    let text = expose(state.metrics(), now).map_err(|_| ApiError::internal())?;
    Ok(([(header::CONTENT_TYPE, TEXT)], text).into_response())
}

async fn gather(state: &AppState) -> Result<Now, ApiError> {
    let store = state.store();
    let unreadable = |error| {
        tracing::error!(%error, "metrics.counters_unreadable");
        ApiError::internal()
    };
    let traffic = state.engine().all_counters().await.map_err(unreadable)?;
    let stray = state.engine().stray_counters().await.map_err(unreadable)?;
    // Those that are gone would only ever become more.
    let living: HashMap<_, _> = store.vms_living_states().await?.into_iter().collect();
    let mut dropped = store.audit().dropped_all().await?;
    dropped.retain(|vm, _| living.contains_key(vm));
    let mut vms = HashMap::new();
    for detail in living.into_values() {
        *vms.entry(detail).or_insert(0) += 1;
    }
    Ok(Now {
        vms: vms.into_iter().collect(),
        queues: store.load(),
        audit: store.audit().load(),
        dropped,
        traffic: traffic.into_iter().map(|of| (of.vm.clone(), of.into())).collect(),
        stray: stray.map(Into::into),
    })
}
