//! The document says what the routes do: same paths, same methods, same need of a key.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::TestApp;
use serde_json::Value;
use std::collections::BTreeSet;
use tower::ServiceExt as _;

/// The routes as the router's source has them: axum cannot list its own.
fn routes() -> BTreeSet<String> {
    let source = include_str!("../src/http/router.rs");
    let mut found = BTreeSet::new();
    for part in source.split(".route(").skip(1) {
        found.insert(part.split('"').nth(1).unwrap().to_owned());
    }
    found
}

/// For people or about the document itself.
const UNDOCUMENTED: &[&str] = &[
    "/metrics",
    "/openapi.json",
    "/docs",
    "/activate",
    "/activate/confirm",
    "/verify",
    "/reset",
    "/reset/choose",
];

#[tokio::test]
async fn the_document_has_every_route_and_no_other() {
    let app = TestApp::new();
    let document = app.get("", "/openapi.json").await.is(200);
    assert_eq!(document["openapi"], "3.1.0");
    let documented: BTreeSet<_> = document["paths"].as_object().unwrap().keys().cloned().collect();
    let routed: BTreeSet<_> =
        routes().into_iter().filter(|path| !UNDOCUMENTED.contains(&path.as_str())).collect();
    assert_eq!(documented, routed);

    let mut ids = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        let real = path.replace(['{', '}'], "");
        for method in ["get", "put", "post", "delete", "patch"] {
            let answer = app.call("", &method.to_uppercase(), &real, None).await;
            let described = &methods[method];
            if described.is_null() {
                assert_eq!(answer.status, 405, "{method} {path} is not documented");
                continue;
            }
            assert!(ids.insert(described["operationId"].as_str().unwrap()), "{path}");
            let open = described["security"].as_array().is_some_and(Vec::is_empty);
            assert_eq!(
                answer.status != 401,
                open || real == "/v1/auth/login",
                "{method} {path}: {}",
                answer.status
            );
            let status = answer.status.as_u16().to_string();
            assert!(!described["responses"][&status].is_null(), "{method} {path} answers {status}");
        }
    }
}

/// Anybody may ask, as often as they like: it is put together once.
#[tokio::test]
async fn document_and_page_are_made_once() {
    let app = TestApp::new();
    for path in ["/openapi.json", "/docs"] {
        let octets = async || {
            let request = axum::http::Request::get(path).body(axum::body::Body::empty()).unwrap();
            let answer = app.router.clone().oneshot(request).await.unwrap();
            axum::body::to_bytes(answer.into_body(), usize::MAX).await.unwrap()
        };
        let (one, other) = (octets().await, octets().await);
        assert!(one.len() > 10_000 && one.as_ptr() == other.as_ptr(), "{path}");
    }
}

#[tokio::test]
async fn every_reference_leads_somewhere() {
    fn walk(document: &Value, value: &Value) {
        match value {
            Value::Object(fields) => {
                if let Some(Value::String(reference)) = fields.get("$ref") {
                    let pointer = reference.strip_prefix('#').unwrap();
                    assert!(document.pointer(pointer).is_some(), "{reference}");
                }
                fields.values().for_each(|field| walk(document, field));
            }
            Value::Array(items) => items.iter().for_each(|item| walk(document, item)),
            _ => {}
        }
    }
    let document = tapgate::http::openapi::document();
    walk(&document, &document);
}

#[tokio::test]
async fn the_page_has_every_operation_and_no_script() {
    let app = TestApp::new();
    let answer = app.get("", "/docs").await;
    let policy = answer.headers["content-security-policy"].to_str().unwrap().to_owned();
    assert!(policy.contains("default-src 'none'") && policy.contains("frame-ancestors 'none'"));
    let page = answer.is(200);
    let page = page.as_str().unwrap();
    assert!(!page.contains("<script"));
    for methods in tapgate::http::openapi::document()["paths"].as_object().unwrap().values() {
        for operation in methods.as_object().unwrap().values() {
            let id = operation["operationId"].as_str().unwrap();
            assert!(
                page.contains(&format!("id=\"{id}\"")) && page.contains(&format!("href=\"#{id}\"")),
                "{id}"
            );
        }
    }
}
