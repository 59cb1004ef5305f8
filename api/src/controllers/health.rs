//! `/healthz`: whether the daemon can do its work. Anybody may ask, so the store's writer is asked once a second at most.

use crate::http::{ApiError, AppState, Params};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

pub(crate) async fn get(State(state): State<AppState>, params: Params) -> Result<Json<Value>, ApiError> {
    params.finish()?;
    state.health().ask(state.store()).await?;
    Ok(Json(json!({ "status": "ok" })))
}
