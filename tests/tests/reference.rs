//! The contract as its reference page shows it: every curl example, in the page's order, against a running daemon. What is
//! shown there must be answered here: the status, every field, its kind, the prefix of ids.
//!
//! Examples that need what only a later one makes, or that meet another's leavings, are run again where the page allows it.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{fs, thread, time::Duration};
use tapgate_e2e::{
    World,
    api::Client,
    daemon::{Daemon, Driver, Settings},
    sh,
};

/// Runs examples in a shell, as somebody who pastes them would.
struct Page<'world> {
    world: &'world World,
    client: Client<'world>,
    /// What the page calls it, and what it is here.
    here: Vec<(&'static str, String)>,
}

impl Page<'_> {
    fn is(&mut self, example: &'static str, real: &Value) {
        self.here.push((example, real.as_str().unwrap().to_owned()));
    }

    /// The status and the body of one example.
    fn run(&self, example: &str) -> (u16, Value) {
        let address = self.client.url("");
        let text =
            self.here.iter().fold(example.replace("https://api.iron.sh", &address), |text, (from, to)| {
                text.replace(from, to)
            });
        let script = format!(
            "curl() {{ command curl -sS --noproxy '*' --max-time 60 -w '\\n%{{http_code}}' \"$@\"; }}\n{text}"
        );
        let mut shell = self.world.on_host("bash");
        shell.args(["-c", &script]).env("IRONS_API_KEY", self.client.key().unwrap());
        let answer = sh::expect(&mut shell, b"").unwrap();
        let (body, status) = answer.rsplit_once('\n').unwrap();
        let body = if body.is_empty() { Value::Null } else { serde_json::from_str(body).unwrap() };
        (status.parse().unwrap(), body)
    }

    /// One that is answered as the page shows.
    #[track_caller]
    fn shows(&self, example: &str, status: u16, shown: Value) -> Value {
        let (found, body) = self.run(example);
        assert_eq!(found, status, "{example}\n{body}");
        alike(&shown, &body, example);
        body
    }

    /// One that is refused with this code.
    #[track_caller]
    fn refuses(&self, example: &str, status: u16, code: &str) {
        let body = self.shows(example, status, json!({ "error": { "code": "c", "message": "m" } }));
        assert_eq!(body["error"]["code"], code, "{example}");
    }
}

/// Every field that is shown is there and of that kind. What is shown as null may be anything; a list that is shown with
/// something holds something.
#[track_caller]
fn alike(shown: &Value, found: &Value, at: &str) {
    match (shown, found) {
        (Value::Null, _) | (Value::Bool(_), Value::Bool(_)) | (Value::Number(_), Value::Number(_)) => {}
        (Value::Object(shown), Value::Object(found)) => {
            for (name, value) in shown {
                let found = found.get(name).unwrap_or_else(|| panic!("{at}: no {name} in {found:?}"));
                alike(value, found, &format!("{at}: {name}"));
            }
        }
        (Value::Array(shown), Value::Array(found)) => {
            if let Some(shown) = shown.first() {
                assert!(!found.is_empty(), "{at}: nothing in the list");
                found.iter().for_each(|found| alike(shown, found, at));
            }
        }
        (Value::String(shown), Value::String(found)) => {
            let prefix = shown.split_once('_').map(|(prefix, _)| prefix);
            if shown.ends_with('Z') {
                assert!(found.len() >= 20 && found.ends_with('Z') && found.contains('T'), "{at}: {found}");
            } else if prefix.is_some_and(|prefix| prefix.len() <= 4) {
                assert_eq!(found.split_once('_').map(|(prefix, _)| prefix), prefix, "{at}: {found}");
            }
        }
        _ => panic!("{at}: {found} where {shown} is shown"),
    }
}

/// A key pair in the world's folder: the file, and the public half.
fn key(world: &World) -> (String, String) {
    let file = world.folder().join("key").to_str().unwrap().to_owned();
    sh::run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", "example", "-f", &file]).unwrap();
    let public = fs::read_to_string(format!("{file}.pub")).unwrap().trim().to_owned();
    (file, public)
}

fn list(of: Value) -> Value {
    json!({ "data": [of], "has_more": false, "cursor": null })
}

#[test]
fn every_example_of_the_reference_is_answered_as_it_shows() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let client = daemon.client().sign_up("ada").unwrap();
    let mut page = Page { world: &world, client, here: Vec::new() };
    let (private, public) = key(&world);
    page.here.push(("ssh-ed25519 AAAA...", public));
    vms(&mut page);
    egress(&mut page, &private);
    secrets(&mut page);
    snapshots(&mut page);
    signup(&page);
    env(&page);
    agents(&mut page);
    device(&mut page);
    assert!(!daemon.log().contains("panicked"));
}

fn vms(page: &mut Page<'_>) {
    let auth = r#"-H "Authorization: Bearer $IRONS_API_KEY""#;
    let vm = json!({
        "id": "vm_k3mf9xvw2p", "name": "my-dev-env", "status": "pending", "status_detail": "creating",
        "created_at": "2026-02-28T12:00:00Z", "updated_at": "2026-02-28T12:00:00Z",
    });
    let create = format!(
        r#"curl -X POST https://api.iron.sh/v1/vms \
  {auth} \
  -H "Content-Type: application/json" \
  -d '{{ "name": "my-dev-env", "public_key": "ssh-ed25519 AAAA..." }}'"#
    );
    let made = page.shows(&create, 201, vm.clone());
    assert_eq!((&made["name"], &made["status"]), (&json!("my-dev-env"), &json!("pending")));
    page.is("vm_k3mf9xvw2p", &made["id"]);
    page.is("vm_xyz789", &made["id"]);
    let id = made["id"].as_str().unwrap();
    page.client.wait_ready(id).unwrap();
    page.refuses(&create, 409, "vm_name_taken");
    // A shell needs quotes around what has an ampersand; the page leaves them out.
    let listed = page.shows(
        &format!(r#"curl "https://api.iron.sh/v1/vms?status=running&limit=10" {auth}"#),
        200,
        list(vm.clone()),
    );
    assert_eq!(
        (listed["data"][0]["id"].as_str(), &listed["data"][0]["status_detail"]),
        (Some(id), &json!("ready"))
    );
    let get = format!("curl https://api.iron.sh/v1/vms/vm_k3mf9xvw2p {auth}");
    assert_eq!(page.shows(&get, 200, vm.clone())["status"], "running");
    let destroy = format!("curl -X DELETE https://api.iron.sh/v1/vms/vm_k3mf9xvw2p {auth}");
    page.refuses(&destroy, 409, "vm_not_stopped");
    let start = format!("curl -X POST https://api.iron.sh/v1/vms/vm_k3mf9xvw2p/start {auth}");
    page.refuses(&start, 409, "vm_already_running");
    let stop = format!("curl -X POST https://api.iron.sh/v1/vms/vm_k3mf9xvw2p/stop {auth}");
    assert_eq!(page.shows(&stop, 200, vm.clone())["status"], "stopped");
    page.client.wait_for(id, "stopped").unwrap();
    assert_eq!(page.shows(&start, 200, vm.clone())["status"], "running");
    page.client.wait_ready(id).unwrap();
    let ssh = page.shows(
        &format!("curl https://api.iron.sh/v1/vms/vm_k3mf9xvw2p/ssh {auth}"),
        200,
        json!({ "host": "203.0.113.10", "port": 2222, "username": "root", "command": "ssh -p 2222 root@203.0.113.10" }),
    );
    assert_eq!(ssh["command"], format!("ssh -p {} root@{}", ssh["port"], ssh["host"].as_str().unwrap()));
    // Destroying one that is stopped.
    let other = page.client.create_vm("other", &page.here[0].1).unwrap();
    page.client.wait_ready(&other).unwrap();
    assert_eq!(page.run(&stop.replace("vm_k3mf9xvw2p", &other)).0, 200);
    page.client.wait_for(&other, "stopped").unwrap();
    assert_eq!(page.run(&destroy.replace("vm_k3mf9xvw2p", &other)), (204, Value::Null));
}

fn egress(page: &mut Page<'_>, private: &str) {
    let auth = r#"-H "Authorization: Bearer $IRONS_API_KEY""#;
    let policy = json!({ "mode": "enforce" });
    let got = page.shows(&format!("curl https://api.iron.sh/v1/egress/policy {auth}"), 200, policy.clone());
    assert_eq!(got, policy);
    let put = format!(
        r#"curl -X PUT https://api.iron.sh/v1/egress/policy {auth} -H "Content-Type: application/json" -d '{{"mode": "enforce"}}'"#
    );
    assert_eq!(page.shows(&put, 200, policy.clone()), policy);
    let rules = format!("curl https://api.iron.sh/v1/egress/rules {auth}");
    page.shows(&rules, 200, json!({ "data": [], "has_more": false, "cursor": null }));
    let rule = json!({
        "id": "egr_9xm2kfp4", "name": "github-api", "host": "api.github.com", "cidr": null,
        "comment": "GitHub API access for code pulls", "created_at": "2026-02-28T12:00:00Z",
    });
    let made = page.shows(
        &format!(
            r#"curl -X POST https://api.iron.sh/v1/egress/rules \
  {auth} -H "Content-Type: application/json" \
  -d '{{ "name": "github-api", "host": "api.github.com", "comment": "GitHub API access for code pulls" }}'"#
        ),
        201,
        rule.clone(),
    );
    assert_eq!((&made["cidr"], &made["comment"]), (&Value::Null, &rule["comment"]));
    page.is("egr_9xm2kfp4", &made["id"]);
    assert_eq!(page.shows(&rules, 200, list(rule))["data"], json!([made]));
    let delete = format!("curl -X DELETE https://api.iron.sh/v1/egress/rules/egr_9xm2kfp4 {auth}");
    assert_eq!(page.run(&delete), (204, Value::Null));
    page.refuses(&delete, 404, "rule_not_found");

    // Something for the audit log: the guest tries what no rule allows.
    let (_, ssh) = page.run(&format!("curl https://api.iron.sh/v1/vms/vm_k3mf9xvw2p/ssh {auth}"));
    let mut guest = page.world.from_afar("ssh");
    guest.args(["-F", "/dev/null", "-i", private, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=no"]);
    guest.args(["-o", "UserKnownHostsFile=/dev/null", "-p", &ssh["port"].to_string()]);
    guest.arg(format!("root@{}", ssh["host"].as_str().unwrap()));
    guest.arg("curl -sS --max-time 5 https://denied.example/; true");
    sh::expect(&mut guest, b"").unwrap();
    let audit = format!(
        r#"curl "https://api.iron.sh/v1/audit/egress?vm_id=vm_k3mf9xvw2p&verdict=denied&limit=20" {auth}"#
    );
    for _ in 0..100 {
        if page.run(&audit).1["data"].as_array().is_some_and(|events| !events.is_empty()) {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    let event = json!({
        "id": "ee_w8n3vqx1", "timestamp": "2026-02-28T12:05:30Z", "vm_id": "vm_k3mf9xvw2p", "host": null,
        "cidr": null, "protocol": "tls", "verdict": "allowed", "allowed": true, "mode": "enforce",
    });
    let events = page.shows(&audit, 200, json!({ "data": [event], "has_more": true, "cursor": null }));
    for event in events["data"].as_array().unwrap() {
        assert_eq!((&event["verdict"], &event["allowed"]), (&json!("denied"), &json!(false)), "{event}");
    }
}

fn secrets(page: &mut Page<'_>) {
    let auth = r#"-H "Authorization: Bearer $IRONS_API_KEY""#;
    let shown = json!({
        "id": "sec_m4xk9wp2", "name": "github-main", "env_var": "GITHUB_TOKEN", "hosts": ["*"],
        "proxy_value": "IRONSH_PROXY_github-main", "comment": null,
        "created_at": "2026-03-04T12:00:00Z", "updated_at": "2026-03-04T12:00:00Z",
    });
    let create = format!(
        r#"curl -X POST https://api.iron.sh/v1/secrets \
  {auth} -H "Content-Type: application/json" \
  -d '{{ "name": "github-main", "secret": "ghp_abc123def456...", "env_var": "GITHUB_TOKEN" }}'"#
    );
    let scoped = create
        .replace(r#""GITHUB_TOKEN" }"#, r#""GITHUB_TOKEN", "hosts": ["api.github.com", "*.github.com"] }"#);
    let made = page.shows(&create, 201, shown.clone());
    for field in ["name", "env_var", "hosts", "proxy_value", "comment"] {
        assert_eq!(made[field], shown[field]);
    }
    page.refuses(&scoped, 409, "secret_name_taken");
    page.refuses(&create.replace("github-main", "another"), 409, "env_var_taken");
    page.refuses(&scoped.replace("*.github.com", "*.*.com"), 422, "validation_error");
    page.is("sec_m4xk9wp2", &made["id"]);
    let listed = page.shows(&format!("curl https://api.iron.sh/v1/secrets {auth}"), 200, list(shown.clone()));
    assert_eq!(listed["data"], json!([made]));
    let get = format!("curl https://api.iron.sh/v1/secrets/sec_m4xk9wp2 {auth}");
    assert_eq!(page.shows(&get, 200, shown.clone()), made);
    let patch = format!(
        r#"curl -X PATCH https://api.iron.sh/v1/secrets/sec_m4xk9wp2 \
  {auth} -H "Content-Type: application/json" -d '{{"secret": "ghp_newtoken789..."}}'"#
    );
    assert!(!page.shows(&patch, 200, shown.clone()).to_string().contains("ghp_"));
    let delete = format!("curl -X DELETE https://api.iron.sh/v1/secrets/sec_m4xk9wp2 {auth}");
    assert_eq!(page.run(&delete), (204, Value::Null));
    page.refuses(&get, 404, "secret_not_found");
    let hosts = &page.shows(&scoped, 201, shown)["hosts"];
    assert_eq!(*hosts, json!(["api.github.com", "*.github.com"]));
}

fn snapshots(page: &mut Page<'_>) {
    let auth = r#"-H "Authorization: Bearer $IRONS_API_KEY""#;
    let shown = json!({
        "id": "snap_abc123", "source_virtual_machine_id": "vm_xyz789", "source_base_image": null,
        "source_snapshot_id": null, "label": "before-refactor", "status": "pending", "r2_key": null,
        "size_bytes": null, "created_at": "2026-03-10T12:00:00Z",
    });
    let create = format!(
        r#"curl -X POST https://api.iron.sh/v1/vms/vm_xyz789/snapshots \
  {auth} -H "Content-Type: application/json" -d '{{"label": "before-refactor"}}'"#
    );
    let made = page.shows(&create, 201, json!({ "data": shown }));
    assert_eq!((&made["data"]["status"], &made["data"]["label"]), (&json!("pending"), &shown["label"]));
    page.refuses(&create.replace("vm_xyz789", "vm_none"), 404, "vm_not_found");
    page.is("snap_abc123", &made["data"]["id"]);
    page.shows(&format!("curl https://api.iron.sh/v1/snapshots?limit=10 {auth}"), 200, list(shown.clone()));
    page.shows(
        &format!("curl https://api.iron.sh/v1/vms/vm_xyz789/snapshots {auth}"),
        200,
        list(shown.clone()),
    );
    let get = format!("curl https://api.iron.sh/v1/snapshots/snap_abc123 {auth}");
    page.shows(&get, 200, json!({ "data": shown }));
    let delete = format!("curl -X DELETE https://api.iron.sh/v1/snapshots/snap_abc123 {auth}");
    assert_eq!(page.run(&delete), (204, Value::Null));
    page.refuses(&get, 404, "snapshot_not_found");
    page.refuses(&delete, 404, "snapshot_not_found");
}

fn signup(page: &Page<'_>) {
    let create = r#"curl -X POST https://api.iron.sh/v1/users \
  -H "Content-Type: application/json" \
  -d '{ "first_name": "Alice", "last_name": "Smith", "email": "alice@example.com", "password": "s3cureP@ssword" }'"#;
    let shown = json!({
        "api_key": { "id": "key_p4t7xm2k", "name": "CLI", "token": "iron_live_a1b2c3d4e5f6...", "created_at": "2026-03-15T12:00:00Z" },
        "user": {
            "id": "usr_w3n8vqx1", "first_name": "Alice", "last_name": "Smith", "email": "alice@example.com",
            "email_verified": false, "created_at": "2026-03-15T12:00:00Z",
        },
    });
    let made = page.shows(create, 201, shown.clone());
    assert_eq!(made["api_key"]["name"], "CLI");
    let token = made["api_key"]["token"].as_str().unwrap();
    assert!(token.starts_with("iron_live_"));
    assert_eq!(made["user"]["email_verified"], false);
    // It can be used at once, and sees nothing of another's.
    let get = format!(r#"curl https://api.iron.sh/v1/vms -H "Authorization: Bearer {token}""#);
    assert_eq!(page.run(&get), (200, json!({ "data": [], "has_more": false, "cursor": null })));
    page.refuses(create, 409, "email_taken");
    page.refuses(&create.replace("alice@example.com", "alice"), 422, "validation_error");
}

fn env(page: &Page<'_>) {
    let auth = r#"-H "Authorization: Bearer $IRONS_API_KEY""#;
    let shown = json!({
        "id": "env_m4xk9wp2", "key": "NODE_ENV", "value": "production",
        "created_at": "2026-03-15T12:00:00Z", "updated_at": "2026-03-15T12:00:00Z",
    });
    let all = format!("curl https://api.iron.sh/v1/env {auth}");
    page.shows(&all, 200, json!({ "data": [], "has_more": false, "cursor": null }));
    let get = format!("curl https://api.iron.sh/v1/env/NODE_ENV {auth}");
    page.refuses(&get, 404, "env_not_found");
    let put = format!(
        r#"curl -X PUT https://api.iron.sh/v1/env/NODE_ENV \
  {auth} -H "Content-Type: application/json" -d '{{"value": "production"}}'"#
    );
    let made = page.shows(&put, 200, shown.clone());
    assert_eq!((&made["key"], &made["value"]), (&shown["key"], &shown["value"]));
    assert_eq!(page.shows(&put.replace("production", "test"), 200, shown.clone())["id"], made["id"]);
    assert_eq!(page.shows(&get, 200, shown.clone())["value"], "test");
    page.shows(&all, 200, list(shown));
    let delete = format!("curl -X DELETE https://api.iron.sh/v1/env/NODE_ENV {auth}");
    assert_eq!(page.run(&delete), (204, Value::Null));
    page.refuses(&delete, 404, "env_not_found");
}

fn agents(page: &mut Page<'_>) {
    let auth = r#"-H "Authorization: Bearer $IRONS_API_KEY""#;
    let shown = json!({
        "id": "agt_x9k2mf4p", "name": "fix-auth-bug", "repo": "https://github.com/org/repo", "branch": "main",
        "harness": "claude", "prompt": "Fix the authentication bug in src/auth.ts", "agent_args": null,
        "status": "provisioning", "vm_id": "vm_k3mf9xvw2p",
        "created_at": "2026-03-15T12:00:00Z", "updated_at": "2026-03-15T12:00:00Z",
    });
    let create = format!(
        r#"curl -X POST https://api.iron.sh/v1/agents \
  {auth} -H "Content-Type: application/json" \
  -d '{{ "name": "fix-auth-bug", "repo": "https://github.com/org/repo", "branch": "main", "prompt": "Fix the authentication bug in src/auth.ts" }}'"#
    );
    let made = page.shows(&create, 201, shown.clone());
    for field in ["name", "repo", "branch", "harness", "prompt", "agent_args", "status"] {
        assert_eq!(made[field], shown[field]);
    }
    page.refuses(&create, 409, "agent_name_taken");
    page.is("agt_x9k2mf4p", &made["id"]);
    let running = format!("curl https://api.iron.sh/v1/agents?status=running {auth}");
    page.shows(&running, 200, json!({ "data": [], "has_more": false, "cursor": null }));
    page.shows(&running.replace("status=running", "name=fix-auth-bug"), 200, list(shown.clone()));
    let get = format!("curl https://api.iron.sh/v1/agents/agt_x9k2mf4p {auth}");
    page.shows(&get, 200, shown);
    let delete = format!("curl -X DELETE https://api.iron.sh/v1/agents/agt_x9k2mf4p {auth}");
    assert_eq!(page.run(&delete), (204, Value::Null));
    page.refuses(&get, 404, "agent_not_found");
    page.refuses(&delete, 404, "agent_not_found");
}

fn device(page: &mut Page<'_>) {
    let shown = json!({ "data": {
        "code": "ABCD-1234", "verification_uri": "https://app.iron.sh/activate", "expires_at": "2026-02-28T12:15:00Z",
    } });
    let asked = page.shows("curl -X POST https://api.iron.sh/v1/auth/device/code", 200, shown);
    assert!(asked["data"]["verification_uri"].as_str().unwrap().ends_with("/activate"));
    page.is("ABCD-1234", &asked["data"]["code"]);
    let poll = r#"curl "https://api.iron.sh/v1/auth/device/poll?code=ABCD-1234""#;
    assert_eq!(
        page.shows(poll, 200, json!({ "data": { "status": "pending" } }))["data"]["status"],
        "pending"
    );
}
