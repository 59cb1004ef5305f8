//! `Idempotency-Key`: a POST that is sent again is answered as the first was, and does nothing.
//!
//! The first runs to its end even if its client goes away (`whole`), so that the retry finds an answer. What failed on our side
//! is not kept: it may well work next time, unless something was stored.

use super::{Account, ApiError, AppState, Code};
use axum::body::{Body, to_bytes};
use axum::extract::{FromRequestParts as _, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use sha2::{Digest as _, Sha256};
use tapgate_model::UserId;
use tapgate_store::{Known, keyed};

const HEADER: &str = "idempotency-key";
const REPLAYED: &str = "idempotent-replayed";

pub(super) async fn layer(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let keyed = request.method() == Method::POST
        && request.headers().contains_key(HEADER)
        && request.headers().contains_key(header::AUTHORIZATION);
    if !keyed {
        return next.run(request).await;
    }
    run(state, request, next).await.unwrap_or_else(ApiError::into_response)
}

async fn run(state: AppState, request: Request, next: Next) -> Result<Response, ApiError> {
    let (mut parts, body) = request.into_parts();
    let key = parts.headers.get(HEADER).and_then(|value| value.to_str().ok()).unwrap_or_default().to_owned();
    if key.is_empty() || key.len() > 255 {
        let message =
            "Idempotency-Key must be 1 to 255 printable ASCII characters; a random UUID is a good one";
        return Err(ApiError::new(Code::InvalidIdempotencyKey, message));
    }
    let user = Account::from_request_parts(&mut parts, &state).await?.user;
    let body = super::fields::whole_body(body).await?;
    let mut hash = Sha256::new();
    hash.update(parts.uri.to_string());
    hash.update([0]);
    hash.update(&body);
    match state.store().idempotency_begin(&user, &key, hash.finalize().to_vec()).await? {
        Known::Other => {
            let message = "This Idempotency-Key was used for another request; use a new one for each";
            Err(ApiError::new(Code::IdempotencyKeyReused, message))
        }
        Known::Lost => {
            let message = "The first request with this Idempotency-Key failed or was cut off after it had stored something: look for \
                           what it made, and if it is not there send the request with a new key";
            Err(ApiError::new(Code::OutcomeUnknown, message))
        }
        Known::Running => {
            let message = "The request with this Idempotency-Key still runs; try again shortly";
            Err(ApiError { retry_after: Some(1), ..ApiError::new(Code::RequestInProgress, message) })
        }
        Known::Full => {
            let message =
                "Too many requests of this account with an Idempotency-Key run; wait for some to end";
            Err(ApiError { retry_after: Some(1), ..ApiError::new(Code::RateLimited, message) })
        }
        Known::Ended { status, body } => Ok(replay(status, body)),
        Known::New => {
            let request = Request::from_parts(parts, Body::from(body));
            Ok(first(state, user, key, request, next).await)
        }
    }
}

async fn first(state: AppState, user: UserId, key: String, request: Request, next: Next) -> Response {
    let (parts, body) = keyed(user.clone(), key.clone(), next.run(request)).await.into_parts();
    let body = to_bytes(body, usize::MAX).await.unwrap_or_default();
    let lasting = !parts.status.is_server_error() && parts.status != StatusCode::TOO_MANY_REQUESTS;
    let answer = lasting.then(|| (parts.status.as_u16(), body.to_vec()));
    if let Err(error) = state.store().idempotency_end(&user, &key, answer).await {
        tracing::error!(%error, "an answer was not kept for retries");
    }
    Response::from_parts(parts, Body::from(body))
}

fn replay(status: u16, body: Vec<u8>) -> Response {
    let status = StatusCode::from_u16(status).unwrap_or(StatusCode::OK);
    let mut response = (status, Body::from(body)).into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    headers.insert(REPLAYED, HeaderValue::from_static("true"));
    response
}
