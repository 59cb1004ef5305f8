//! Environment variables.

use crate::http::{
    Account, ApiError, AppState, Fields, IfMatch, Key, List, NoFields, Params, Versioned, time,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_store::EnvRecord;

/// Longest value in characters: whatever they are, the kernel takes the variable (128 KiB with its name).
const MAX_VALUE: usize = 32_000;

#[derive(Serialize)]
pub(crate) struct EnvView {
    id: String,
    key: String,
    value: String,
    created_at: String,
    updated_at: String,
}

impl From<EnvRecord> for EnvView {
    fn from(env: EnvRecord) -> Self {
        Self {
            id: env.id.into(),
            key: env.key,
            value: env.value,
            created_at: time(env.created_at),
            updated_at: time(env.updated_at),
        }
    }
}

fn versioned(env: EnvRecord) -> Versioned<Json<EnvView>> {
    Versioned(env.version(), Json(env.into()))
}

/// What every shell takes as a variable's name.
fn check_key(key: &str) -> Result<(), ApiError> {
    let first = key.bytes().next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !first || key.len() > 255 || !key.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
        let message = "The key must be letters, digits and underscores, not beginning with a digit";
        return Err(ApiError::validation(message));
    }
    Ok(())
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    mut params: Params,
) -> Result<Json<List<EnvView>>, ApiError> {
    let (limit, cursor) = (params.limit(50, 200)?, params.cursor());
    params.finish()?;
    let page = state.store().env_list(&account.user, limit, cursor).await?;
    Ok(Json(List::of(page, Into::into)))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    account: Account,
    Key(key): Key,
    params: Params,
) -> Result<Versioned<Json<EnvView>>, ApiError> {
    params.finish()?;
    Ok(versioned(state.store().env(&account.user, &key).await?))
}

pub(crate) async fn set(
    State(state): State<AppState>,
    account: Account,
    Key(key): Key,
    IfMatch(expected): IfMatch,
    params: Params,
    mut fields: Fields,
) -> Result<Versioned<Json<EnvView>>, ApiError> {
    params.finish()?;
    let value = fields.text("value")?;
    fields.finish()?;
    check_key(&key)?;
    if value.chars().count() > MAX_VALUE {
        return Err(ApiError::validation(format!("`value` must be at most {MAX_VALUE} characters long")));
    }
    if value.contains('\0') {
        return Err(ApiError::validation("`value` must not contain NUL"));
    }
    let limit = state.settings().quotas.env;
    let env = state.store().env_set(&account.user, &key, &value, limit, expected).await?;
    state.engine().env_changed(account.user);
    Ok(versioned(env))
}

pub(crate) async fn remove(
    State(state): State<AppState>,
    account: Account,
    Key(key): Key,
    IfMatch(expected): IfMatch,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    state.store().env_delete(&account.user, &key, expected).await?;
    state.engine().env_changed(account.user);
    Ok(StatusCode::NO_CONTENT)
}
