//! Secrets. A value comes in and never goes out.

use crate::engine::Scope;
use crate::http::{
    Account, ApiError, AppState, Fields, Id, IfMatch, List, NoFields, Params, Versioned,
    fields_at_most as at_most, time,
};
use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use serde::Serialize;
use tapgate_model::secret::PLACEHOLDER_PREFIX;
use tapgate_model::{HostPattern, SecretId, SecretValue};
use tapgate_store::{NewSecret, SecretChange, SecretFilter, SecretRecord, SecretSort};

/// Hosts of one secret at most.
const MAX_HOSTS: usize = 100;

#[derive(Serialize)]
pub(crate) struct SecretView {
    id: String,
    name: String,
    env_var: String,
    hosts: Vec<HostPattern>,
    proxy_value: String,
    comment: Option<String>,
    created_at: String,
    updated_at: String,
}

impl From<SecretRecord> for SecretView {
    fn from(secret: SecretRecord) -> Self {
        Self {
            id: secret.id.into(),
            proxy_value: format!("{PLACEHOLDER_PREFIX}{}", secret.name),
            name: secret.name,
            env_var: secret.env_var,
            hosts: secret.hosts,
            comment: secret.comment,
            created_at: time(secret.created_at),
            updated_at: time(secret.updated_at),
        }
    }
}

fn check_name(name: &str) -> Result<(), ApiError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if name.is_empty() || name.len() > 64 || !name.bytes().all(plain) {
        let message = "`name` must be 1 to 64 letters, digits, hyphens and underscores";
        return Err(ApiError::validation(message));
    }
    Ok(())
}

fn check_env_var(name: &str) -> Result<(), ApiError> {
    let letter = name.bytes().next().is_some_and(|b| b.is_ascii_uppercase());
    let plain = |b: u8| b.is_ascii_uppercase() || b.is_ascii_digit() || b == b'_';
    if !letter || name.len() > 255 || !name.bytes().all(plain) {
        let message = "`env_var` must be upper-case letters, digits and underscores, beginning with a letter";
        return Err(ApiError::validation(message));
    }
    Ok(())
}

fn check_value(value: String) -> Result<SecretValue, ApiError> {
    SecretValue::new(value.into_bytes()).map_err(|error| ApiError::validation(format!("`secret`: {error}")))
}

fn check_hosts(hosts: Vec<String>) -> Result<Vec<HostPattern>, ApiError> {
    if hosts.is_empty() {
        return Err(ApiError::validation(
            "`hosts` must not be empty; leave it out for any host, or send [\"*\"]",
        ));
    }
    if hosts.len() > MAX_HOSTS {
        return Err(ApiError::validation(format!("`hosts` must hold at most {MAX_HOSTS} entries")));
    }
    let mut out: Vec<HostPattern> = Vec::with_capacity(hosts.len());
    for text in hosts {
        let host = text.parse().map_err(|error| {
            let shown: String = text.chars().filter(|c| !c.is_control()).take(64).collect();
            ApiError::validation(format!("`hosts` has the entry `{shown}`: {error}"))
        })?;
        if !out.contains(&host) {
            out.push(host);
        }
    }
    Ok(out)
}

pub(crate) async fn create(
    State(state): State<AppState>,
    account: Account,
    params: Params,
    mut fields: Fields,
) -> Result<(StatusCode, Json<SecretView>), ApiError> {
    params.finish()?;
    let name = fields.text("name")?;
    let value = fields.text("secret")?;
    let env_var = fields.text("env_var")?;
    let hosts = fields.optional_texts("hosts", true)?;
    let comment = fields.optional_text("comment")?;
    fields.finish()?;
    check_name(&name)?;
    check_env_var(&env_var)?;
    if let Some(comment) = &comment {
        at_most("comment", comment, 1024, true)?;
    }
    let new = NewSecret {
        name,
        value: check_value(value)?,
        env_var,
        hosts: hosts.map_or(Ok(vec![HostPattern::Any]), check_hosts)?,
        comment,
    };
    let quota = state.settings().quotas.of_secrets();
    let secret = state.store().secret_create(&account.user, new, quota).await?;
    changed(&state, &account).await?;
    Ok((StatusCode::CREATED, Json(secret.into())))
}

fn versioned(secret: SecretRecord) -> Versioned<Json<SecretView>> {
    Versioned(secret.version(), Json(secret.into()))
}

/// The proxy learns the value, the guests the placeholder.
async fn changed(state: &AppState, account: &Account) -> Result<(), ApiError> {
    let in_force = state.engine().policy_changed(Scope::User(account.user.clone())).await;
    state.engine().env_changed(account.user.clone());
    Ok(in_force?)
}

pub(crate) async fn list(
    State(state): State<AppState>,
    account: Account,
    mut params: Params,
) -> Result<Json<List<SecretView>>, ApiError> {
    let name = params.text("name");
    let sort = params.parsed("sort", "created_at or name", |text| match text {
        "created_at" => Some(SecretSort::Created),
        "name" => Some(SecretSort::Name),
        _ => None,
    })?;
    let page = params.page(50, 200)?;
    params.finish()?;
    let filter = SecretFilter { name };
    let page = state.store().secrets(&account.user, filter, sort.unwrap_or_default(), page).await?;
    Ok(Json(List::of(page, Into::into)))
}

pub(crate) async fn show(
    State(state): State<AppState>,
    account: Account,
    Id(secret): Id<SecretId>,
    params: Params,
) -> Result<Versioned<Json<SecretView>>, ApiError> {
    params.finish()?;
    Ok(versioned(state.store().secret(&account.user, &secret).await?))
}

pub(crate) async fn update(
    State(state): State<AppState>,
    account: Account,
    Id(secret): Id<SecretId>,
    IfMatch(expected): IfMatch,
    params: Params,
    mut fields: Fields,
) -> Result<Versioned<Json<SecretView>>, ApiError> {
    params.finish()?;
    fields.given()?;
    if fields.patch_text("name")?.is_some() {
        return Err(ApiError::validation("`name` cannot be changed; delete the secret and create it again"));
    }
    let change = SecretChange {
        value: fields.patch_required("secret")?.map(check_value).transpose()?,
        env_var: fields.patch_required("env_var")?,
        hosts: fields.optional_texts("hosts", false)?.map(check_hosts).transpose()?,
        comment: fields.patch_text("comment")?,
    };
    fields.finish()?;
    if let Some(env_var) = &change.env_var {
        check_env_var(env_var)?;
    }
    if let Some(Some(comment)) = &change.comment {
        at_most("comment", comment, 1024, true)?;
    }
    let quota = state.settings().quotas.of_secrets();
    let secret = state.store().secret_update(&account.user, &secret, change, expected, quota).await?;
    changed(&state, &account).await?;
    Ok(versioned(secret))
}

pub(crate) async fn remove(
    State(state): State<AppState>,
    account: Account,
    Id(secret): Id<SecretId>,
    IfMatch(expected): IfMatch,
    params: Params,
    _: NoFields,
) -> Result<StatusCode, ApiError> {
    params.finish()?;
    state.store().secret_delete(&account.user, &secret, expected).await?;
    changed(&state, &account).await?;
    Ok(StatusCode::NO_CONTENT)
}
