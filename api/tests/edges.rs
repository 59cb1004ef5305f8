//! What no example shows: the envelope on every wrong request, and accounts that never see each other.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use axum::body::Body;
use axum::http::{Request, header};
use common::{PUBLIC_KEY, TestApp};
use serde_json::{Value, json};
use tapgate::Settings;
use tapgate::http::{Rate, Rates};
use tower::ServiceExt as _;

/// An operation of the document that needs a key.
struct Operation {
    method: String,
    /// With names in braces.
    path: String,
    /// Right but for what the path names.
    body: Option<Value>,
}

/// All of them, from the document itself: one that is added is tested, or the test does not know its body and says so.
fn operations() -> Vec<Operation> {
    let document = tapgate::http::openapi::document();
    let mut all = Vec::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        for (method, described) in methods.as_object().unwrap() {
            if described["security"].as_array().is_some_and(Vec::is_empty) {
                continue;
            }
            let schema = &described["requestBody"]["content"]["application/json"]["schema"]["$ref"];
            let body = schema.as_str().map(|schema| match schema.rsplit('/').next().unwrap() {
                "NewVm" => json!({ "name": "b", "public_key": PUBLIC_KEY }),
                "VmPolicyChange" | "Policy" => json!({ "mode": "warn" }),
                "NewRule" => json!({ "host": "a.example" }),
                "NewSnapshot" => json!({ "label": "l" }),
                "NewSecret" => json!({ "name": "b", "secret": "v", "env_var": "B" }),
                "SecretChange" => json!({ "comment": "c" }),
                "NewAgent" => json!({ "name": "b", "repo": "https://git.example/o/r", "prompt": "p" }),
                "EnvValue" => json!({ "value": "v" }),
                "NewKey" => json!({ "name": "b" }),
                "PasswordChange" => json!({ "current_password": "x", "new_password": "yyyyyyyy" }),
                other => panic!("give this test a body for {other}"),
            });
            all.push(Operation { method: method.to_uppercase(), path: path.clone(), body });
        }
    }
    assert!(all.len() > 35);
    all
}

#[tokio::test]
async fn another_account_sees_what_never_was() {
    let mut app = TestApp::new();
    app.puts_in_force();
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
        ("{vm_id}", vm.clone()),
        ("{vm_rule_id}", text(&vm_rule.is(201)["id"])),
        ("{rule_id}", text(&rule["id"])),
        ("{secret_id}", text(&secret["id"])),
        ("{snapshot_id}", text(&snapshot["data"]["id"])),
        ("{agent_id}", text(&agent["id"])),
        ("{key_id}", text(&key["id"])),
    ];
    let fake = |id: &str| format!("{}_0000000000000000", id.split_once('_').unwrap().0);
    for Operation { method, path, body } in operations() {
        // Setting a variable makes Bob's own; everything else names what is there already.
        if !path.contains('{') || (method == "PUT" && path == "/v1/env/{key}") {
            continue;
        }
        let path = if path.contains("/vms/") { path.replace("{rule_id}", "{vm_rule_id}") } else { path };
        let (mut theirs, mut nobodys) = (path.replace("{key}", "KEY"), path.replace("{key}", "NO_KEY"));
        for (name, id) in &real {
            theirs = theirs.replace(name, id);
            nobodys = nobodys.replace(name, &fake(id));
        }
        assert!(!theirs.contains('{'), "give this test something for {path}");
        let hidden = app.call(&bob, &method, &theirs, body.clone()).await;
        let absent = app.call(&bob, &method, &nobodys, body).await;
        assert_eq!(hidden.status, 404, "{method} {path}: {}", hidden.body);
        let shown =
            |body: &Value| real.iter().fold(body.to_string(), |text, (_, id)| text.replace(id, &fake(id)));
        assert_eq!(
            (hidden.status, shown(&hidden.body)),
            (absent.status, shown(&absent.body)),
            "{method} {path}"
        );
    }
    for Operation { path, .. } in operations().iter().filter(|o| o.method == "GET" && !o.path.contains('{')) {
        let listed = app.call(&bob, "GET", path, None).await.is(200);
        let text = listed.to_string();
        assert!(real.iter().all(|(_, id)| !text.contains(id.as_str())), "{path}: {text}");
    }
    // A VM made from another's snapshot, a name that another has.
    let from = json!({ "name": "vm", "public_key": PUBLIC_KEY, "snapshot_id": snapshot["data"]["id"] });
    assert_eq!(app.post(&bob, "/v1/vms", from).await.error(404), "snapshot_not_found");
    app.vm(&bob, "vm").await;
    let same = json!({ "name": "s", "secret": "v", "env_var": "S" });
    app.post(&bob, "/v1/secrets", same).await.is(201);
    // And Alice still has everything.
    assert_eq!(app.get(&alice, &format!("/v1/vms/{vm}")).await.is(200)["status"], "running");
}

#[tokio::test]
async fn without_a_valid_key_there_is_nothing() {
    let app = TestApp::new();
    for Operation { method, path, .. } in operations() {
        let path = path.replace(['{', '}'], "");
        for value in ["", "iron_live_wrong", "Basic abc"] {
            let mut request = Request::builder().method(method.as_str()).uri(&path);
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

    // Either name might be taken, by whoever looks.
    const TWICE: &str = "{\"name\": \"a\", \"public_key\": \"k\", \"name\": \"b\"}";
    let raw = async |kind: &str, body: Body| {
        let request = Request::post("/v1/vms")
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .header(header::CONTENT_TYPE, kind);
        app.send(request.body(body).unwrap()).await
    };
    for broken in ["{", "nonsense", "[]", "\"text\"", "{\"name\": }", "\u{0}", "{\"a\":1}{", TWICE] {
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
    // A key for retries changes nothing of that.
    let keyed = async |body: Body| {
        let request = Request::post("/v1/vms")
            .header(header::AUTHORIZATION, format!("Bearer {key}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("Idempotency-Key", "one");
        app.send(request.body(body).unwrap()).await
    };
    let cut = futures_util::stream::once(async { Err::<bytes::Bytes, _>(std::io::Error::other("cut")) });
    assert_eq!(keyed(Body::from_stream(cut)).await.error(400), "invalid_body");
    let large = keyed(Body::from(vec![b' '; 400 * 1024])).await;
    assert!(large.body["error"]["message"].as_str().unwrap().contains("256 KiB"), "{large:?}");
    assert_eq!(large.error(413), "payload_too_large");

    // Who has no key holds less of the host's memory.
    for path in ["/v1/users", "/v1/auth/login", "/v1/auth/device/code"] {
        let stranger = app.post("", path, json!({ "email": "a".repeat(33 * 1024) })).await;
        assert!(stranger.body.to_string().contains("32 KiB"), "{path}: {stranger:?}");
        assert_eq!(stranger.error(413), "payload_too_large", "{path}");
    }

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
    let quotas = tapgate::http::Quotas {
        vms: 1,
        rules: 1,
        secrets: 1,
        secret_octets: 100,
        snapshots: 1,
        env: 1,
        keys: 2,
    };
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
    let secret = |name: &str| json!({ "name": name, "secret": "v", "env_var": name.to_uppercase() });
    app.post(&key, "/v1/secrets", secret("a")).await.is(201);
    assert_eq!(app.post(&key, "/v1/secrets", secret("b")).await.error(409), "quota_exceeded");
    // Nor more octets of secrets than it may, whether by another or by a longer one.
    let long = |name: &str, octets| json!({ "name": name, "secret": "v".repeat(octets), "env_var": name.to_uppercase() });
    let other = app.user("bob@example.com").await;
    let too_long = app.post(&other, "/v1/secrets", long("a", 101)).await;
    assert!(too_long.body["error"]["message"].as_str().unwrap().contains("100 bytes"), "{}", too_long.body);
    assert_eq!(too_long.error(409), "quota_exceeded");
    let one = app.post(&other, "/v1/secrets", long("a", 60)).await.is(201);
    let one = format!("/v1/secrets/{}", one["id"].as_str().unwrap());
    let change =
        async |octets| app.call(&other, "PATCH", &one, Some(json!({ "secret": "v".repeat(octets) }))).await;
    change(100).await.is(200);
    assert_eq!(change(101).await.error(409), "quota_exceeded");
    let vm = app.get(&key, "/v1/vms").await.is(200)["data"][0]["id"].as_str().unwrap().to_owned();
    app.make_ready(&vm).await;
    let snapshots = format!("/v1/vms/{vm}/snapshots");
    app.post(&key, &snapshots, json!({})).await.is(201);
    assert_eq!(app.post(&key, &snapshots, json!({})).await.error(409), "quota_exceeded");
    // The first key came with the account.
    app.post(&key, "/v1/keys", json!({ "name": "k" })).await.is(201);
    let more = app.post(&key, "/v1/keys", json!({ "name": "l" })).await;
    let said = more.body["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(more.error(409), "quota_exceeded");
    assert!(said.contains('2'), "says how many there may be: {said}");
}

/// A guest is told all variables of its account, so all of them together are bounded too.
#[tokio::test]
async fn variables_together_are_no_more_than_a_guest_can_be_told() {
    let app = TestApp::with(Settings { rates: common::no_limits(), ..Settings::default() });
    let key = app.user("alice@example.com").await;
    let put = async |name: &str, value: &str| {
        app.call(&key, "PUT", &format!("/v1/env/{name}"), Some(json!({ "value": value }))).await
    };
    // Of the longest values, in characters of four octets, two fit.
    let longest = "\u{1f980}".repeat(32_000);
    put("A", &longest).await.is(200);
    put("B", &longest).await.is(200);
    let refused = put("C", &longest).await;
    let said = refused.body["error"]["message"].as_str().unwrap().to_owned();
    assert_eq!(refused.error(409), "quota_exceeded");
    assert!(said.contains("256 KiB of environment variables"), "{said}");
    // One is replaced, not added to.
    put("B", &longest).await.is(200);
    put("B", "short").await.is(200);
    put("C", &longest).await.is(200);
}

#[tokio::test]
async fn health_needs_no_key() {
    assert_eq!(TestApp::new().get("", "/healthz").await.is(200), json!({ "status": "ok" }));
}

/// Anybody may ask, and the writer has more to do.
#[tokio::test]
async fn asking_for_health_does_not_ask_the_writer_each_time() {
    let app = TestApp::new();
    app.get("", "/healthz").await.is(200);
    let other = rusqlite::Connection::open(app.folder.path().join("db/tapgate.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    for _ in 0..50 {
        app.get("", "/healthz").await.is(200);
    }
    // It is no answer for long.
    tokio::time::sleep(std::time::Duration::from_millis(1100)).await;
    assert_eq!(app.get("", "/healthz").await.error(503), "unavailable");
    assert_eq!(app.get("", "/healthz").await.error(503), "unavailable");
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

    let app = strict(|rates| rates.account = one);
    let alice = app.user("alice@example.com").await;
    let other = app.post(&alice, "/v1/keys", json!({ "name": "other" })).await.is(201);
    let other = other["token"].as_str().unwrap();
    for key in [&alice, other] {
        app.get(key, "/v1/vms").await.is(200);
    }
    is_limited(app.get(other, "/v1/vms").await);
    is_limited(app.get(&alice, "/v1/vms").await);

    let app = strict(|rates| rates.refused = one);
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    app.get(&alice, "/v1/vms").await.is(200);
    for _ in 0..3 {
        app.get("iron_live_guess", "/v1/vms").await.is(401);
    }
    is_limited(app.get("iron_live_guess", "/v1/vms").await);
    is_limited(app.get(&bob, "/v1/vms").await);
    // Whose key was good before is not shut out by others behind the same address, until it is revoked.
    app.get(&alice, "/v1/vms").await.is(200);
    let key = app.get(&alice, "/v1/keys").await.is(200)["data"][0]["id"].as_str().unwrap().to_owned();
    app.call(&alice, "DELETE", &format!("/v1/keys/{key}"), None).await.is(204);
    is_limited(app.get(&alice, "/v1/vms").await);
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

/// Their rows stay until they end, so there are not as many as anybody likes.
#[tokio::test]
async fn requests_to_be_retried_that_run_at_a_time_are_bounded() {
    let app = TestApp::new();
    let (alice, bob) = (app.user("alice@example.com").await, app.user("bob@example.com").await);
    let user = app.store.authenticate(&alice).await.unwrap().unwrap().user;
    for key in 0..1000 {
        app.store.idempotency_begin(&user, &key.to_string(), vec![1]).await.unwrap();
    }
    let rule = async |token: &str| {
        let request = Request::post("/v1/egress/rules")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("idempotency-key", "one more");
        let body = json!({ "host": "a.example" }).to_string();
        app.send(request.body(Body::from(body)).unwrap()).await
    };
    is_limited(rule(&alice).await);
    rule(&bob).await.is(201);
    app.store.idempotency_end(&user, "0", None).await.unwrap();
    rule(&alice).await.is(201);
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
        assert_eq!(
            with(method, &path, "W/\"weak\"", &body).await.error(412),
            "precondition_failed",
            "{path}"
        );
        if path != "/v1/egress/policy" {
            assert_eq!(with("DELETE", &path, &tag, &Value::Null).await.error(412), "precondition_failed");
            let now = app.get(&key, &path).await.headers[header::ETAG].to_str().unwrap().to_owned();
            with("DELETE", &path, &now, &Value::Null).await.is(204);
        }
    }
    // `*` is any version of what is there (RFC 9110, section 13.1.1), and what is not there has none.
    let new = json!({ "value": "v" });
    assert_eq!(with("PUT", "/v1/env/NEW", "*", &new).await.error(412), "precondition_failed");
    assert_eq!(app.get(&key, "/v1/env/NEW").await.error(404), "env_not_found");
}

#[tokio::test]
async fn a_database_that_cannot_be_written_is_said_and_nothing_is_lost() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    app.call(&key, "PUT", "/v1/env/K", Some(json!({ "value": "before" }))).await.is(200);
    let other = rusqlite::Connection::open(app.folder.path().join("db/tapgate.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let refused = app.call(&key, "PUT", "/v1/env/K", Some(json!({ "value": "after" }))).await;
    assert_eq!(refused.headers[header::RETRY_AFTER], "5");
    assert_eq!(refused.error(503), "unavailable");
    assert_eq!(app.get("", "/healthz").await.error(503), "unavailable");
    assert_eq!(app.get(&key, "/v1/env/K").await.is(200)["value"], "before", "reading goes on");
    other.execute_batch("ROLLBACK").unwrap();
    app.call(&key, "PUT", "/v1/env/K", Some(json!({ "value": "after" }))).await.is(200);
}

/// Sends a request whose client hangs up while the records are written.
async fn hung_up(app: &TestApp, request: Request<Body>) {
    let lock = rusqlite::Connection::open(app.folder.path().join("db/tapgate.db")).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    let request = tokio::spawn(app.router.clone().oneshot(request));
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    request.abort();
    assert!(request.await.unwrap_err().is_cancelled());
    lock.execute_batch("ROLLBACK").unwrap();
}

/// The change is recorded, so the engine must hear of it.
#[tokio::test(flavor = "multi_thread")]
async fn a_change_is_carried_out_whoever_waits_for_the_answer() {
    let mut app = TestApp::new();
    let token = app.user("ada@example.com").await;
    let rule = app.post(&token, "/v1/egress/rules", json!({ "host": "a.example" })).await;
    let path = format!("/v1/egress/rules/{}", rule.body["id"].as_str().unwrap());
    while app.commands.try_recv().is_ok() {}
    let request = Request::delete(&path).header(header::AUTHORIZATION, format!("Bearer {token}"));
    hung_up(&app, request.body(Body::empty()).unwrap()).await;
    let heard = tokio::time::timeout(std::time::Duration::from_secs(10), app.commands.recv()).await;
    assert!(heard.is_ok(), "the engine never heard of the rule that was removed");
    assert_eq!(app.get(&token, "/v1/egress/rules").await.body["data"], json!([]));
}

/// Also while its key is being written down: the retry finds the answer, not a request that never ran.
#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_hanging_up_is_answered() {
    let app = TestApp::new();
    let token = app.user("ada@example.com").await;
    let request = || {
        Request::post("/v1/egress/rules")
            .header(header::AUTHORIZATION, format!("Bearer {token}"))
            .header(header::CONTENT_TYPE, "application/json")
            .header("idempotency-key", "one")
            .body(Body::from(json!({ "host": "a.example" }).to_string()))
            .unwrap()
    };
    // The key's first use is noted by then: nothing else waits for the file.
    app.call(&token, "PUT", "/v1/env/K", Some(json!({ "value": "v" }))).await.is(200);
    hung_up(&app, request()).await;
    let mut again = app.send(request()).await;
    for _ in 0..100 {
        if again.status != 409 {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        again = app.send(request()).await;
    }
    again.is(201);
    assert_eq!(app.get(&token, "/v1/egress/rules").await.body["data"].as_array().unwrap().len(), 1);
}
