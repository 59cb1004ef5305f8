//! What is counted: `/metrics` for the operator alone, a VM's counters for its owner alone.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{TestApp, keys, no_limits};
use serde_json::json;
use tapgate::Settings;
use tapgate::http::{Rate, metrics::Token};

fn app() -> TestApp {
    TestApp::with(Settings {
        metrics_token: Some(Token::of("t0ken")),
        rates: no_limits(),
        ..Settings::default()
    })
}

#[tokio::test]
async fn the_exposition_is_the_operators_and_its_labels_are_bounded() {
    let app = app();
    let alice = app.user("alice@example.com").await;
    let vm = app.vm(&alice, "vm").await;
    app.make_ready(&vm).await;
    let gone = app.vm(&alice, "gone").await;
    app.advance(&gone, tapgate_model::StatusDetail::Failed).await;
    app.call(&alice, "DELETE", &format!("/v1/vms/{gone}"), None).await.is(204);
    app.advance(&gone, tapgate_model::StatusDetail::Destroyed).await;

    for token in ["", "wrong", "t0ken2", &alice] {
        assert_eq!(app.get(token, "/metrics").await.error(401), "unauthorized", "{token}");
    }
    app.get(&alice, "/v1/vms/vm_madeup").await.is(404);
    app.get("", "/nowhere/madeup").await.is(404);
    app.call("", "BREW", "/v1/vms", None).await.is(405);
    let answer = app.get("t0ken", "/metrics").await;
    assert!(answer.headers["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let body = answer.is(200);
    let text = body.as_str().unwrap();
    assert!(text.ends_with("# EOF\n"));
    for line in [
        "tapgate_vms{status_detail=\"ready\"} 1",
        "tapgate_store_waiting_jobs{database=\"audit\",kind=\"read\"} 0",
        "tapgate_audit_events_dropped_total 0",
        "tapgate_http_request_duration_seconds_count{method=\"GET\",route=\"/v1/vms/{vm_id}\",status=\"404\"} 1",
        "tapgate_http_request_duration_seconds_count{method=\"GET\",route=\"none\",status=\"404\"} 1",
        "tapgate_http_request_duration_seconds_count{method=\"other\",route=\"/v1/vms\",status=\"405\"} 1",
    ] {
        assert!(text.lines().any(|given| given == line), "{line}\n{text}");
    }
    // What a client wrote, and what is gone, is no label.
    for word in ["madeup", "nowhere", "BREW", "alice", &gone] {
        assert!(!text.contains(word), "{word}\n{text}");
    }
}

#[tokio::test]
async fn without_a_token_nobody_reads_it_and_guesses_are_few() {
    let app = TestApp::new();
    assert_eq!(app.get("", "/metrics").await.error(401), "unauthorized");
    assert_eq!(app.get("x", "/metrics").await.error(401), "unauthorized");
    let mut rates = no_limits();
    rates.refused = Rate { burst: 2, per_minute: 1 };
    let app =
        TestApp::with(Settings { metrics_token: Some(Token::of("t0ken")), rates, ..Settings::default() });
    for status in [401, 401, 429] {
        app.get("guess", "/metrics").await.is(status);
    }
}

#[tokio::test]
async fn the_owner_sees_what_was_counted_for_a_vm() {
    let app = app();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let vm = app.vm(&alice, "vm").await;
    let path = format!("/v1/vms/{vm}/egress/counters");
    let none = app.get(&alice, &path).await.is(200);
    assert_eq!(
        keys(&none),
        [
            "bytes_in",
            "bytes_out",
            "dropped",
            "events_dropped",
            "events_lost",
            "flows",
            "packets_in",
            "packets_out",
            "passed",
            "vm_id"
        ]
    );
    assert_eq!((&none["packets_out"], &none["dropped"]), (&json!(0), &json!({})), "no gate, no traffic");
    assert_eq!(app.get(&bob, &path).await.error(404), "vm_not_found");
}
