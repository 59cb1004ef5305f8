//! The error envelope: `{"error": {"code", "message"}}`, whatever went wrong.

use super::Code;
use crate::engine::NotInForce;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;
use std::borrow::Cow;
use tapgate_model::lifecycle::Refusal;
use tapgate_store::{Conflict, Kind, StoreError};

/// An error as the client sees it.
#[derive(Clone, Debug)]
pub struct ApiError {
    /// Stable, for programs; it decides the status.
    pub code: Code,
    /// For people: what is wrong and what to do.
    pub message: Cow<'static, str>,
    /// Seconds after which trying again makes sense.
    pub retry_after: Option<u64>,
}

impl ApiError {
    /// Any error.
    pub fn new(code: Code, message: impl Into<Cow<'static, str>>) -> Self {
        Self { code, message: message.into(), retry_after: None }
    }

    /// A field has a value that cannot be.
    pub fn validation(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::ValidationError, message)
    }

    /// Nobody we know.
    pub fn unauthorized(message: impl Into<Cow<'static, str>>) -> Self {
        Self::new(Code::Unauthorized, message)
    }

    /// What happened goes to the log, never to the client.
    pub fn internal() -> Self {
        Self::new(Code::InternalError, "Something went wrong on the server; its log says what")
    }

    /// Too often.
    pub fn rate_limited(seconds: u64) -> Self {
        let message = format!("Too many requests; try again in {seconds} s");
        Self { retry_after: Some(seconds), ..Self::new(Code::RateLimited, message) }
    }

    /// Too many long answers at a time.
    pub fn too_many_streams(most: usize) -> Self {
        let message = format!(
            "The account follows or exports the audit log {most} times already; let one of them end first"
        );
        Self { retry_after: Some(5), ..Self::new(Code::RateLimited, message) }
    }

    /// The HTTP status.
    pub const fn status(&self) -> StatusCode {
        self.code.status()
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let body = json!({ "error": { "code": self.code.word(), "message": self.message } });
        let mut response = (self.status(), axum::Json(body)).into_response();
        if let Some(seconds) = self.retry_after {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if self.code == Code::Unauthorized {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// The code and the noun of what is not there.
pub(crate) const fn missing(kind: Kind) -> (Code, &'static str) {
    match kind {
        Kind::Agent => (Code::AgentNotFound, "agent"),
        Kind::ApiKey => (Code::ApiKeyNotFound, "API key"),
        Kind::Env => (Code::EnvNotFound, "environment variable"),
        Kind::Rule => (Code::RuleNotFound, "egress rule"),
        Kind::Secret => (Code::SecretNotFound, "secret"),
        Kind::Snapshot => (Code::SnapshotNotFound, "snapshot"),
        Kind::User => (Code::UserNotFound, "user"),
        Kind::Vm => (Code::VmNotFound, "VM"),
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::NotFound(kind) => {
                let (code, noun) = missing(kind);
                Self::new(code, format!("No such {noun}"))
            }
            StoreError::Conflict(conflict) => conflict.into(),
            StoreError::Changed => Self::new(Code::PreconditionFailed, sentence(&error)),
            StoreError::Cursor => Self::new(Code::InvalidCursor, sentence(&error)),
            StoreError::Illegal { .. } => Self::new(Code::VmBusy, sentence(&error)),
            StoreError::Unavailable(_) => {
                tracing::error!(%error, "a request could not be served");
                let message =
                    "The server cannot write its database now (a full disk, perhaps); try again later";
                Self { retry_after: Some(5), ..Self::new(Code::Unavailable, message) }
            }
            error => {
                tracing::error!(%error, "a request failed");
                Self::internal()
            }
        }
    }
}

impl From<NotInForce> for ApiError {
    fn from(error: NotInForce) -> Self {
        Self { retry_after: Some(5), ..Self::new(Code::NotInForce, sentence(&error)) }
    }
}

impl From<Conflict> for ApiError {
    fn from(conflict: Conflict) -> Self {
        let code = match &conflict {
            Conflict::AgentName => Code::AgentNameTaken,
            Conflict::Email => Code::EmailTaken,
            Conflict::EnvVar => Code::EnvVarTaken,
            Conflict::RuleName => Code::RuleNameTaken,
            Conflict::SecretName => Code::SecretNameTaken,
            Conflict::SnapshotNotReady => Code::SnapshotNotReady,
            Conflict::State(refusal) => refused(*refusal),
            Conflict::VmName => Code::VmNameTaken,
            Conflict::HostDisk { .. } => Code::HostDiskFull,
            Conflict::HostFull => Code::HostFull,
            Conflict::HostMemory { .. } => Code::HostMemoryFull,
            Conflict::Quota { .. } => Code::QuotaExceeded,
        };
        let error = Self::new(code, sentence(&conflict));
        match conflict {
            // Not the caller's doing, and it may pass.
            Conflict::HostDisk { .. } | Conflict::HostMemory { .. } => {
                Self { retry_after: Some(30), ..error }
            }
            _ => error,
        }
    }
}

/// The code of a call that does not fit what the VM is doing.
pub(crate) const fn refused(refusal: Refusal) -> Code {
    match refusal {
        Refusal::AlreadyRunning => Code::VmAlreadyRunning,
        Refusal::Destroyed => Code::VmDestroyed,
        Refusal::NotRunning => Code::VmNotRunning,
        Refusal::NotStopped => Code::VmNotStopped,
        Refusal::Stopping => Code::VmStopping,
    }
}

/// Our messages begin in lower case so that they can be chained; shown alone they are sentences.
fn sentence(error: &impl std::fmt::Display) -> String {
    let text = error.to_string();
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |first| first.to_uppercase().chain(chars).collect())
}
