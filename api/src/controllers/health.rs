//! `/healthz`: whether the daemon can do its work.

use crate::http::{ApiError, AppState};
use axum::Json;
use axum::extract::State;
use serde_json::{Value, json};

pub(crate) async fn get(State(state): State<AppState>) -> Result<Json<Value>, ApiError> {
    state.store().healthy().await?;
    Ok(Json(json!({ "status": "ok" })))
}
