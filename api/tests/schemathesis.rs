//! schemathesis over the API's own document: all checks, generated and wrong requests, stateful links.
//!
//! Runs where the program is installed (`pip install schemathesis`), else says that it did not. `TAPGATE_SCHEMATHESIS`
//! names another program than `st`; `TAPGATE_SCHEMATHESIS_EXAMPLES` how many requests an operation gets.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::TestApp;
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
        let Command::Vm(vm) = command else { continue };
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
    let program = std::env::var("TAPGATE_SCHEMATHESIS").unwrap_or_else(|_| "st".into());
    if std::process::Command::new(&program).arg("--version").output().is_err() {
        eprintln!("SKIPPED: {program} is not installed; pip install schemathesis");
        return;
    }
    let examples = std::env::var("TAPGATE_SCHEMATHESIS_EXAMPLES").unwrap_or_else(|_| "10".into());
    let mut app = TestApp::new();
    let key = app.user("alice@example.com").await;
    let commands = std::mem::replace(&mut app.commands, tokio::sync::mpsc::unbounded_channel().1);
    tokio::spawn(obey(app.store.clone(), commands, app.engine.notifier()));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/openapi.json", listener.local_addr().unwrap());
    tokio::spawn(serve(listener, app.router.clone(), None, CancellationToken::new()));
    let output = tokio::task::spawn_blocking(move || {
        let folder = tempfile::tempdir().unwrap();
        std::process::Command::new(program)
            .args(["--config-file", concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/schemathesis.toml")])
            .args(["run", &url, "--checks", "all", "--phases", "examples,coverage,fuzzing,stateful"])
            // A key that is revoked or an event stream that never ends would stop the run itself.
            .args([
                "--exclude-path",
                "/v1/keys/{key_id}",
                "--max-examples",
                &examples,
                "--seed",
                "1",
                "--no-color",
            ])
            .args(["--header", &format!("Authorization: Bearer {key}"), "--request-timeout", "20"])
            .current_dir(folder.path())
            .output()
            .unwrap()
    });
    let output = output.await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    println!("{text}");
}
