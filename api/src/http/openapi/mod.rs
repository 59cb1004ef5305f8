//! The OpenAPI 3.1 document of the API, and a page for people made from it.
//!
//! Paths are in `paths`, shapes in `schemas`. A test holds the document against the router, another against answers.

mod page;
mod paths;
mod schemas;

pub(crate) use page::escape;

use super::form::NoParams;
use super::{ApiError, Params};
use axum::Json;
use axum::response::Html;
use serde_json::{Value, json};

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

pub(super) async fn json_document(params: Params) -> Result<Json<Value>, ApiError> {
    params.finish()?;
    Ok(Json(document()))
}

pub(super) async fn html_page(_: NoParams) -> Html<String> {
    Html(page::render(&document()))
}
