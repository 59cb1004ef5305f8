//! The audit log followed and exported.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use axum::body::{Body, BodyDataStream};
use axum::http::{Request, header};
use common::TestApp;
use futures_util::StreamExt as _;
use serde_json::Value;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, Verdict, VmPolicy};
use tower::ServiceExt as _;

async fn policy(app: &TestApp, key: &str, name: &str) -> VmPolicy {
    let vm = app.vm(key, name).await.parse().unwrap();
    let user = app.store.vm_any(&vm).await.unwrap().user;
    VmPolicy {
        vm,
        user,
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    }
}

async fn record(app: &TestApp, policy: &VmPolicy, protocol: Protocol, at: i64) {
    let verdict = Verdict::Deny { reason: Reason::NoRule };
    app.store.audit().record(AuditEvent::new(policy, protocol, verdict, at));
    app.store.audit().flush().await;
}

async fn open(app: &TestApp, key: &str, path: &str, last: Option<&str>) -> BodyDataStream {
    let mut request = Request::get(path).header(header::AUTHORIZATION, format!("Bearer {key}"));
    if let Some(last) = last {
        request = request.header("last-event-id", last);
    }
    let answer = app.router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap();
    assert_eq!(answer.status(), 200);
    answer.into_body().into_data_stream()
}

/// The timestamps of the next messages, and the last id.
async fn heard(stream: &mut BodyDataStream, count: usize) -> (Vec<i64>, Option<String>) {
    let (mut times, mut last) = (Vec::new(), None);
    while times.len() < count {
        let bytes = stream.next().await.unwrap().unwrap();
        for line in std::str::from_utf8(&bytes).unwrap().lines() {
            if let Some(data) = line.strip_prefix("data: ") {
                let event: Value = serde_json::from_str(data).unwrap();
                let time: jiff::Timestamp = event["timestamp"].as_str().unwrap().parse().unwrap();
                times.push(time.as_microsecond());
            }
            last = line.strip_prefix("id: ").map(str::to_owned).or(last);
        }
    }
    (times, last)
}

#[tokio::test]
async fn followers_hear_their_own_events_in_the_order_of_writing() {
    let app = TestApp::new();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let (hers, his) = (policy(&app, &alice, "vm").await, policy(&app, &bob, "vm").await);
    record(&app, &hers, Protocol::Tcp, 1).await;
    let mut stream = open(&app, &alice, "/v1/audit/egress?follow&protocol=tcp", None).await;
    record(&app, &his, Protocol::Tcp, 2).await;
    record(&app, &hers, Protocol::Udp, 3).await;
    record(&app, &hers, Protocol::Tcp, 5).await;
    record(&app, &hers, Protocol::Tcp, 4).await;
    let (times, last) = heard(&mut stream, 2).await;
    assert_eq!(times, [5, 4]);
    drop(stream);
    record(&app, &hers, Protocol::Tcp, 6).await;
    let mut again = open(&app, &alice, "/v1/audit/egress?follow=true&protocol=tcp", last.as_deref()).await;
    assert_eq!(heard(&mut again, 1).await.0, [6]);
    let mut from =
        open(&app, &alice, "/v1/audit/egress?follow=true&since=1970-01-01T00:00:00.000003Z", None).await;
    assert_eq!(heard(&mut from, 3).await.0, [5, 4, 6]);
    let refused = app.get(&alice, "/v1/audit/egress?follow=maybe").await;
    assert_eq!(refused.error(400), "invalid_parameter");
}

#[tokio::test]
async fn an_export_holds_every_event_that_matches() {
    let app = TestApp::new();
    let alice = app.user("alice@example.com").await;
    let hers = policy(&app, &alice, "vm").await;
    for n in 0..1200 {
        let verdict = Verdict::Deny { reason: Reason::NoRule };
        let protocol = if n % 2 == 0 { Protocol::Tcp } else { Protocol::Tls };
        app.store.audit().record(AuditEvent::new(&hers, protocol, verdict, n));
    }
    app.store.audit().flush().await;
    let mut stream = open(&app, &alice, "/v1/audit/egress/export", None).await;
    let mut text = Vec::new();
    while let Some(bytes) = stream.next().await {
        text.extend_from_slice(&bytes.unwrap());
    }
    let text = String::from_utf8(text).unwrap();
    assert_eq!(text.lines().count(), 1200);
    assert!(text.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));
    let part = app.get(&alice, "/v1/audit/egress/export?protocol=tls").await.is(200);
    assert_eq!(part.as_str().unwrap().lines().count(), 600);
}

#[tokio::test]
async fn an_export_breaks_off_when_its_key_is_revoked_and_ends_at_what_there_was() {
    let app = TestApp::new();
    let alice = app.user("alice@example.com").await;
    let hers = policy(&app, &alice, "vm").await;
    let now = tapgate_store::now_us();
    for n in 0..1200 {
        let verdict = Verdict::Deny { reason: Reason::NoRule };
        // The last ones come while it is read.
        let at = if n < 1100 { n } else { now + 60_000_000 };
        app.store.audit().record(AuditEvent::new(&hers, Protocol::Tcp, verdict, at));
        if n % 300 == 299 {
            // More at once than an account's share of the queue would be put together.
            app.store.audit().flush().await;
        }
    }
    let whole = app.get(&alice, "/v1/audit/egress/export").await.is(200);
    assert_eq!(whole.as_str().unwrap().lines().count(), 1100);
    let made = app.post(&alice, "/v1/keys", serde_json::json!({ "name": "second" })).await.is(201);
    let (id, second) = (made["id"].as_str().unwrap(), made["token"].as_str().unwrap());
    let mut stream = open(&app, second, "/v1/audit/egress/export", None).await;
    stream.next().await.unwrap().unwrap();
    app.call(&alice, "DELETE", &format!("/v1/keys/{id}"), None).await;
    let mut rest = Vec::new();
    while let Some(part) = stream.next().await {
        rest.push(part);
    }
    assert!(rest.last().is_some_and(Result::is_err), "{} more parts", rest.len());
}

#[tokio::test]
async fn an_account_has_so_many_streams_at_a_time() {
    let app = TestApp::new();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let path = "/v1/audit/egress?follow";
    let mut all = Vec::new();
    for _ in 0..tapgate::http::STREAMS {
        all.push(open(&app, &alice, path, None).await);
    }
    for path in [path, "/v1/audit/egress/export"] {
        let refused = app.get(&alice, path).await;
        assert!(refused.headers.contains_key(header::RETRY_AFTER));
        assert_eq!(refused.error(429), "rate_limited");
    }
    drop(open(&app, &bob, path, None).await);
    all.pop();
    drop(open(&app, &alice, path, None).await);
    drop(open(&app, &alice, "/v1/audit/egress/export", None).await);
    drop(open(&app, &alice, "/v1/audit/egress/export", None).await);
}

/// The log is long quiet, the connection is cut, something happens, the client comes back with what it was told last.
#[tokio::test]
async fn a_follower_that_heard_nothing_yet_misses_nothing_either() {
    let app = TestApp::new();
    let alice = app.user("alice@example.com").await;
    let hers = policy(&app, &alice, "vm").await;
    record(&app, &hers, Protocol::Tcp, 1).await;
    let mut stream = open(&app, &alice, "/v1/audit/egress?follow", None).await;
    let first = tokio::time::timeout(std::time::Duration::from_secs(5), stream.next()).await;
    let first = first.expect("a follower is not told where it begins").unwrap().unwrap();
    let first = std::str::from_utf8(&first).unwrap().to_owned();
    // Without data it is no event: it only moves what the client sends as `Last-Event-ID`.
    assert!(!first.contains("data:") && !first.contains("event:"), "{first}");
    let place = first.strip_prefix("id: ").unwrap().trim();
    drop(stream);
    record(&app, &hers, Protocol::Tcp, 2).await;
    let mut again = open(&app, &alice, "/v1/audit/egress?follow", Some(place)).await;
    assert_eq!(heard(&mut again, 1).await.0, [2]);
}

/// Waits as long as a revoked key may go on listening, which is ten seconds.
#[tokio::test]
async fn a_follower_hears_no_more_once_its_key_or_its_account_is_gone() {
    let app = TestApp::new();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let made = app.post(&alice, "/v1/keys", serde_json::json!({ "name": "second" })).await.is(201);
    let (id, second) = (made["id"].as_str().unwrap(), made["token"].as_str().unwrap());
    let path = "/v1/audit/egress?follow";
    let mut living = open(&app, &alice, path, None).await;
    let (revoked, disabled) = (open(&app, second, path, None).await, open(&app, &bob, path, None).await);
    app.call(&alice, "DELETE", &format!("/v1/keys/{id}"), None).await.is(204);
    let user = app.store.authenticate(&bob).await.unwrap().unwrap().user;
    app.store.user_disable(&user, true).await.unwrap();
    let all = async |mut stream: BodyDataStream| while stream.next().await.is_some() {};
    let ended = async { tokio::join!(all(revoked), all(disabled)) };
    tokio::time::timeout(std::time::Duration::from_secs(60), ended).await.expect("they listen on");
    let hers = policy(&app, &alice, "vm").await;
    record(&app, &hers, Protocol::Tcp, 1).await;
    assert_eq!(heard(&mut living, 1).await.0, [1], "the others go on");
}
