//! What no route takes: parameters and bodies that it does not know, and methods that only ask. Every route is tried, from the
//! document itself and the pages beside it.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use axum::body::Body;
use axum::http::{Method, Request, header};
use common::{Answer, TestApp};
use serde_json::json;

/// Method and path of every documented operation, with names in the path that are nobody's, and whether it takes a body.
fn operations() -> Vec<(String, String, bool)> {
    let document = tapgate::http::openapi::document();
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, described) in methods.as_object().unwrap() {
            let path =
                ["vm", "egr", "sec", "snap", "agt", "key"].into_iter().fold(path.clone(), |path, prefix| {
                    let name = match prefix {
                        "egr" => "rule",
                        "sec" => "secret",
                        "snap" => "snapshot",
                        "agt" => "agent",
                        same => same,
                    };
                    path.replace(&format!("{{{name}_id}}"), &format!("{prefix}_0000000000000000"))
                });
            let takes = !described["requestBody"].is_null();
            all.push((method.to_uppercase(), path.replace("{key}", "KEY"), takes));
        }
    }
    assert!(all.len() > 45);
    all
}

const PAGES: [(&str, &str); 11] = [
    ("GET", "/docs"),
    ("GET", "/openapi.json"),
    ("GET", "/activate"),
    ("POST", "/activate"),
    ("POST", "/activate/confirm"),
    ("GET", "/verify"),
    ("POST", "/verify"),
    ("GET", "/reset"),
    ("POST", "/reset"),
    ("GET", "/reset/choose"),
    ("POST", "/reset/choose"),
];

async fn raw(app: &TestApp, key: &str, method: &str, path: &str, kind: &str, body: &'static str) -> Answer {
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(header::AUTHORIZATION, format!("Bearer {key}"))
        .header(header::CONTENT_TYPE, kind);
    app.send(request.body(Body::from(body)).unwrap()).await
}

#[tokio::test]
async fn every_route_refuses_parameters_that_it_does_not_know() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let mut wrong = Vec::new();
    for (method, path, _) in operations() {
        for (query, word) in
            [("colour=red", "unknown_parameter"), ("colour=red&colour=red", "invalid_parameter")]
        {
            let answer = app.call(&key, &method, &format!("{path}?{query}"), None).await;
            let text = answer.body.to_string();
            if answer.status != 400 || !text.contains("`colour`") || !text.contains(word) {
                wrong.push(format!("{method} {path}?{query}: {} {text}", answer.status));
            }
        }
    }
    for (method, path) in PAGES {
        let answer = app.call("", method, &format!("{path}?colour=red"), None).await;
        if answer.status != 400 || !answer.body.to_string().contains("colour") {
            wrong.push(format!("{method} {path}: {}", answer.status));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn routes_without_a_body_refuse_fields() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let mut wrong = Vec::new();
    for (method, path, _) in operations().iter().filter(|(method, _, takes)| !takes && method != "GET") {
        let mut check = |answer: Answer, what: &str, status: u16| {
            if answer.status.as_u16() != status {
                wrong.push(format!("{method} {path} {what}: {} {}", answer.status, answer.body));
            }
        };
        let json = "application/json";
        let plain = app.call(&key, method, path, None).await.status.as_u16();
        check(raw(&app, &key, method, path, json, "{\"colour\": 1}").await, "a field", 422);
        check(raw(&app, &key, method, path, json, "[]").await, "no object", 400);
        check(raw(&app, &key, method, path, "text/plain", "now").await, "text", 415);
        check(raw(&app, &key, method, path, json, "{}").await, "an empty object", plain);
        check(raw(&app, &key, method, path, json, "").await, "an empty body", plain);
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[tokio::test]
async fn head_is_get_without_a_body_and_options_names_the_methods() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let mut wrong = Vec::new();
    let pages = PAGES.iter().map(|(method, path)| ((*method).to_owned(), (*path).to_owned(), false));
    for (method, path, _) in operations().into_iter().chain(pages) {
        let options = app.call(&key, "OPTIONS", &path, None).await;
        let allow =
            options.headers.get(header::ALLOW).and_then(|allow| allow.to_str().ok()).unwrap_or_default();
        if options.status != 405 || !allow.split(',').any(|allowed| allowed == method) {
            wrong.push(format!("OPTIONS {path}: {} {allow}", options.status));
        }
        if method != "GET" {
            continue;
        }
        let (get, head) = (app.get(&key, &path).await, app.call(&key, "HEAD", &path, None).await);
        let of = |answer: &Answer| {
            (
                answer.status,
                answer.headers.get(header::CONTENT_TYPE).cloned(),
                answer.headers.get(header::ETAG).cloned(),
            )
        };
        if of(&get) != of(&head) || !head.body.is_null() {
            wrong.push(format!("HEAD {path}: {:?} is not {:?}; {}", of(&head), of(&get), head.body));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// A link's preview or a monitor asks with HEAD: the token is for who reads it.
#[tokio::test]
async fn asking_with_head_takes_no_token() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let user = app.store.authenticate(&key).await.unwrap().unwrap().user;
    let asked = app.call("", "POST", "/v1/auth/device/code", None).await.is(200);
    let code = asked["data"]["code"].as_str().unwrap();
    app.store.device_confirm(code, &user, 10).await.unwrap();
    let poll = format!("/v1/auth/device/poll?code={code}");
    app.call("", Method::HEAD.as_str(), &poll, None).await.is(200);
    assert_eq!(app.get("", &poll).await.is(200)["data"]["status"], "authorized");
}

/// What a stream has no use for is not passed over in silence, and is said before the stream begins.
#[tokio::test]
async fn streams_refuse_what_they_have_no_use_for() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    for (path, code) in [
        ("/v1/audit/egress/export?cursor=x", "unknown_parameter"),
        ("/v1/audit/egress/export?limit=5", "unknown_parameter"),
        ("/v1/audit/egress/export?order=desc", "unknown_parameter"),
        ("/v1/audit/egress/export?follow", "unknown_parameter"),
        ("/v1/audit/egress?follow&cursor=x", "invalid_parameter"),
    ] {
        let answer = tokio::time::timeout(std::time::Duration::from_secs(5), app.get(&key, path)).await;
        assert_eq!(answer.unwrap_or_else(|_| panic!("{path} streams")).error(400), code, "{path}");
    }
    assert_eq!(json!(null), app.get(&key, "/v1/audit/egress/export").await.is(200));
}
