//! What no example shows: the envelope on every wrong request, and accounts that never see each other.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use axum::body::Body;
use axum::http::{Request, header};
use common::{PUBLIC_KEY, TestApp};
use serde_json::{Value, json};
use tapgate::Settings;
use tapgate::http::{Rate, Rates};

/// Every route that needs a key, with a body that is right but for the ids in the path.
const ROUTES: &[(&str, &str, &str)] = &[
    ("GET", "/v1/vms/{vm}", ""),
    ("DELETE", "/v1/vms/{vm}", ""),
    ("POST", "/v1/vms/{vm}/start", ""),
    ("POST", "/v1/vms/{vm}/stop", ""),
    ("GET", "/v1/vms/{vm}/ssh", ""),
    ("GET", "/v1/vms/{vm}/egress/policy", ""),
    ("PUT", "/v1/vms/{vm}/egress/policy", r#"{"mode":"warn"}"#),
    ("DELETE", "/v1/vms/{vm}/egress/policy", ""),
    ("GET", "/v1/vms/{vm}/egress/rules", ""),
    ("POST", "/v1/vms/{vm}/egress/rules", r#"{"host":"a.example"}"#),
    ("DELETE", "/v1/vms/{vm}/egress/rules/{vm_rule}", ""),
    ("GET", "/v1/vms/{vm}/snapshots", ""),
    ("POST", "/v1/vms/{vm}/snapshots", r#"{"label":"l"}"#),
    ("DELETE", "/v1/egress/rules/{rule}", ""),
    ("GET", "/v1/secrets/{secret}", ""),
    ("PATCH", "/v1/secrets/{secret}", r#"{"comment":"c"}"#),
    ("DELETE", "/v1/secrets/{secret}", ""),
    ("GET", "/v1/snapshots/{snapshot}", ""),
    ("DELETE", "/v1/snapshots/{snapshot}", ""),
    ("GET", "/v1/env/KEY", ""),
    ("DELETE", "/v1/env/KEY", ""),
    ("GET", "/v1/agents/{agent}", ""),
    ("DELETE", "/v1/agents/{agent}", ""),
    ("DELETE", "/v1/keys/{key}", ""),
];
const COLLECTIONS: &[(&str, &str)] = &[
    ("GET", "/v1/vms"),
    ("POST", "/v1/vms"),
    ("GET", "/v1/egress/policy"),
    ("PUT", "/v1/egress/policy"),
    ("GET", "/v1/egress/rules"),
    ("POST", "/v1/egress/rules"),
    ("GET", "/v1/audit/egress"),
    ("GET", "/v1/secrets"),
    ("POST", "/v1/secrets"),
    ("GET", "/v1/snapshots"),
    ("GET", "/v1/env"),
    ("PUT", "/v1/env/KEY"),
    ("GET", "/v1/agents"),
    ("POST", "/v1/agents"),
    ("GET", "/v1/keys"),
    ("POST", "/v1/keys"),
];

fn body(text: &str) -> Option<Value> {
    (!text.is_empty()).then(|| serde_json::from_str(text).unwrap())
}

#[tokio::test]
async fn another_account_sees_what_never_was() {
    let app = TestApp::new();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let vm = app.vm(&alice, "vm").await;
    app.make_ready(&vm).await;
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let rule = app.post(&alice, "/v1/egress/rules", json!({ "host": "a.example" })).await.is(201);
    let vm_rule =
        app.post(&alice, &format!("/v1/vms/{vm}/egress/rules"), json!({ "host": "a.example" })).await;
    let secret = json!({ "name": "s", "secret": "v", "env_var": "S" });
    let secret = app.post(&alice, "/v1/secrets", secret).await.is(201);
    let snapshot = app.post(&alice, &format!("/v1/vms/{vm}/snapshots"), json!({})).await.is(201);
    let agent = json!({ "name": "a", "repo": "o/r", "prompt": "p" });
    let agent = app.post(&alice, "/v1/agents", agent).await.is(201);
    let key = app.post(&alice, "/v1/keys", json!({ "name": "k" })).await.is(201);
    app.call(&alice, "PUT", "/v1/env/KEY", Some(json!({ "value": "v" }))).await.is(200);
    let real = [
        ("{vm}", vm.clone()),
        ("{vm_rule}", text(&vm_rule.is(201)["id"])),
        ("{rule}", text(&rule["id"])),
        ("{secret}", text(&secret["id"])),
        ("{snapshot}", text(&snapshot["data"]["id"])),
        ("{agent}", text(&agent["id"])),
        ("{key}", text(&key["id"])),
    ];
    for (method, route, sent) in ROUTES {
        let mut theirs = (*route).to_owned();
        let mut nobodys = (*route).to_owned();
        for (name, id) in &real {
            let prefix = id.split_once('_').unwrap().0;
            theirs = theirs.replace(name, id);
            nobodys = nobodys.replace(name, &format!("{prefix}_0000000000000000"));
        }
        let hidden = app.call(&bob, method, &theirs, body(sent)).await;
        let absent = app.call(&bob, method, &nobodys, body(sent)).await;
        assert_eq!(hidden.status, 404, "{method} {route}: {}", hidden.body);
        let shown = |body: &Value| {
            let mut text = body.to_string();
            for (_, id) in &real {
                let prefix = id.split_once('_').unwrap().0;
                text = text.replace(id, &format!("{prefix}_0000000000000000"));
            }
            text
        };
        assert_eq!(
            (hidden.status, shown(&hidden.body)),
            (absent.status, shown(&absent.body)),
            "{method} {route}"
        );
    }
    for (method, route) in COLLECTIONS.iter().filter(|(method, _)| *method == "GET") {
        let listed = app.call(&bob, method, route, None).await.is(200);
        let text = listed.to_string();
        assert!(real.iter().all(|(_, id)| !text.contains(id.as_str())), "{route}: {text}");
    }
    // A VM made from another's snapshot, a name that another has.
    let from = json!({ "name": "vm", "public_key": PUBLIC_KEY, "snapshot_id": snapshot["data"]["id"] });
    assert_eq!(app.post(&bob, "/v1/vms", from).await.error(404), "snapshot_not_found");
    app.vm(&bob, "vm").await;
    let same = json!({ "name": "s", "secret": "v", "env_var": "S" });
    app.post(&bob, "/v1/secrets", same).await.is(201);
    // And Alice still has everything.
    for (_, id) in real.iter().filter(|(name, _)| *name == "{vm}") {
        assert_eq!(app.get(&alice, &format!("/v1/vms/{id}")).await.is(200)["status"], "running");
    }
}

#[tokio::test]
async fn without_a_valid_key_there_is_nothing() {
    let app = TestApp::new();
    let all = ROUTES.iter().map(|(method, route, _)| (*method, *route)).chain(COLLECTIONS.iter().copied());
    for (method, route) in all {
        let path = route.replace(['{', '}'], "");
        for value in ["", "iron_live_wrong", "Basic abc"] {
            let mut request = Request::builder().method(method).uri(&path);
            if !value.is_empty() {
                let header_value =
                    if value.contains(' ') { value.to_owned() } else { format!("Bearer {value}") };
                request = request.header(header::AUTHORIZATION, header_value);
            }
            let answer = app.send(request.body(Body::empty()).unwrap()).await;
            assert_eq!(answer.headers[header::WWW_AUTHENTICATE], "Bearer");
            assert_eq!(answer.error(401), "unauthorized", "{method} {path}");
        }
    }
}

#[tokio::test]
async fn every_wrong_request_is_answered_in_the_envelope() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    assert_eq!(app.get(&key, "/nowhere").await.error(404), "not_found");
    assert_eq!(app.get(&key, "/v1/vms/").await.error(404), "not_found");
    let wrong = app.call(&key, "PATCH", "/v1/vms", None).await;
    assert_eq!(wrong.headers[header::ALLOW], "GET,HEAD,POST");
    assert_eq!(wrong.error(405), "method_not_allowed");

    let raw = async |kind: &str, body: Body| {
        let request = Request::post("/v1/vms")
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .header(header::CONTENT_TYPE, kind);
        app.send(request.body(body).unwrap()).await
    };
    for broken in ["{", "nonsense", "[]", "\"text\"", "{\"name\": }", "\u{0}", "{\"a\":1}{"] {
        assert_eq!(raw("application/json", Body::from(broken)).await.error(400), "invalid_json", "{broken}");
    }
    let deep = "[".repeat(100_000);
    assert_eq!(raw("application/json", Body::from(deep)).await.error(400), "invalid_json");
    assert_eq!(raw("application/json; charset=utf-8", Body::from("{}")).await.error(422), "validation_error");
    assert_eq!(raw("text/plain", Body::from("{}")).await.error(415), "unsupported_media_type");
    let large = Body::from(vec![b' '; 300 * 1024]);
    assert_eq!(raw("application/json", large).await.error(413), "payload_too_large");
    let endless =
        futures_util::stream::repeat_with(|| Ok::<_, std::io::Error>(bytes::Bytes::from(vec![b' '; 65536])));
    assert_eq!(raw("application/json", Body::from_stream(endless)).await.error(413), "payload_too_large");
    let cut = futures_util::stream::once(async { Err::<bytes::Bytes, _>(std::io::Error::other("cut")) });
    assert_eq!(raw("application/json", Body::from_stream(cut)).await.error(400), "invalid_body");

    let unknown =
        app.post(&key, "/v1/vms", json!({ "name": "a", "public_key": PUBLIC_KEY, "color": 1 })).await;
    assert!(unknown.body["error"]["message"].as_str().unwrap().contains("`color`"));
    assert_eq!(unknown.error(422), "validation_error");
    for (query, code) in [
        ("colour=red", "unknown_parameter"),
        ("limit=0", "invalid_parameter"),
        ("limit=101", "invalid_parameter"),
        ("limit=-1", "invalid_parameter"),
        ("limit=+1", "invalid_parameter"),
        ("limit=1&limit=2", "invalid_parameter"),
        ("status=up", "invalid_parameter"),
        ("status_detail=up", "invalid_parameter"),
        ("sort=id", "invalid_parameter"),
        ("order=up", "invalid_parameter"),
        ("cursor=x", "invalid_cursor"),
    ] {
        let answer = app.get(&key, &format!("/v1/vms?{query}")).await;
        let name = query.split('=').next().unwrap();
        assert!(answer.body["error"]["message"].as_str().unwrap().contains(name), "{query}");
        assert_eq!(answer.error(400), code, "{query}");
    }
    for (query, code) in [
        ("since=yesterday", "invalid_parameter"),
        ("until=2026-02-28", "invalid_parameter"),
        ("verdict=tolerated", "invalid_parameter"),
        ("allowed=yes", "invalid_parameter"),
        ("cidr=x", "invalid_parameter"),
        ("host=192.0.2.1", "invalid_parameter"),
        ("protocol=quic", "invalid_parameter"),
        ("vm_id=x", "invalid_parameter"),
        ("limit=501", "invalid_parameter"),
    ] {
        assert_eq!(app.get(&key, &format!("/v1/audit/egress?{query}")).await.error(400), code, "{query}");
    }
    for public_key in [
        "",
        "ssh-ed25519 AAAA...",
        "ssh-ed25519",
        "-----BEGIN OPENSSH PRIVATE KEY-----",
        &format!("command=\"x\" {PUBLIC_KEY}"),
        &format!("{PUBLIC_KEY}\ncommand=\"x\" {PUBLIC_KEY}"),
    ] {
        let body = json!({ "name": "vm", "public_key": public_key });
        assert_eq!(app.post(&key, "/v1/vms", body).await.error(422), "validation_error", "{public_key}");
    }
    let answer = app.get(&key, "/v1/vms/vm_%0a%1b[31mred").await;
    assert!(!answer.body.to_string().contains("\\u001b"), "{}", answer.body);
    assert_eq!(answer.error(404), "vm_not_found");
}

#[tokio::test]
async fn quotas_are_conflicts() {
    let settings = tapgate::Settings::default();
    let quotas = tapgate::http::Quotas { vms: 1, rules: 1, secrets: 1, snapshots: 1, env: 1 };
    let app = TestApp::with(tapgate::Settings { quotas, rates: common::no_limits(), ..settings });
    let key = app.user("alice@example.com").await;
    app.vm(&key, "one").await;
    let two = json!({ "name": "two", "public_key": PUBLIC_KEY });
    assert_eq!(app.post(&key, "/v1/vms", two).await.error(409), "quota_exceeded");
    app.post(&key, "/v1/egress/rules", json!({ "host": "a.example" })).await.is(201);
    let more = app.post(&key, "/v1/egress/rules", json!({ "host": "b.example" })).await;
    assert_eq!(more.error(409), "quota_exceeded");
    let put = async |key_name: &str| {
        app.call(&key, "PUT", &format!("/v1/env/{key_name}"), Some(json!({ "value": "v" }))).await
    };
    put("A").await.is(200);
    put("A").await.is(200);
    assert_eq!(put("B").await.error(409), "quota_exceeded");
}

#[tokio::test]
async fn health_needs_no_key() {
    assert_eq!(TestApp::new().get("", "/healthz").await.is(200), json!({ "status": "ok" }));
}

fn strict(change: impl FnOnce(&mut Rates)) -> TestApp {
    let mut rates = common::no_limits();
    change(&mut rates);
    TestApp::with(Settings { rates, ..Settings::default() })
}

#[track_caller]
fn is_limited(answer: common::Answer) {
    let wait: u64 = answer.headers[header::RETRY_AFTER].to_str().unwrap().parse().unwrap();
    assert!((1..=61).contains(&wait), "{wait}");
    assert_eq!(answer.error(429), "rate_limited");
}

#[tokio::test]
async fn who_asks_too_often_is_told_when_to_come_back() {
    let one = Rate { burst: 3, per_minute: 1 };
    let app = strict(|rates| rates.key = one);
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    for _ in 0..3 {
        app.get(&alice, "/v1/vms").await.is(200);
    }
    is_limited(app.get(&alice, "/v1/vms").await);
    app.get(&bob, "/v1/vms").await.is(200);

    let app = strict(|rates| rates.refused = one);
    let alice = app.user("alice@example.com").await;
    for _ in 0..3 {
        app.get("iron_live_guess", "/v1/vms").await.is(401);
    }
    is_limited(app.get("iron_live_guess", "/v1/vms").await);
    is_limited(app.get(&alice, "/v1/vms").await);

    let app = strict(|rates| rates.password = one);
    let login = json!({ "email": "a@example.com", "password": "guess" });
    for _ in 0..3 {
        app.post("", "/v1/auth/login", login.clone()).await.is(401);
    }
    is_limited(app.post("", "/v1/auth/login", login).await);

    let app = strict(|rates| rates.device = one);
    for _ in 0..3 {
        app.get("", "/v1/auth/device/poll?code=ABCD-1234").await.is(200);
    }
    is_limited(app.get("", "/v1/auth/device/poll?code=ABCD-1234").await);
    is_limited(app.call("", "POST", "/v1/auth/device/code", None).await);
}

#[tokio::test]
async fn a_retry_with_the_same_key_does_nothing_again() {
    let app = TestApp::new();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let post = async |token: &str, key: &str, path: &str, body: Value| {
        let request = Request::post(path)
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("Idempotency-Key", key);
        app.send(request.body(Body::from(body.to_string())).unwrap()).await
    };
    let vm = json!({ "name": "vm", "public_key": PUBLIC_KEY });
    let first = post(&alice, "one", "/v1/vms", vm.clone()).await;
    assert!(!first.headers.contains_key("idempotent-replayed"));
    let first = first.is(201);
    let again = post(&alice, "one", "/v1/vms", vm.clone()).await;
    assert_eq!(again.headers["idempotent-replayed"], "true");
    assert_eq!(again.headers[header::CONTENT_TYPE], "application/json");
    assert_eq!(again.is(201), first);
    assert_eq!(post(&alice, "two", "/v1/vms", vm.clone()).await.error(409), "vm_name_taken");
    assert_eq!(post(&alice, "two", "/v1/vms", vm.clone()).await.error(409), "vm_name_taken");
    let other = json!({ "name": "other", "public_key": PUBLIC_KEY });
    assert_eq!(post(&alice, "one", "/v1/vms", other).await.error(422), "idempotency_key_reused");
    assert_eq!(post(&alice, "one", "/v1/keys", vm.clone()).await.error(422), "idempotency_key_reused");
    post(&bob, "one", "/v1/vms", vm.clone()).await.is(201);
    assert_eq!(post(&alice, "", "/v1/vms", vm.clone()).await.error(400), "invalid_idempotency_key");
    assert_eq!(post("iron_live_x", "one", "/v1/vms", vm).await.error(401), "unauthorized");
    let key = post(&alice, "key", "/v1/keys", json!({ "name": "k" })).await.is(201);
    assert_eq!(post(&alice, "key", "/v1/keys", json!({ "name": "k" })).await.is(201), key);
}

#[tokio::test]
async fn a_change_may_insist_on_the_version_it_saw() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    let secret = json!({ "name": "s", "secret": "v", "env_var": "S" });
    let secret = app.post(&key, "/v1/secrets", secret).await.is(201)["id"].as_str().unwrap().to_owned();
    app.call(&key, "PUT", "/v1/env/K", Some(json!({ "value": "v" }))).await.is(200);
    let with = async |method: &str, path: &str, tag: &str, body: &Value| {
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::AUTHORIZATION, format!("Bearer {key}"));
        let request = request.header(header::CONTENT_TYPE, "application/json").header(header::IF_MATCH, tag);
        let body = if body.is_null() { Body::empty() } else { Body::from(body.to_string()) };
        app.send(request.body(body).unwrap()).await
    };
    for (path, method, body) in [
        (format!("/v1/secrets/{secret}"), "PATCH", json!({ "comment": "c" })),
        ("/v1/env/K".to_owned(), "PUT", json!({ "value": "w" })),
        ("/v1/egress/policy".to_owned(), "PUT", json!({ "mode": "warn" })),
        (format!("/v1/vms/{vm}/egress/policy"), "PUT", json!({ "mode": "enforce" })),
    ] {
        let tag = app.get(&key, &path).await.headers[header::ETAG].to_str().unwrap().to_owned();
        assert_eq!(with(method, &path, "\"other\"", &body).await.error(412), "precondition_failed", "{path}");
        assert_eq!(with(method, &path, "other", &body).await.error(400), "invalid_if_match");
        let changed = with(method, &path, &format!("\"x\", {tag}"), &body).await;
        let next = changed.headers[header::ETAG].to_str().unwrap().to_owned();
        changed.is(200);
        assert_ne!(next, tag);
        assert_eq!(with(method, &path, &tag, &body).await.error(412), "precondition_failed");
        with(method, &path, "*", &body).await.is(200);
        if path != "/v1/egress/policy" {
            assert_eq!(with("DELETE", &path, &tag, &Value::Null).await.error(412), "precondition_failed");
            let now = app.get(&key, &path).await.headers[header::ETAG].to_str().unwrap().to_owned();
            with("DELETE", &path, &now, &Value::Null).await.is(204);
        }
    }
}
