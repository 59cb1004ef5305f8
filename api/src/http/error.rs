//! The error envelope: `{"error": {"code", "message"}}`, whatever went wrong.

use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::borrow::Cow;
use tapgate_store::{Conflict, Kind, StoreError};

/// An error as the client sees it.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// HTTP status.
    pub status: StatusCode,
    /// Stable, for programs.
    pub code: &'static str,
    /// For people: what is wrong and what to do.
    pub message: Cow<'static, str>,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u64>,
}

impl ApiError {
    /// Any error.
    pub fn new(status: StatusCode, code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self { status, code, message: message.into(), retry_after: None }
    }

    /// 400: the request itself is malformed.
    pub fn bad_request(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, code, message)
    }

    /// 422: a field has a value that cannot be.
    pub fn validation(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::UNPROCESSABLE_ENTITY, "validation_error", message)
    }

    /// 401.
    pub fn unauthorized(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", message)
    }

    /// 404.
    pub fn not_found(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::NOT_FOUND, code, message)
    }

    /// 409.
    pub fn conflict(code: &'static str, message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(StatusCode::CONFLICT, code, message)
    }

    /// 500. What happened goes to the log, never to the client.
    pub fn internal() -> Self {
        let message = "Something went wrong on the server; its log says what";
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// 429.
    pub fn rate_limited(seconds: u64) -> Self {
        let message = format!("Too many requests; try again in {seconds} s");
        Self {
            retry_after: Some(seconds),
            ..Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limited", message)
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({ "error": { "code": self.code, "message": self.message } });
        let mut response = (self.status, axum::Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The code and the noun of what is not there.
pub(crate) const fn missing(kind: Kind) -> (&'static str, &'static str) {
    match kind {
        Kind::Agent => ("agent_not_found", "agent"),
        Kind::ApiKey => ("api_key_not_found", "API key"),
        Kind::Env => ("env_not_found", "environment variable"),
        Kind::Rule => ("rule_not_found", "egress rule"),
        Kind::Secret => ("secret_not_found", "secret"),
        Kind::Snapshot => ("snapshot_not_found", "snapshot"),
        Kind::User => ("user_not_found", "user"),
        Kind::Vm => ("vm_not_found", "VM"),
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound(kind) => {
                let (code, noun) = missing(kind);
                Self::not_found(code, format!("No such {noun}"))
            }
            StoreError::Conflict(conflict) => conflict.into(),
            StoreError::Changed => {
                Self::new(StatusCode::PRECONDITION_FAILED, "precondition_failed", sentence(&error))
            }
            StoreError::Cursor => Self::bad_request("invalid_cursor", sentence(&error)),
            StoreError::Illegal { .. } => Self::conflict("vm_busy", sentence(&error)),
            StoreError::Unavailable(_) => {
                tracing::error!(%error, "a request could not be served");
                let message =
                    "The server cannot write its database now (a full disk, perhaps); try again later";
                Self {
                    retry_after: Some(5),
                    ..Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", message)
                }
            }
            error => {
                tracing::error!(%error, "a request failed");
                Self::internal()
            }
        }
    }
}

impl From<Conflict> for ApiError {
    fn from(conflict: Conflict) -> Self {
        let code = match &conflict {
            Conflict::AgentName => "agent_name_taken",
            Conflict::Email => "email_taken",
            Conflict::EnvVar => "env_var_taken",
            Conflict::RuleName => "rule_name_taken",
            Conflict::SecretName => "secret_name_taken",
            Conflict::SnapshotNotReady => "snapshot_not_ready",
            Conflict::State(refusal) => refusal.code(),
            Conflict::VmName => "vm_name_taken",
            Conflict::HostDisk { .. } => "host_disk_full",
            Conflict::HostFull => "host_full",
            Conflict::HostMemory { .. } => "host_memory_full",
            Conflict::Quota { .. } => "quota_exceeded",
        };
        let message = sentence(&conflict);
        match conflict {
            // Not the caller's doing, and it may pass.
            Conflict::HostDisk { .. } | Conflict::HostMemory { .. } => {
                Self { retry_after: Some(30), ..Self::new(StatusCode::SERVICE_UNAVAILABLE, code, message) }
            }
            _ => Self::conflict(code, message),
        }
    }
}

/// Our messages begin in lower case so that they can be chained; shown alone they are sentences.
fn sentence(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}
