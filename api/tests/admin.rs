//! The operator's commands on a real data directory, and who may sign up.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{TestApp, no_limits};
use serde_json::json;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use tapgate::Settings;
use tapgate::http::SignUp;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};
use tapgate_store::{SealKey, Store, now_us};

fn run(folder: &Path, args: &[&str], input: &str) -> Output {
    let mut child = Command::new(env!("CARGO_BIN_EXE_tapgate"))
        .arg("admin")
        .args(args)
        .env("TAPGATE_DATA_DIR", folder)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

fn ok(folder: &Path, args: &[&str], input: &str) -> String {
    let output = run(folder, args, input);
    assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap().trim().to_owned()
}

#[tokio::test]
async fn the_operators_commands() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let nothing = run(folder, &["user", "list"], "");
    assert!(!nothing.status.success() && String::from_utf8_lossy(&nothing.stderr).contains("--data-dir"));

    let key_file = folder.join("seal.key");
    let open = || Store::open(folder, SealKey::load_or_create(&key_file).unwrap()).unwrap();
    let store = open();
    let token = ok(folder, &["user", "create", "alice@example.com"], "s3cureP@ssword\n");
    assert!(store.authenticate(&token).await.unwrap().is_some());
    assert!(!run(folder, &["user", "create", "nonsense"], "s3cureP@ssword\n").status.success());
    assert!(!run(folder, &["user", "create", "b@example.com"], "short\n").status.success());
    assert!(ok(folder, &["user", "list"], "").contains("alice@example.com  enabled"));
    ok(folder, &["user", "disable", "Alice@example.com"], "");
    assert!(store.authenticate(&token).await.unwrap().is_none(), "at once");
    ok(folder, &["user", "enable", "alice@example.com"], "");
    assert!(!run(folder, &["user", "disable", "nobody@example.com"], "").status.success());

    let backup = folder.join("backup");
    ok(folder, &["backup", backup.to_str().unwrap()], "");
    assert!(ok(folder, &["verify-audit"], "").contains("whole"));

    // While a daemon holds the lock, nothing moves under it.
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    let held = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock).unwrap();
    for args in [&["rotate-key"][..], &["restore", backup.to_str().unwrap()]] {
        let refused = run(folder, args, "");
        assert!(String::from_utf8_lossy(&refused.stderr).contains("stop it first"), "{args:?}");
    }
    drop((held, store));
    // On another host the key has to be there first.
    let other = tempfile::tempdir().unwrap();
    let keyless = run(other.path(), &["restore", backup.to_str().unwrap()], "");
    let said = String::from_utf8_lossy(&keyless.stderr).into_owned();
    assert!(!keyless.status.success() && said.contains("put the seal.key"), "{said}");
    std::fs::copy(&key_file, other.path().join("seal.key")).unwrap();
    ok(other.path(), &["restore", backup.to_str().unwrap()], "");
    assert!(ok(other.path(), &["user", "list"], "").contains("alice@example.com"));
    ok(folder, &["rotate-key"], "");
    assert!(open().authenticate(&token).await.unwrap().is_some());
    let old = run(folder, &["restore", backup.to_str().unwrap()], "");
    assert!(String::from_utf8_lossy(&old.stderr).contains("does not fit"), "sealed by the key before");
}

/// A new binary was installed, and the daemon of the old one still runs: its records keep their form under it.
#[tokio::test]
async fn records_of_an_older_version_are_not_changed_under_its_daemon() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    drop(Store::open(folder, SealKey::load_or_create(&folder.join("seal.key")).unwrap()).unwrap());
    let audit = || rusqlite::Connection::open(folder.join("audit.db")).unwrap();
    let version = || audit().pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0)).unwrap();
    let newest = version();
    // As the version before left it.
    audit()
        .execute_batch("DROP TABLE cuts; DROP TABLE holdings; ALTER TABLE blocks DROP COLUMN places")
        .unwrap();
    audit().pragma_update(None, "user_version", newest - 1).unwrap();
    let backup = folder.join("backup");
    let lock = std::fs::File::create(folder.join("lock")).unwrap();
    let held = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusiveNonblock).unwrap();
    for args in [&["user", "list"][..], &["backup", backup.to_str().unwrap()], &["verify-audit"]] {
        let refused = run(folder, args, "");
        let said = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && said.contains("older version"), "{args:?}: {said}");
        assert_eq!(version(), newest - 1, "{args:?}");
    }
    drop(held);
    ok(folder, &["user", "list"], "");
    assert_eq!(version(), newest, "with no daemon in the way they are brought up to date");
}

#[tokio::test]
async fn sign_up_may_be_closed_or_by_invitation() {
    let sign_up = async |app: &TestApp, invitation: Option<&str>| {
        let body = json!({
            "first_name": "A", "last_name": "B", "email": "Alice@example.com", "password": "s3cureP@ssword",
            "invitation": invitation,
        });
        app.post("", "/v1/users", body).await
    };
    let with = |sign_up| TestApp::with(Settings { sign_up, rates: no_limits(), ..Settings::default() });
    let closed = with(SignUp::Closed);
    assert_eq!(sign_up(&closed, None).await.error(403), "signup_closed");
    let app = with(SignUp::Invitation);
    let later = now_us() + 60_000_000;
    let (good, other) = (
        app.store.ticket("invite", "alice@example.com", later),
        app.store.ticket("invite", "b@example.com", later),
    );
    for wrong in [None, Some(""), Some("x"), Some(other.as_str())] {
        assert_eq!(sign_up(&app, wrong).await.error(403), "signup_closed");
    }
    sign_up(&app, Some(&good)).await.is(201);
    assert_eq!(sign_up(&app, Some(&good)).await.error(409), "email_taken", "an invitation makes one account");
}

#[tokio::test]
async fn a_changed_audit_log_is_found_from_the_command_line() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    let store = Store::open(folder, SealKey::load_or_create(&folder.join("seal.key")).unwrap()).unwrap();
    let policy = VmPolicy {
        vm: VmId::generate(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    for at in 0..10 {
        let verdict = Verdict::Deny { reason: Reason::NoRule };
        store.audit().record(AuditEvent::new(&policy, Protocol::Tcp, verdict, at));
    }
    store.audit().flush().await;
    drop(store);
    let verify = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tapgate"));
        command.args(["audit", "verify", "--data-dir"]).arg(folder).output().unwrap()
    };
    let whole = verify();
    assert!(whole.status.success(), "{whole:?}");
    assert!(String::from_utf8_lossy(&whole.stdout).contains("whole: 10 events"), "{whole:?}");
    let database = rusqlite::Connection::open(folder.join("audit.db")).unwrap();
    database.execute("UPDATE events SET port = 443 WHERE seq = 4", []).unwrap();
    let changed = verify();
    assert!(!changed.status.success(), "{changed:?}");
    assert!(
        String::from_utf8_lossy(&changed.stderr).contains("was changed outside of tapgate"),
        "{changed:?}"
    );
}
