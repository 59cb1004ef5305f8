//! Ids in paths. One that cannot be an id is answered as one that does not exist.

use super::ApiError;
use super::error::missing;
use axum::extract::{FromRequestParts, RawPathParams};
use axum::http::request::Parts;
use std::str::FromStr;
use tapgate_model::{AgentId, ApiKeyId, RuleId, SecretId, SnapshotId, VmId};
use tapgate_store::Kind;

/// A kind of id that stands in paths.
pub trait Resource: FromStr + Send {
    /// Its name in the route.
    const PARAM: &'static str;
    /// What is not found without it.
    const KIND: Kind;
}

macro_rules! resources {
    ($($id:ty, $param:literal, $kind:ident;)+) => {$(
        impl Resource for $id {
            const PARAM: &'static str = $param;
            const KIND: Kind = Kind::$kind;
        }
    )+};
}

resources! {
    VmId, "vm_id", Vm;
    RuleId, "rule_id", Rule;
    SecretId, "secret_id", Secret;
    SnapshotId, "snapshot_id", Snapshot;
    AgentId, "agent_id", Agent;
    ApiKeyId, "key_id", ApiKey;
}

/// The id of the path.
#[derive(Debug)]
pub struct Id<T>(pub T);

impl<S: Send + Sync, T: Resource> FromRequestParts<S> for Id<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let text = param(parts, state, T::PARAM).await;
        text.parse().map(Self).map_err(|_| {
            let (code, noun) = missing(T::KIND);
            let shown: String = text.chars().filter(|c| !c.is_control()).take(64).collect();
            ApiError::new(code, format!("No {noun} with ID {shown}"))
        })
    }
}

/// The key of an environment variable in the path.
#[derive(Debug)]
pub struct Key(pub String);

impl<S: Send + Sync> FromRequestParts<S> for Key {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        Ok(Self(param(parts, state, "key").await))
    }
}

async fn param<S: Send + Sync>(parts: &mut Parts, state: &S, name: &str) -> String {
    match RawPathParams::from_request_parts(parts, state).await {
        Ok(params) => {
            params.iter().find(|(key, _)| *key == name).map(|(_, value)| value.to_owned()).unwrap_or_default()
        }
        // Percent-encoded bytes that are no text name nothing.
        Err(_) => String::new(),
    }
}
