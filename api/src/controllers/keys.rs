//! API keys: list, make, revoke. A token is shown once, in the answer that makes it.

use crate::http::{
    Account, ApiError, AppState, Fields, Id, List, NoFields, Params, fields_bounded as bounded, time,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_model::ApiKeyId;
use tapgate_store::{ApiKeyRecord, IssuedKey, Page};

#[derive(Serialize)]
pub(crate) struct KeyView {
    id: String,
    name: String,
    token: String,
    created_at: String,
}

impl From<IssuedKey> for KeyView {
    fn from(key: IssuedKey) -> Self {
        let IssuedKey { record, token } = key;
        Self { id: record.id.into(), name: record.name, token, created_at: time(record.created_at) }
    }
}

#[derive(Serialize)]
pub(crate) struct KeySummary {
    id: String,
    name: String,
    created_at: String,
    last_used_at: Option<String>,
}

impl From<ApiKeyRecord> for KeySummary {
    fn from(key: ApiKeyRecord) -> Self {
        Self {
            id: key.id.into(),
            name: key.name,
            created_at: time(key.created_at),
            last_used_at: key.last_used_at.map(time),
        }
    }
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    params: Params,
) -> Result<Json<List<KeySummary>>, ApiError> {
    params.finish()?;
    let items = state.store().keys(&account.user).await?;
    Ok(Json(List::of(Page { items, cursor: None }, Into::into)))
}

pub(crate) async fn create(
    State(state): State<AppState>,
    account: Account,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<KeyView>), ApiError> {
    params.finish()?;
    let name = fields.text("name")?;
    fields.finish()?;
    bounded("name", &name, 64, false)?;
    let key = state.store().key_create(&account.user, &name, state.settings().quotas.keys).await?;
    Ok((StatusCode::CREATED, Json(key.into())))
}

pub(crate) async fn revoke(
    State(state): State<AppState>,
    account: Account,
    Id(key): Id<ApiKeyId>,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    state.store().key_revoke(&account.user, &key).await?;
    Ok(StatusCode::NO_CONTENT)
}
