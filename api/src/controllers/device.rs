//! Device login: a code for a program without a browser, and the polling for its token.

use super::snapshots::Data;
use crate::http::{ApiError, AppState, Code, NoFields, Params, Peer, time};
use axum::Json;
use axum::extract::State;
use axum::http::Method;
use serde::Serialize;
use tapgate_store::DeviceState;

#[derive(Serialize)]
pub(crate) struct CodeView {
    code: String,
    verification_uri: String,
    expires_at: String,
}

#[derive(Serialize)]
pub(crate) struct PollView {
    status: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    token: Option<String>,
}

pub(crate) async fn code(
    State(state): State<AppState>,
    peer: Peer,
    params: Params,
    _: NoFields,
) -> Result<Json<Data<CodeView>>, ApiError> {
    params.finish()?;
    state.limits().device.take(&peer)?;
    let made = state.store().device_code(&peer.to_string()).await?;
    let made = made.ok_or_else(|| ApiError::rate_limited(60))?;
    let data = CodeView {
        code: made.code,
        verification_uri: format!("{}/activate", state.settings().public_url),
        expires_at: time(made.expires_at),
    };
    Ok(Json(Data { data }))
}

pub(crate) async fn poll(
    State(state): State<AppState>,
    peer: Peer,
    method: Method,
    mut params: Params,
) -> Result<Json<Data<PollView>>, ApiError> {
    let code = params.text("code");
    params.finish()?;
    state.limits().device.take(&peer)?;
    let missing = || ApiError::new(Code::InvalidParameter, "The query parameter `code` is required");
    let (code, limit) = (code.ok_or_else(missing)?, state.settings().quotas.keys);
    // The token is for who reads the answer: HEAD takes nothing.
    let polled = match method {
        Method::HEAD => DeviceState::Pending,
        _ => state.store().device_poll(&code, &peer.to_string(), limit).await?,
    };
    let data = match polled {
        DeviceState::Authorized(token) => PollView { status: "authorized", token: Some(token) },
        DeviceState::Expired => PollView { status: "expired", token: None },
        DeviceState::Pending => PollView { status: "pending", token: None },
    };
    Ok(Json(Data { data }))
}
