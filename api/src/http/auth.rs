//! Who is calling: the bearer token of each request.

use super::{ApiError, AppState, Peer};
use axum::extract::FromRequestParts;
use axum::http::HeaderMap;
use axum::http::header::AUTHORIZATION;
use axum::http::request::Parts;
use tapgate_model::{ApiKeyId, UserId};
use tapgate_store::Caller;

/// The account that is calling, and by which key.
#[derive(Clone, Debug)]
pub struct Account {
    /// The account.
    pub user: UserId,
    /// The key.
    pub key: ApiKeyId,
}

/// The token of a request.
pub(crate) fn bearer(headers: &HeaderMap) -> Result<&str, ApiError> {
    let mut values = headers.get_all(AUTHORIZATION).iter();
    let (Some(value), None) = (values.next(), values.next()) else {
        return Err(ApiError::unauthorized(
            "Send your API key in the header `Authorization: Bearer <api_key>`",
        ));
    };
    let token = value.to_str().ok().and_then(|text| {
        let (scheme, token) = text.split_once(' ')?;
        scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
    });
    token.ok_or_else(|| ApiError::unauthorized("The Authorization header must be `Bearer <api_key>`"))
}

impl FromRequestParts<AppState> for Account {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &AppState) -> Result<Self, ApiError> {
        if let Some(account) = parts.extensions.get::<Self>() {
            return Ok(account.clone());
        }
        let Ok(peer) = Peer::from_request_parts(parts, state).await;
        let limits = state.limits();
        // Who guesses keys is stopped before the database is asked, but not who had a good one all along.
        let token = match bearer(&parts.headers) {
            Ok(token) if limits.trusted.knows(token) => token,
            other => {
                limits.refused.peek(&peer)?;
                other.inspect_err(|_| drop(limits.refused.take(&peer)))?
            }
        };
        match state.store().authenticate(token).await? {
            Some(Caller { user, key }) => {
                limits.trusted.add(token);
                limits.key.take(&key)?;
                limits.account.take(&user)?;
                let account = Self { user, key };
                parts.extensions.insert(account.clone());
                Ok(account)
            }
            None => {
                limits.trusted.remove(token);
                limits.refused.take(&peer)?;
                Err(ApiError::unauthorized("The API key is not valid or was revoked"))
            }
        }
    }
}
