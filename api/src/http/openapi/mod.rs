//! The OpenAPI 3.1 document of the API, and a page for people made from it.
//!
//! Paths are in `paths`, shapes in `schemas`. A test holds the document against the router, another against answers.

mod page;
mod paths;
mod schemas;

pub(crate) use page::escape;

use super::form::NoParams;
use super::{ApiError, Params};
use axum::body::Bytes;
use axum::http::header;
use axum::response::IntoResponse;
use serde_json::{Value, json};
use std::sync::LazyLock;

/// The document.
pub fn document() -> Value {
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "tapgate",
            "version": env!("CARGO_PKG_VERSION"),
            "summary": "MicroVMs for untrusted code, and control over everything that leaves them",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/" }],
        "security": [{ "key": [] }],
        "tags": [
            { "name": "VMs" },
            { "name": "Egress" },
            { "name": "Audit" },
            { "name": "Secrets" },
            { "name": "Snapshots" },
            { "name": "Environment" },
            { "name": "Agents" },
            { "name": "Accounts" },
            { "name": "Service" },
        ],
        "paths": paths::paths(),
        "components": {
            "securitySchemes": {
                "key": { "type": "http", "scheme": "bearer", "description": "An API key, like iron_live_a1b2c3" },
            },
            "schemas": schemas::schemas(),
        },
    })
}

/// Both are the same for everybody, and anybody may ask: they are put together once.
static JSON: LazyLock<Bytes> = LazyLock::new(|| document().to_string().into());
static PAGE: LazyLock<Bytes> = LazyLock::new(|| page::render(&document()).into());

pub(super) async fn json_document(params: Params) -> Result<impl IntoResponse, ApiError> {
    params.finish()?;
    Ok(([(header::CONTENT_TYPE, "application/json")], JSON.clone()))
}

pub(super) async fn html_page(_: NoParams) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/html; charset=utf-8")], PAGE.clone())
}
