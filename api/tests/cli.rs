//! The real client binary against the real router on a socket: what people see, what scripts get, how it exits.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{PUBLIC_KEY, TestApp};
use serde_json::Value;
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Command, Output, Stdio};
use tapgate_model::StatusDetail as S;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, Verdict, VmId, VmPolicy};
use tapgate_store::SnapshotStatus;

struct World {
    app: TestApp,
    url: String,
    home: tempfile::TempDir,
}

impl World {
    async fn new() -> Self {
        let app = TestApp::new();
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let service = app.router.clone().into_make_service_with_connect_info::<std::net::SocketAddr>();
        tokio::spawn(async move { axum::serve(listener, service).await.unwrap() });
        let home = tempfile::tempdir().unwrap();
        std::fs::create_dir(home.path().join(".ssh")).unwrap();
        std::fs::write(home.path().join(".ssh/id_ed25519.pub"), format!("{PUBLIC_KEY}\n")).unwrap();
        Self { app, url, home }
    }

    async fn run_with(&self, args: &[&str], input: &str, env: &[(&str, &str)]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tapgate"));
        command.args(args).env_clear().env("HOME", self.home.path()).env("TAPGATE_API_URL", &self.url);
        command.env("PATH", std::env::var_os("PATH").unwrap()).envs(env.iter().copied());
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let input = input.to_owned();
        tokio::task::spawn_blocking(move || {
            let mut child = command.spawn().unwrap();
            std::io::Write::write_all(&mut child.stdin.take().unwrap(), input.as_bytes()).unwrap();
            child.wait_with_output().unwrap()
        })
        .await
        .unwrap()
    }

    async fn run(&self, args: &[&str]) -> Output {
        self.run_with(args, "", &[]).await
    }

    /// What a command prints; it must exit with 0.
    async fn ok(&self, args: &[&str]) -> String {
        let output = self.run(args).await;
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{args:?}: {out}{err}");
        out
    }

    async fn json(&self, args: &[&str]) -> Value {
        let text = self.ok(&[args, &["--json"]].concat()).await;
        serde_json::from_str(&text).unwrap_or_else(|_| panic!("{args:?}: {text}"))
    }

    async fn exits(&self, args: &[&str], code: i32, with: &str) {
        let output = self.run(args).await;
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {err}");
        assert!(err.contains(with), "{args:?}: {err}");
    }

    async fn signed_up() -> Self {
        let world = Self::new().await;
        let args = ["signup", "--first-name", "A", "--last-name", "S", "--email", "alice@example.com"];
        let done = world.run_with(&args, "s3cureP@ssword\n", &[]).await;
        assert!(done.status.success(), "{}", text(&done.stderr));
        world
    }
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[tokio::test]
async fn a_login_is_kept_privately_and_forgotten() {
    let world = World::new().await;
    world.exits(&["vm", "list"], 3, "tapgate login").await;
    drop(world);
    let world = World::signed_up().await;
    let kept = world.home.path().join(".config/tapgate/client.toml");
    assert_eq!(std::fs::metadata(&kept).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(world.json(&["vm", "list"]).await, serde_json::json!([]));
    assert_eq!(world.json(&["key", "list"]).await[0]["name"], "CLI");
    world.ok(&["logout"]).await;
    world.exits(&["vm", "list"], 3, "tapgate login").await;
    let login = ["login", "--email", "alice@example.com"];
    let wrong = world.run_with(&login, "wrong\n", &[]).await;
    assert_eq!(wrong.status.code(), Some(3));
    assert!(world.run_with(&login, "s3cureP@ssword\n", &[]).await.status.success());
    world.ok(&["vm", "list"]).await;
    std::fs::set_permissions(&kept, std::fs::Permissions::from_mode(0o644)).unwrap();
    world.exits(&["vm", "list"], 1, "chmod 600").await;
    let other = world.run_with(&["vm", "list"], "", &[("TAPGATE_API_KEY", "iron_live_x")]).await;
    assert_ne!(other.status.code(), Some(0));
}

#[tokio::test]
async fn the_life_of_a_vm() {
    let world = World::signed_up().await;
    let made = world.json(&["vm", "create", "dev"]).await;
    let id = made["id"].as_str().unwrap().to_owned();
    assert_eq!(made["status_detail"], "creating");
    world.exits(&["vm", "create", "dev"], 5, "already exists").await;
    world.exits(&["vm", "show", "nobody"], 4, "nobody").await;
    world.exits(&["vm", "create", "x", "--vcpus", "1000"], 6, "`vcpus`").await;
    world.exits(&["vm", "create"], 2, "Usage").await;
    world.exits(&["vm", "list", "--api-url", "http://127.0.0.1:1"], 7, "tapgate serve").await;
    world.exits(&["vm", "list", "--api-url", "nonsense"], 2, "not the URL").await;
    assert!(world.ok(&["vm", "list"]).await.contains("dev"));

    let (app, vm) = (&world.app, id.clone());
    let (waited, ()) =
        tokio::join!(world.run(&["vm", "create", "second", "--wait", "--timeout", "30"]), async {
            loop {
                let living = app.store.vms_living().await.unwrap();
                if let Some(second) = living.iter().find(|vm| vm.name == "second") {
                    return app.make_ready(second.id.as_str()).await;
                }
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
            }
        });
    assert!(waited.status.success(), "{}", text(&waited.stderr));
    assert!(text(&waited.stdout).contains("ready"));

    app.advance(&vm, S::Failed).await;
    world.exits(&["vm", "start", "dev", "--wait", "--timeout", "0"], 8, "still starting").await;
    app.make_ready(&vm).await;
    world.exits(&["vm", "start", "dev"], 5, "already running").await;
    world.exits(&["vm", "destroy", "dev"], 5, "must be stopped").await;
    world.ok(&["vm", "destroy", "dev", "--stop"]).await;
    assert_eq!(world.json(&["vm", "list"]).await.as_array().unwrap().len(), 1);
    assert_eq!(world.json(&["vm", "list", "--all"]).await.as_array().unwrap().len(), 2);
}

#[tokio::test]
async fn a_snapshot_that_failed_says_why() {
    let world = World::signed_up().await;
    let vm = world.json(&["vm", "create", "dev"]).await["id"].as_str().unwrap().to_owned();
    world.app.make_ready(&vm).await;
    assert!(world.ok(&["snapshot", "create", "dev"]).await.contains("disk"), "its kind");
    let id = world.json(&["snapshot", "list"]).await[0]["id"].as_str().unwrap().to_owned();
    let why = Some("no room".to_owned());
    world.app.store.snapshot_advance(&id.parse().unwrap(), SnapshotStatus::Failed, why).await.unwrap();
    assert!(world.ok(&["snapshot", "show", &id]).await.contains("no room"));
}

#[tokio::test]
async fn ssh_is_the_hosts_own_with_our_options() {
    let world = World::signed_up().await;
    let id = world.json(&["vm", "create", "dev"]).await["id"].as_str().unwrap().to_owned();
    let bin = world.home.path().join("bin");
    std::fs::create_dir(&bin).unwrap();
    let fake = bin.join("ssh");
    std::fs::write(&fake, "#!/bin/sh\nprintf '%s\\n' \"$@\"\nexit 42\n").unwrap();
    std::fs::set_permissions(&fake, std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = format!("{}:/usr/bin:/bin", bin.display());
    let args = ["ssh", "dev", "-i", "key", "ls", "-la", "--", "a b"];
    let output = world.run_with(&args, "", &[("PATH", &path)]).await;
    assert_eq!(output.status.code(), Some(42), "{}", text(&output.stderr));
    let out = text(&output.stdout);
    let shown: Vec<_> = out.lines().collect();
    assert!(shown.starts_with(&["-p", "2222"]), "{shown:?}");
    assert!(shown.contains(&format!("HostKeyAlias={id}").as_str()));
    assert!(shown.ends_with(&["root@203.0.113.10", "ls", "-la", "--", "a b"]), "{shown:?}");
}

#[tokio::test]
async fn egress_secrets_and_env() {
    let world = World::signed_up().await;
    world.ok(&["vm", "create", "dev"]).await;
    assert_eq!(world.json(&["egress", "policy"]).await["mode"], "enforce");
    assert_eq!(world.json(&["egress", "policy", "set", "warn"]).await["mode"], "warn");
    let own = world.json(&["egress", "policy", "set", "enforce", "--no-inherit-rules", "--vm", "dev"]).await;
    assert_eq!((&own["mode"], &own["inherit_rules"]), (&"enforce".into(), &false.into()));
    assert_eq!(world.json(&["egress", "policy", "reset", "--vm", "dev"]).await["mode"], "warn");
    world.ok(&["egress", "rule", "add", "api.github.com", "--name", "gh"]).await;
    assert_eq!(world.json(&["egress", "rule", "add", "10.1.2.3/8"]).await["cidr"], "10.0.0.0/8");
    world.ok(&["egress", "rule", "add", "*.example.org", "--vm", "dev"]).await;
    assert_eq!(world.json(&["egress", "rules", "list"]).await.as_array().unwrap().len(), 2);
    assert_eq!(world.json(&["egress", "rule", "list", "--vm", "dev"]).await.as_array().unwrap().len(), 1);
    world.exits(&["egress", "rule", "add", "https://x"], 6, "`host`").await;
    world
        .exits(&["egress", "rule", "add", "api.github.com:443"], 6, "leave scheme, port and path away")
        .await;
    world.exits(&["egress", "rule", "add", "10.0.0.0/33"], 6, "`cidr`").await;
    // What is of one VM is not passed over in silence for the account.
    world.exits(&["egress", "policy", "set", "warn", "--no-inherit-rules"], 2, "--vm").await;
    world.exits(&["egress", "policy", "reset"], 2, "--vm").await;
    world.exits(&["egress", "policy", "set"], 2, "enforce").await;
    world.ok(&["egress", "rule", "delete", "gh"]).await;
    world.exits(&["egress", "rule", "delete", "gh"], 4, "gh").await;

    let create = ["secret", "create", "gh", "--env-var", "GH", "--host", "api.github.com", "--json"];
    let made = world.run_with(&create, "ghp_value\n", &[]).await;
    assert!(made.status.success(), "{}", text(&made.stderr));
    assert!(!text(&made.stdout).contains("ghp_value"));
    let value = async || {
        let vm = world.app.store.vms_living().await.unwrap().remove(0);
        let policy = world.app.store.effective_policy(&vm.id, Default::default()).await.unwrap();
        text(policy.secrets[0].value.expose())
    };
    assert_eq!(value().await, "ghp_value", "without the line break");
    let from_env = ["secret", "update", "gh", "--from-env", "OTHER"];
    assert!(world.run_with(&from_env, "", &[("OTHER", "second")]).await.status.success());
    assert_eq!(value().await, "second");
    let file = world.home.path().join("value");
    std::fs::write(&file, "third\r\n").unwrap();
    world.ok(&["secret", "update", "gh", "--from-file", file.to_str().unwrap()]).await;
    assert_eq!(value().await, "third");
    world.exits(&["secret", "update", "gh"], 2, "nothing to change").await;
    assert!(world.ok(&["secret", "list"]).await.contains("IRONSH_PROXY_gh"));
    world.ok(&["secret", "delete", "gh"]).await;

    world.ok(&["env", "set", "A=1", "B=x=y"]).await;
    assert_eq!(world.json(&["env", "get", "B"]).await["value"], "x=y");
    world.exits(&["env", "set", "A"], 2, "KEY=VALUE").await;
    world.exits(&["env", "set", "A B=1"], 6, "letters").await;
    world.ok(&["env", "delete", "A", "B"]).await;
    world.exits(&["env", "get", "A"], 4, "").await;
}

#[tokio::test]
async fn the_audit_log_is_a_table_and_follows() {
    let world = World::signed_up().await;
    let id: VmId = world.json(&["vm", "create", "dev"]).await["id"].as_str().unwrap().parse().unwrap();
    let user = world.app.store.vm_any(&id).await.unwrap().user;
    let policy = VmPolicy {
        vm: id,
        user,
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    let record = async |path: &str| {
        let verdict = Verdict::Deny { reason: Reason::NoRule };
        let mut event = AuditEvent::new(&policy, Protocol::Http, verdict, tapgate_store::now_us());
        event.host = Some("api.example.com".parse().unwrap());
        event.port = Some(80);
        event.method = Some("GET".into());
        event.path = Some(path.into());
        world.app.store.audit().record(event);
        world.app.store.audit().flush().await;
    };
    record("/one\u{1b}[31m").await;
    let table = world.ok(&["audit", "--vm", "dev", "--verdict", "denied", "--since", "10m"]).await;
    assert!(table.contains("api.example.com:80") && table.contains("no_rule"), "{table}");
    assert!(!table.contains('\u{1b}'), "a guest's text reaches no terminal as it is");
    assert_eq!(world.json(&["audit", "--host", "api.example.com"]).await.as_array().unwrap().len(), 1);
    world.exits(&["audit", "--since", "yesterday"], 2, "10m").await;
    world.exits(&["audit", "--protocol", "quic"], 6, "`protocol`").await;

    let mut follow = Command::new(env!("CARGO_BIN_EXE_tapgate"));
    follow.args(["audit", "--follow", "--json"]).env("HOME", world.home.path());
    follow.env("TAPGATE_API_URL", &world.url).env_remove("TAPGATE_API_KEY").env_remove("XDG_CONFIG_HOME");
    let mut child = follow.stdout(Stdio::piped()).spawn().unwrap();
    let out = child.stdout.take().unwrap();
    let (lines, mut heard) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::BufRead::lines(std::io::BufReader::new(out)).map_while(Result::ok) {
            let event: Value = serde_json::from_str(&line).unwrap();
            let _ = lines.send(event["path"].as_str().unwrap().to_owned());
        }
    });
    assert_eq!(heard.recv().await.unwrap(), "/one\u{1b}[31m");
    record("/two").await;
    record("/three").await;
    assert_eq!(heard.recv().await.unwrap(), "/two");
    assert_eq!(heard.recv().await.unwrap(), "/three");
    child.kill().unwrap();
    child.wait().unwrap();
}
