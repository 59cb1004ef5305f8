//! schemathesis over the API's own document: all checks, generated and wrong requests, stateful links.
//!
//! `TAPGATE_SCHEMATHESIS` names another program than the `st` that `cargo xtask setup` installs;
//! `TAPGATE_SCHEMATHESIS_EXAMPLES` how many requests an operation gets in each phase: 10 for every day, more for a campaign.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::TestApp;
use tapgate::Settings;
use tapgate::engine::Command;
use tapgate::http::server::serve;
use tapgate_model::StatusDetail as S;
use tokio_util::sync::CancellationToken;

/// An engine whose VMs do at once what is asked of them.
async fn obey(
    store: tapgate_store::Store,
    mut commands: tokio::sync::mpsc::UnboundedReceiver<Command>,
    notifier: tapgate::engine::Notifier,
) {
    while let Some(command) = commands.recv().await {
        let vm = match command {
            Command::Vm(vm) => vm,
            Command::Policy(_) => {
                notifier.policies_in_force(1);
                continue;
            }
            Command::Env(_) | Command::Snapshots => continue,
        };
        let Ok(record) = store.vm_any(&vm).await else { continue };
        let steps: &[S] = match record.detail {
            S::Creating => &[S::Starting, S::Running, S::Ready],
            S::Starting => &[S::Running, S::Ready],
            S::Stopping => &[S::Stopped],
            S::Destroying => &[S::Destroyed],
            _ => &[],
        };
        for step in steps {
            let _ = store.vm_advance(&vm, *step, None).await;
        }
        notifier.changed(vm);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn schemathesis_finds_nothing() {
    let program = common::tool("TAPGATE_SCHEMATHESIS", "st");
    let examples = std::env::var("TAPGATE_SCHEMATHESIS_EXAMPLES").unwrap_or_else(|_| "10".into());
    let mut app = TestApp::with(Settings {
        rates: common::no_limits(),
        start_wait: std::time::Duration::from_secs(5),
        follow_for: std::time::Duration::from_millis(200),
        ..Settings::default()
    });
    let key = app.user("alice@example.com").await;
    let own = app.get(&key, "/v1/keys").await.is(200)["data"][0]["id"].as_str().unwrap().to_owned();
    let commands = std::mem::replace(&mut app.commands, tokio::sync::mpsc::unbounded_channel().1);
    tokio::spawn(obey(app.store.clone(), commands, app.engine.notifier()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/openapi.json", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, app.router.clone(), None, CancellationToken::new()));
    let output = tokio::task::spawn_blocking(move || {
        let folder = tempfile::tempdir().unwrap();
        let data = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data");
        std::process::Command::new(program)
            .args(["--config-file", &format!("{data}/schemathesis.toml"), "run", &url])
            .args(["--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"])
            .args(["--max-examples", &examples, "--seed", "1", "--no-color"])
            .env("SCHEMATHESIS_HOOKS", format!("{data}/schemathesis.py"))
            .env("TAPGATE_TOKEN", key)
            .env("TAPGATE_OWN_KEY", own)
            .current_dir(folder.path())
            .output()
            .unwrap()
    });
    let output = output.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
}
