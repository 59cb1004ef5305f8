//! Device login: a code for a program without a browser, and the polling for its token.

use super::snapshots::Data;
use crate::http::{ApiError, AppState, Params, time};
use axum::Json;
use axum::extract::{ConnectInfo, FromRequestParts, State};
use axum::http::request::Parts;
use serde::Serialize;
use std::convert::Infallible;
use std::net::SocketAddr;
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

/// The address that a request came from: what a code is bound to.
pub(crate) struct Requester(pub(crate) String);

impl<S: Send + Sync> FromRequestParts<S> for Requester {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, Infallible> {
        let peer = parts.extensions.get::<ConnectInfo<SocketAddr>>();
        Ok(Self(
            peer.map_or_else(
                || "unknown".to_owned(),
                |ConnectInfo(peer)| peer.ip().to_canonical().to_string(),
            ),
        ))
    }
}

pub(crate) async fn code(
    State(state): State<AppState>,
    Requester(requester): Requester,
    params: Params,
) -> Result<Json<Data<CodeView>>, ApiError> {
    params.finish()?;
    let made = state.store().device_code(&requester).await?;
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
    Requester(requester): Requester,
    mut params: Params,
) -> Result<Json<Data<PollView>>, ApiError> {
    let code = params.text("code");
    params.finish()?;
    let missing = || ApiError::bad_request("invalid_parameter", "The query parameter `code` is required");
    let data = match state.store().device_poll(&code.ok_or_else(missing)?, &requester).await? {
        DeviceState::Authorized(token) => PollView { status: "authorized", token: Some(token) },
        DeviceState::Expired => PollView { status: "expired", token: None },
        DeviceState::Pending => PollView { status: "pending", token: None },
    };
    Ok(Json(Data { data }))
}
