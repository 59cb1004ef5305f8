//! Every example of the API reference, in its order: status, shape, values, codes.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Answer, PUBLIC_KEY, TestApp, keys};
use serde_json::{Value, json};
use tapgate::engine::{Command, Scope};
use tapgate_model::{
    AuditEvent, AuditSink as _, Mode, Protocol, Reason, StatusDetail as S, UserId, Verdict, VmId, VmPolicy,
};

/// The page's timestamps: whole seconds, `Z`.
#[track_caller]
fn is_time(value: &Value) {
    let text = value.as_str().unwrap();
    assert!(text.len() == 20 && text.ends_with('Z'), "{text}");
    text.parse::<jiff::Timestamp>().unwrap();
}

#[track_caller]
fn is_id(value: &Value, prefix: &str) {
    let text = value.as_str().unwrap();
    assert!(text.starts_with(prefix) && text.len() >= prefix.len() + 8, "{text}");
}

#[track_caller]
fn is_list(answer: Answer, length: usize) -> Vec<Value> {
    let body = answer.is(200);
    assert_eq!(keys(&body), ["cursor", "data", "has_more"]);
    assert_eq!((&body["has_more"], &body["cursor"]), (&json!(false), &Value::Null));
    let data = body["data"].as_array().unwrap().clone();
    assert_eq!(data.len(), length, "{body}");
    data
}

const VM: [&str; 6] = ["created_at", "id", "name", "status", "status_detail", "updated_at"];

#[tokio::test]
async fn vms() {
    let mut app = TestApp::new();
    let key = app.user("alice@example.com").await;

    // Create a VM
    let body = json!({ "name": "my-dev-env", "public_key": PUBLIC_KEY });
    let vm = app.post(&key, "/v1/vms", body.clone()).await.is(201);
    assert_eq!(keys(&vm), VM);
    is_id(&vm["id"], "vm_");
    assert_eq!(
        (&vm["name"], &vm["status"], &vm["status_detail"]),
        (&json!("my-dev-env"), &json!("pending"), &json!("creating"))
    );
    is_time(&vm["created_at"]);
    is_time(&vm["updated_at"]);
    let id = vm["id"].as_str().unwrap().to_owned();
    let path = format!("/v1/vms/{id}");
    let woken: VmId = id.parse().unwrap();
    assert_eq!(app.commands.recv().await, Some(Command::Vm(woken.clone())));
    assert_eq!(app.post(&key, "/v1/vms", body.clone()).await.error(409), "vm_name_taken");

    // List VMs
    assert_eq!(is_list(app.get(&key, "/v1/vms?status=running&limit=10").await, 0), [] as [Value; 0]);
    app.make_ready(&id).await;
    let listed = is_list(app.get(&key, "/v1/vms?status=running&limit=10").await, 1);
    assert_eq!(keys(&listed[0]), VM);
    assert_eq!((&listed[0]["status"], &listed[0]["status_detail"]), (&json!("running"), &json!("ready")));
    is_list(app.get(&key, "/v1/vms?status_detail=ready&name=my-dev-env&sort=name&order=asc").await, 1);
    is_list(app.get(&key, "/v1/vms?sort=updated_at&status_detail=running").await, 0);

    // Get a VM
    let got = app.get(&key, &path).await.is(200);
    assert_eq!(got, listed[0]);
    let missing = app.get(&key, "/v1/vms/vm_k3mf9xvw2p").await.is(404);
    assert_eq!(
        missing,
        json!({ "error": { "code": "vm_not_found", "message": "No VM with ID vm_k3mf9xvw2p" } })
    );

    // Destroy a VM: not while it runs
    let refused = app.call(&key, "DELETE", &path, None).await.is(409);
    assert_eq!(
        refused,
        json!({ "error": { "code": "vm_not_stopped", "message": "VM must be stopped before it can be destroyed" } })
    );

    // Start a VM: not one that runs
    let start = format!("{path}/start");
    assert_eq!(app.call(&key, "POST", &start, None).await.error(409), "vm_already_running");

    // Stop a VM
    let stopped = app.call(&key, "POST", &format!("{path}/stop"), None).await.is(200);
    assert_eq!(keys(&stopped), VM);
    assert_eq!((&stopped["status"], &stopped["status_detail"]), (&json!("stopped"), &json!("stopping")));
    app.advance(&id, S::Stopped).await;

    // Start a VM: the answer comes when it runs
    let (store, notifier) = (app.store.clone(), app.engine.notifier());
    let mut commands = std::mem::replace(&mut app.commands, tokio::sync::mpsc::unbounded_channel().1);
    while commands.try_recv().is_ok() {}
    let (started, ()) = tokio::join!(app.call(&key, "POST", &start, None), async {
        assert_eq!(commands.recv().await, Some(Command::Vm(woken.clone())));
        assert_eq!(store.vm_any(&woken).await.unwrap().detail, S::Starting, "persisted before acted on");
        store.vm_advance(&woken, S::Running, None).await.unwrap();
        notifier.changed(woken.clone());
    });
    let started = started.is(200);
    assert_eq!(keys(&started), VM);
    assert_eq!(started["status"], "running");

    // Get SSH connection info
    let ssh = app.get(&key, &format!("{path}/ssh")).await.is(200);
    assert_eq!(
        ssh,
        json!({ "host": "203.0.113.10", "port": 2222, "username": "root", "command": "ssh -p 2222 root@203.0.113.10" })
    );

    // Destroy a VM; its name is free again
    app.call(&key, "POST", &format!("{path}/stop"), None).await.is(200);
    assert_eq!(app.call(&key, "DELETE", &path, None).await.is(204), Value::Null);
    assert_eq!(app.get(&key, &path).await.is(200)["status_detail"], "destroying");
    app.post(&key, "/v1/vms", body).await.is(201);
    is_list(app.get(&key, "/v1/vms?status=destroyed").await, 1);
    assert_eq!(app.call(&key, "POST", &start, None).await.error(409), "vm_destroyed");
}

#[tokio::test]
async fn a_vm_that_fails_says_why() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let id = app.vm(&key, "vm").await;
    app.advance(&id, S::Failed).await;
    let vm = app.get(&key, &format!("/v1/vms/{id}")).await.is(200);
    assert_eq!((&vm["status"], &vm["failure_reason"]), (&json!("failed"), &json!("it broke")));
    app.call(&key, "DELETE", &format!("/v1/vms/{id}"), None).await.is(204);
}

#[tokio::test]
async fn egress() {
    let mut app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    while app.commands.try_recv().is_ok() {}

    // Policy
    assert_eq!(app.get(&key, "/v1/egress/policy").await.is(200), json!({ "mode": "enforce" }));
    let put = app.call(&key, "PUT", "/v1/egress/policy", Some(json!({ "mode": "warn" }))).await.is(200);
    assert_eq!(put, json!({ "mode": "warn" }));
    assert!(matches!(app.commands.recv().await, Some(Command::Policy(Scope::User(_)))));
    for wrong in
        [json!({ "mode": "off" }), json!({}), json!({ "mode": 1 }), json!({ "mode": "warn", "x": 1 })]
    {
        let refused = app.call(&key, "PUT", "/v1/egress/policy", Some(wrong)).await;
        assert_eq!(refused.error(422), "validation_error");
    }

    // Rules
    let body = json!({ "name": "github-api", "host": "api.github.com", "comment": "GitHub API access for code pulls" });
    let rule = app.post(&key, "/v1/egress/rules", body.clone()).await.is(201);
    assert_eq!(keys(&rule), ["cidr", "comment", "created_at", "host", "id", "name"]);
    is_id(&rule["id"], "egr_");
    is_time(&rule["created_at"]);
    assert_eq!((&rule["host"], &rule["cidr"]), (&json!("api.github.com"), &Value::Null));
    assert!(matches!(app.commands.recv().await, Some(Command::Policy(Scope::User(_)))));
    assert_eq!(app.post(&key, "/v1/egress/rules", body).await.error(409), "rule_name_taken");
    let net = json!({ "name": "internal-network", "cidr": "10.1.2.3/8" });
    let net = app.post(&key, "/v1/egress/rules", net).await.is(201);
    assert_eq!(
        (&net["host"], &net["cidr"], &net["comment"]),
        (&Value::Null, &json!("10.0.0.0/8"), &Value::Null)
    );
    for wrong in [
        json!({}),
        json!({ "host": "a.example", "cidr": "10.0.0.0/8" }),
        json!({ "host": "https://a.example" }),
        json!({ "host": "192.0.2.1" }),
        json!({ "host": "a.*.example" }),
        json!({ "cidr": "10.0.0.0/33" }),
        json!({ "cidr": "169.254.169.254" }),
        json!({ "cidr": "fe80::/64" }),
        json!({ "host": "a.example", "name": "" }),
        json!({ "host": "a.example", "hosts": [] }),
    ] {
        assert_eq!(app.post(&key, "/v1/egress/rules", wrong).await.error(422), "validation_error");
    }
    let listed = is_list(app.get(&key, "/v1/egress/rules").await, 2);
    assert_eq!((&listed[0], &listed[1]), (&net, &rule), "newest first");
    is_list(app.get(&key, "/v1/egress/rules?host=API.github.com.").await, 1);
    is_list(app.get(&key, "/v1/egress/rules?cidr=10.0.0.0/8").await, 1);
    is_list(app.get(&key, "/v1/egress/rules?name=github-api&sort=host&order=asc").await, 1);

    // A VM's own
    let policy = format!("/v1/vms/{vm}/egress/policy");
    let own = app.get(&key, &policy).await.is(200);
    assert_eq!(own, json!({ "mode": "warn", "inherit_mode": true, "inherit_rules": true }));
    let set = json!({ "mode": "enforce", "inherit_rules": false });
    let own = app.call(&key, "PUT", &policy, Some(set)).await.is(200);
    assert_eq!(own, json!({ "mode": "enforce", "inherit_mode": false, "inherit_rules": false }));
    let rules = format!("/v1/vms/{vm}/egress/rules");
    is_list(app.get(&key, &rules).await, 0);
    let taken = json!({ "host": "b.example", "name": "github-api" });
    assert_eq!(app.post(&key, &rules, taken).await.error(409), "rule_name_taken");
    let rule_of_vm = app.post(&key, &rules, json!({ "host": "*.b.example" })).await.is(201);
    let its_id = rule_of_vm["id"].as_str().unwrap();
    is_list(app.get(&key, "/v1/egress/rules").await, 2);
    assert_eq!(
        app.call(&key, "DELETE", &format!("/v1/egress/rules/{its_id}"), None).await.error(404),
        "rule_not_found"
    );
    app.call(&key, "DELETE", &format!("{rules}/{its_id}"), None).await.is(204);
    app.call(&key, "DELETE", &policy, None).await.is(204);
    assert_eq!(app.get(&key, &policy).await.is(200)["mode"], "warn");

    // Delete
    let path = format!("/v1/egress/rules/{}", rule["id"].as_str().unwrap());
    assert_eq!(app.call(&key, "DELETE", &path, None).await.is(204), Value::Null);
    assert_eq!(app.call(&key, "DELETE", &path, None).await.error(404), "rule_not_found");
}

#[tokio::test]
async fn audit() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let vm: VmId = app.vm(&key, "vm").await.parse().unwrap();
    let user: UserId = app.store.vm_any(&vm).await.unwrap().user;
    let policy = VmPolicy {
        vm: vm.clone(),
        user,
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    let allow = Verdict::Allow { rule: Some("egr_9xm2kfp4".parse().unwrap()), reason: Reason::Host };
    let mut event = AuditEvent::new(&policy, Protocol::Tls, allow, 1_772_280_330_000_000);
    event.host = Some("api.github.com".parse().unwrap());
    event.port = Some(443);
    app.store.audit().record(event);
    let deny = Verdict::Deny { reason: Reason::NoRule };
    let mut event = AuditEvent::new(&policy, Protocol::Tcp, deny, 1_772_280_331_500_000);
    event.address = Some("192.0.2.7".parse().unwrap());
    app.store.audit().record(event);
    app.store.audit().flush().await;

    let listed = is_list(app.get(&key, "/v1/audit/egress").await, 2);
    let (denied, allowed) = (&listed[0], &listed[1]);
    is_id(&allowed["id"], "ee_");
    for (field, value) in [
        ("timestamp", json!("2026-02-28T12:05:30.000000Z")),
        ("vm_id", json!(vm)),
        ("host", json!("api.github.com")),
        ("cidr", Value::Null),
        ("protocol", json!("tls")),
        ("verdict", json!("allowed")),
        ("allowed", json!(true)),
        ("mode", json!("enforce")),
        ("port", json!(443)),
        ("rule_id", json!("egr_9xm2kfp4")),
        ("reason", json!("host")),
        ("method", Value::Null),
        ("path", Value::Null),
        ("secrets", json!([])),
    ] {
        assert_eq!(allowed[field], value, "{field}");
    }
    assert_eq!((&denied["host"], &denied["cidr"]), (&Value::Null, &json!("192.0.2.7/32")));
    assert_eq!((&denied["verdict"], &denied["allowed"]), (&json!("denied"), &json!(false)));

    is_list(app.get(&key, &format!("/v1/audit/egress?vm_id={vm}&verdict=denied&limit=20")).await, 1);
    for (query, length) in [
        ("allowed=true", 1),
        ("allowed=false&mode=enforce", 1),
        ("mode=warn", 0),
        ("host=api.github.com", 1),
        ("cidr=192.0.2.0/24", 1),
        ("cidr=10.0.0.0/8", 0),
        ("protocol=tcp", 1),
        ("since=2026-02-28T12:05:30Z", 1),
        ("until=2026-02-28T12:05:31Z", 1),
        ("order=asc", 2),
        ("vm_id=vm_unknown", 0),
    ] {
        is_list(app.get(&key, &format!("/v1/audit/egress?{query}")).await, length);
    }
    let first = app.get(&key, "/v1/audit/egress?limit=1").await.is(200);
    assert_eq!(first["has_more"], true);
    let cursor = first["cursor"].as_str().unwrap();
    is_list(app.get(&key, &format!("/v1/audit/egress?limit=1&cursor={cursor}")).await, 1);
    let other = app.get(&key, &format!("/v1/audit/egress?limit=1&order=asc&cursor={cursor}")).await;
    assert_eq!(other.error(400), "invalid_cursor");
    assert_eq!(app.get(&key, "/v1/audit/egress?cursor=ee_p3xn7vm2").await.error(400), "invalid_cursor");
    // As on the page, an event's ID is a cursor too; another account's is none.
    let after = |event: &Value| format!("/v1/audit/egress?limit=1&cursor={}", event["id"].as_str().unwrap());
    assert_eq!(is_list(app.get(&key, &after(denied)).await, 1)[0], *allowed);
    is_list(app.get(&key, &after(allowed)).await, 0);
    let newer = format!("{}&order=asc&protocol=tcp", after(allowed));
    assert_eq!(is_list(app.get(&key, &newer).await, 1)[0], *denied);
    let bob = app.user("bob@example.com").await;
    assert_eq!(app.get(&bob, &after(denied)).await.error(400), "invalid_cursor");
}

#[tokio::test]
async fn secrets() {
    let mut app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let body = json!({ "name": "github-main", "secret": "ghp_abc123def456...", "env_var": "GITHUB_TOKEN" });
    let secret = app.post(&key, "/v1/secrets", body.clone()).await.is(201);
    assert_eq!(
        keys(&secret),
        ["comment", "created_at", "env_var", "hosts", "id", "name", "proxy_value", "updated_at"]
    );
    is_id(&secret["id"], "sec_");
    for (field, value) in [
        ("name", json!("github-main")),
        ("env_var", json!("GITHUB_TOKEN")),
        ("hosts", json!(["*"])),
        ("proxy_value", json!("IRONSH_PROXY_github-main")),
        ("comment", Value::Null),
    ] {
        assert_eq!(secret[field], value);
    }
    is_time(&secret["created_at"]);
    is_time(&secret["updated_at"]);
    assert!(matches!(app.commands.recv().await, Some(Command::Policy(Scope::User(_)))));
    assert!(matches!(app.commands.recv().await, Some(Command::Env(_))));

    assert_eq!(app.post(&key, "/v1/secrets", body).await.error(409), "secret_name_taken");
    let scoped = json!({
        "name": "scoped", "secret": "x", "env_var": "GITHUB_TOKEN", "hosts": ["api.github.com", "*.github.com"],
    });
    assert_eq!(app.post(&key, "/v1/secrets", scoped.clone()).await.error(409), "env_var_taken");
    let mut good = scoped.clone();
    good["env_var"] = "OTHER".into();
    let scoped_made = app.post(&key, "/v1/secrets", good).await.is(201);
    assert_eq!(scoped_made["hosts"], json!(["api.github.com", "*.github.com"]));
    for (field, wrong) in [
        ("hosts", json!(["http://x"])),
        ("hosts", json!([])),
        ("hosts", json!(["*.*.example"])),
        ("hosts", json!("a.example")),
        ("name", json!("a b")),
        ("name", json!("a".repeat(65))),
        ("name", json!("")),
        ("env_var", json!("lower")),
        ("env_var", json!("1A")),
        ("env_var", json!("_A")),
        ("secret", json!("a\r\nb")),
        ("secret", json!("")),
        ("secret", json!(7)),
        ("secret", json!("x IRONSH_PROXY_scoped")),
    ] {
        let mut body = json!({ "name": "n", "secret": "s", "env_var": "N" });
        body[field] = wrong;
        assert_eq!(app.post(&key, "/v1/secrets", body).await.error(422), "validation_error");
    }

    let listed = is_list(app.get(&key, "/v1/secrets").await, 2);
    assert_eq!(listed[1], secret);
    is_list(app.get(&key, "/v1/secrets?name=scoped&sort=name&order=asc").await, 1);
    let path = format!("/v1/secrets/{}", secret["id"].as_str().unwrap());
    assert_eq!(app.get(&key, &path).await.is(200), secret);

    // PATCH: absent is kept, null removes where that is possible.
    let patch = async |body: Value| app.call(&key, "PATCH", &path, Some(body)).await;
    let same = patch(json!({ "secret": "ghp_newtoken789..." })).await.is(200);
    assert_eq!(keys(&same), keys(&secret));
    assert_eq!((&same["hosts"], &same["comment"]), (&secret["hosts"], &secret["comment"]));
    assert_eq!(patch(json!({ "comment": "why" })).await.is(200)["comment"], "why");
    assert_eq!(patch(json!({})).await.is(200)["comment"], "why");
    assert_eq!(patch(json!({ "comment": null })).await.is(200)["comment"], Value::Null);
    assert_eq!(app.call(&key, "PATCH", &path, None).await.error(400), "invalid_json");
    assert_eq!(patch(json!({ "env_var": "OTHER" })).await.error(409), "env_var_taken");
    for wrong in [
        json!({ "name": "other" }),
        json!({ "secret": null }),
        json!({ "env_var": null }),
        json!({ "hosts": null }),
        json!({ "hosts": [] }),
        json!({ "value": "x" }),
    ] {
        assert_eq!(patch(wrong).await.error(422), "validation_error");
    }
    let vm = app.vm(&key, "vm").await.parse().unwrap();
    let opened = app.store.effective_policy(&vm, tapgate_model::policy::SecretsOverHttp::Explicit);
    let opened = opened.await.unwrap();
    assert!(opened.secrets.iter().any(|secret| secret.value.expose() == b"ghp_newtoken789..."));

    app.call(&key, "DELETE", &path, None).await.is(204);
    assert_eq!(app.get(&key, &path).await.error(404), "secret_not_found");
}

#[tokio::test]
async fn snapshots() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let vm = app.vm(&key, "vm").await;
    let of_vm = format!("/v1/vms/{vm}/snapshots");
    let body = json!({ "label": "before-refactor" });
    assert_eq!(app.post(&key, &of_vm, body.clone()).await.error(409), "vm_not_running");
    assert_eq!(app.post(&key, "/v1/vms/vm_xyz789/snapshots", body.clone()).await.error(404), "vm_not_found");
    app.make_ready(&vm).await;
    assert_eq!(app.post(&key, &of_vm, json!({ "label": 7 })).await.error(422), "validation_error");
    let made = app.post(&key, &of_vm, body).await.is(201);
    assert_eq!(keys(&made), ["data"]);
    let snapshot = &made["data"];
    let fields = [
        "created_at",
        "id",
        "label",
        "r2_key",
        "size_bytes",
        "source_base_image",
        "source_snapshot_id",
        "source_virtual_machine_id",
        "status",
    ];
    assert_eq!(keys(snapshot), fields);
    is_id(&snapshot["id"], "snap_");
    assert_eq!(
        (&snapshot["status"], &snapshot["source_base_image"]),
        (&json!("pending"), &json!("debian-12"))
    );
    assert_eq!(snapshot["source_virtual_machine_id"], json!(vm));
    app.call(&key, "POST", &of_vm, None).await.is(201);

    let both = is_list(app.get(&key, "/v1/snapshots?limit=10").await, 2);
    assert_eq!(both[1], *snapshot, "newest first");
    // The cursor may be a snapshot's ID.
    let after = |snapshot: &Value| format!("/v1/snapshots?cursor={}", snapshot["id"].as_str().unwrap());
    assert_eq!(is_list(app.get(&key, &after(&both[0])).await, 1)[0], *snapshot);
    is_list(app.get(&key, &after(snapshot)).await, 0);
    assert_eq!(app.get(&key, "/v1/snapshots?cursor=snap_abc123").await.error(400), "invalid_cursor");
    let bob = app.user("bob@example.com").await;
    assert_eq!(app.get(&bob, &after(snapshot)).await.error(400), "invalid_cursor");
    is_list(app.get(&key, &of_vm).await, 2);
    let path = format!("/v1/snapshots/{}", snapshot["id"].as_str().unwrap());
    assert_eq!(app.get(&key, &path).await.is(200), made);
    let from = json!({ "name": "from", "public_key": PUBLIC_KEY, "snapshot_id": snapshot["id"] });
    assert_eq!(app.post(&key, "/v1/vms", from).await.error(409), "snapshot_not_ready");
    app.call(&key, "DELETE", &path, None).await.is(204);
    assert_eq!(app.get(&key, &path).await.error(404), "snapshot_not_found");
    is_list(app.get(&key, "/v1/snapshots").await, 1);
}

#[tokio::test]
async fn users() {
    let app = TestApp::new();
    let body = json!({
        "first_name": "Alice", "last_name": "Smith", "email": "alice@example.com", "password": "s3cureP@ssword",
    });
    let made = app.post("", "/v1/users", body.clone()).await.is(201);
    assert_eq!(keys(&made), ["api_key", "user"]);
    assert_eq!(keys(&made["api_key"]), ["created_at", "id", "name", "token"]);
    assert_eq!(
        keys(&made["user"]),
        ["created_at", "email", "email_verified", "first_name", "id", "last_name"]
    );
    is_id(&made["api_key"]["id"], "key_");
    is_id(&made["user"]["id"], "usr_");
    assert_eq!((&made["api_key"]["name"], &made["user"]["email_verified"]), (&json!("CLI"), &json!(false)));
    let token = made["api_key"]["token"].as_str().unwrap();
    assert!(token.starts_with("iron_live_"));
    app.get(token, "/v1/vms").await.is(200);

    let mut again = body.clone();
    again["email"] = "ALICE@example.com".into();
    assert_eq!(app.post("", "/v1/users", again).await.error(409), "email_taken");
    for field in ["first_name", "last_name", "email", "password"] {
        for wrong in [Value::Null, json!(""), json!(1), json!("a\u{0}b")] {
            let mut body = body.clone();
            body[field] = wrong;
            assert_eq!(app.post("", "/v1/users", body).await.error(422), "validation_error", "{field}");
        }
    }
    // Logging in: the same answer for a wrong password and for nobody.
    let login = async |email: &str, password: &str| {
        app.post("", "/v1/auth/login", json!({ "email": email, "password": password })).await
    };
    let token = login("alice@example.com", "s3cureP@ssword").await.is(201)["api_key"]["token"].clone();
    app.get(token.as_str().unwrap(), "/v1/vms").await.is(200);
    let (wrong, nobody) =
        (login("alice@example.com", "wrong").await, login("bob@example.com", "wrong").await);
    assert_eq!((wrong.status, wrong.body), (nobody.status, nobody.body));
}

#[tokio::test]
async fn env() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let path = "/v1/env/NODE_ENV";
    assert_eq!(app.get(&key, path).await.error(404), "env_not_found");
    let set = app.call(&key, "PUT", path, Some(json!({ "value": "production" }))).await.is(200);
    assert_eq!(keys(&set), ["created_at", "id", "key", "updated_at", "value"]);
    is_id(&set["id"], "env_");
    assert_eq!((&set["key"], &set["value"]), (&json!("NODE_ENV"), &json!("production")));
    is_time(&set["created_at"]);
    assert_eq!(app.get(&key, path).await.is(200), set);
    let other = app.call(&key, "PUT", path, Some(json!({ "value": "" }))).await.is(200);
    assert_eq!((&other["id"], &other["value"]), (&set["id"], &json!("")));
    is_list(app.get(&key, "/v1/env").await, 1);
    for (key_name, body) in [
        ("NODE_ENV", json!({})),
        ("NODE_ENV", json!({ "value": null })),
        ("NODE_ENV", json!({ "value": "a\u{0}" })),
        ("1A", json!({ "value": "x" })),
        ("A-B", json!({ "value": "x" })),
        ("A%20B", json!({ "value": "x" })),
        ("%FF", json!({ "value": "x" })),
    ] {
        let refused = app.call(&key, "PUT", &format!("/v1/env/{key_name}"), Some(body)).await;
        assert_eq!(refused.error(422), "validation_error", "{key_name}");
    }
    assert_eq!(app.call(&key, "DELETE", path, None).await.is(204), Value::Null);
    assert_eq!(app.call(&key, "DELETE", path, None).await.error(404), "env_not_found");
}

#[tokio::test]
async fn agents() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let body = json!({
        "name": "fix-auth-bug", "repo": "https://github.com/org/repo", "branch": "main",
        "prompt": "Fix the authentication bug in src/auth.ts",
    });
    let agent = app.post(&key, "/v1/agents", body.clone()).await.is(201);
    let fields = [
        "agent_args",
        "branch",
        "created_at",
        "harness",
        "id",
        "name",
        "prompt",
        "repo",
        "status",
        "updated_at",
        "vm_id",
    ];
    assert_eq!(keys(&agent), fields);
    is_id(&agent["id"], "agt_");
    assert_eq!(
        (&agent["harness"], &agent["status"], &agent["agent_args"]),
        (&json!("claude"), &json!("provisioning"), &Value::Null)
    );
    let vm = format!("/v1/vms/{}", agent["vm_id"].as_str().unwrap());
    assert_eq!(app.get(&key, &vm).await.is(200)["status"], "pending");
    assert_eq!(app.post(&key, "/v1/agents", body.clone()).await.error(409), "agent_name_taken");
    for (field, wrong) in [
        ("repo", json!("--upload-pack=x")),
        ("repo", json!("a b")),
        ("branch", json!("-x")),
        ("prompt", json!("")),
        ("harness", json!("a\nb")),
    ] {
        let mut body = body.clone();
        body["name"] = "other".into();
        body[field] = wrong;
        assert_eq!(app.post(&key, "/v1/agents", body).await.error(422), "validation_error", "{field}");
    }
    is_list(app.get(&key, "/v1/agents?status=running").await, 0);
    is_list(app.get(&key, "/v1/agents?status=provisioning&name=fix-auth-bug").await, 1);
    let path = format!("/v1/agents/{}", agent["id"].as_str().unwrap());
    assert_eq!(app.get(&key, &path).await.is(200), agent);
    assert_eq!(app.call(&key, "DELETE", &path, None).await.is(204), Value::Null);
    assert_eq!(app.get(&key, &path).await.error(404), "agent_not_found");
    assert_eq!(app.call(&key, "DELETE", &path, None).await.error(404), "agent_not_found");
    assert_eq!(app.get(&key, &vm).await.is(200)["status"], "destroyed");
    is_list(app.get(&key, "/v1/agents").await, 0);
}

/// Beyond the reference, whose keys come by signing up and by device codes alone.
#[tokio::test]
async fn api_keys() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let made = app.post(&key, "/v1/keys", json!({ "name": "ci" })).await.is(201);
    assert_eq!(keys(&made), ["created_at", "id", "name", "token"]);
    is_id(&made["id"], "key_");
    is_time(&made["created_at"]);
    let token = made["token"].as_str().unwrap();
    assert!(token.starts_with("iron_live_") && token.len() > 50, "{token}");
    for wrong in
        [json!({}), json!({ "name": "" }), json!({ "name": "a".repeat(65) }), json!({ "name": "a\n" })]
    {
        assert_eq!(app.post(&key, "/v1/keys", wrong).await.error(422), "validation_error");
    }
    // Oldest first, and never with a token.
    let listed = is_list(app.get(&key, "/v1/keys").await, 2);
    assert!(listed.iter().all(|one| keys(one) == ["created_at", "id", "last_used_at", "name"]), "{listed:?}");
    assert_eq!((&listed[0]["name"], &listed[1]["name"]), (&json!("CLI"), &json!("ci")));
    is_time(&listed[0]["last_used_at"]);
    assert_eq!(listed[1]["last_used_at"], Value::Null);
    app.get(token, "/v1/vms").await.is(200);
    is_time(&is_list(app.get(&key, "/v1/keys").await, 2)[1]["last_used_at"]);
    // A key may revoke another, and itself.
    let path = format!("/v1/keys/{}", made["id"].as_str().unwrap());
    assert_eq!(app.call(&key, "DELETE", &path, None).await.is(204), Value::Null);
    assert_eq!(app.get(token, "/v1/vms").await.error(401), "unauthorized");
    assert_eq!(app.call(&key, "DELETE", &path, None).await.error(404), "api_key_not_found");
    let own = format!("/v1/keys/{}", listed[0]["id"].as_str().unwrap());
    app.call(&key, "DELETE", &own, None).await.is(204);
    assert_eq!(app.get(&key, "/v1/keys").await.error(401), "unauthorized");
}

#[tokio::test]
async fn device_login() {
    let app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let asked = app.call("", "POST", "/v1/auth/device/code", None).await.is(200);
    assert_eq!(keys(&asked), ["data"]);
    assert_eq!(keys(&asked["data"]), ["code", "expires_at", "verification_uri"]);
    is_time(&asked["data"]["expires_at"]);
    let code = asked["data"]["code"].as_str().unwrap();
    assert!(code.len() == 9 && code.as_bytes()[4] == b'-', "{code}");
    let poll = async || app.get("", &format!("/v1/auth/device/poll?code={code}")).await.is(200);
    assert_eq!(poll().await, json!({ "data": { "status": "pending" } }));
    let user = app.store.authenticate(&key).await.unwrap().unwrap().user;
    app.store.device_confirm(code, &user, 10).await.unwrap();
    let done = poll().await;
    assert_eq!(keys(&done["data"]), ["status", "token"]);
    assert_eq!(done["data"]["status"], "authorized");
    app.get(done["data"]["token"].as_str().unwrap(), "/v1/vms").await.is(200);
    assert_eq!(poll().await, json!({ "data": { "status": "expired" } }));
    assert_eq!(app.get("", "/v1/auth/device/poll").await.error(400), "invalid_parameter");
}
