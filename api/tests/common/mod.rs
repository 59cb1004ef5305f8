//! The API as tests use it: the real router over a real store in a folder of its own, and an engine that is the test.
//!
//! Requests go through the router without a socket. Three kinds of caller: nobody, Alice, Bob.
#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "each test file uses a part of it")]

use axum::Router;
use axum::body::Body;
use axum::http::{Method, Request, StatusCode, header};
use http_body_util::BodyExt as _;
use serde_json::{Value, json};
use std::sync::Arc;
use tapgate::engine::{Command, Handle};
use tapgate::http::{Rate, Rates};
use tapgate::{AppState, Settings, router};
use tapgate_model::{StatusDetail, VmId};
use tapgate_store::{CaPem, SealKey, Store};
use tokio::sync::mpsc::UnboundedReceiver;
use tower::ServiceExt as _;

pub const PUBLIC_KEY: &str =
    "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti alice@example.com";

/// Tests ask faster than people.
pub fn no_limits() -> Rates {
    let rate = Rate { burst: 1_000_000, per_minute: 1_000_000 };
    Rates { key: rate, account: rate, refused: rate, password: rate, device: rate }
}

/// A program that `cargo xtask setup` installs; the variable names another one.
pub fn tool(variable: &str, name: &str) -> std::path::PathBuf {
    if let Some(program) = std::env::var_os(variable) {
        return program.into();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    let folders =
        std::env::split_paths(&path).chain([std::path::PathBuf::from("/usr/local/tapgate-tools/api/bin")]);
    folders
        .map(|folder| folder.join(name))
        .find(|program| program.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed; run `cargo xtask setup`"))
}

pub struct TestApp {
    pub router: Router,
    pub store: Store,
    pub engine: Handle,
    pub commands: UnboundedReceiver<Command>,
    pub folder: tempfile::TempDir,
}

/// An answer, taken apart.
#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: axum::http::HeaderMap,
    pub body: Value,
}

impl Answer {
    #[track_caller]
    pub fn is(self, status: u16) -> Value {
        assert_eq!(self.status.as_u16(), status, "{}", self.body);
        self.body
    }

    /// The error code of an envelope that holds nothing else.
    #[track_caller]
    pub fn error(self, status: u16) -> String {
        let body = self.is(status);
        assert_eq!(keys(&body), ["error"], "{body}");
        assert_eq!(keys(&body["error"]), ["code", "message"], "{body}");
        assert!(!body["error"]["message"].as_str().unwrap().is_empty());
        body["error"]["code"].as_str().unwrap().to_owned()
    }
}

pub fn keys(value: &Value) -> Vec<&str> {
    let mut keys: Vec<_> = value.as_object().expect("an object").keys().map(String::as_str).collect();
    keys.sort_unstable();
    keys
}

impl TestApp {
    pub fn new() -> Self {
        Self::with(Settings {
            public_host: "203.0.113.10".into(),
            ssh_ports: 2222..=2322,
            rates: no_limits(),
            start_wait: std::time::Duration::from_secs(5),
            ..Settings::default()
        })
    }

    pub fn with(settings: Settings) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
        let store = Store::open(&folder.path().join("db"), key).unwrap();
        Self::over(folder, store, settings)
    }

    /// The same records under other settings.
    pub fn again(self, settings: Settings) -> Self {
        Self::over(self.folder, self.store, settings)
    }

    fn over(folder: tempfile::TempDir, store: Store, settings: Settings) -> Self {
        let (engine, commands) = Handle::new();
        let ca =
            Arc::new(|vm: &VmId| Ok(CaPem { cert: format!("CA of {vm}"), key: String::from("key").into() }));
        let state = AppState::try_new(store.clone(), engine.clone(), ca, settings).unwrap();
        Self { router: router(state), store, engine, commands, folder }
    }

    pub async fn send(&self, request: Request<Body>) -> Answer {
        let response = self.router.clone().oneshot(request).await.unwrap();
        let (parts, body) = response.into_parts();
        let bytes = body.collect().await.unwrap().to_bytes();
        let body = if bytes.is_empty() {
            Value::Null
        } else {
            serde_json::from_slice(&bytes).unwrap_or_else(|_| String::from_utf8_lossy(&bytes).into())
        };
        Answer { status: parts.status, headers: parts.headers, body }
    }

    pub async fn call(&self, token: &str, method: &str, path: &str, body: Option<Value>) -> Answer {
        let mut request = Request::builder().method(method).uri(path);
        if !token.is_empty() {
            request = request.header(header::AUTHORIZATION, format!("Bearer {token}"));
        }
        let body = match body {
            Some(body) => {
                request = request.header(header::CONTENT_TYPE, "application/json");
                Body::from(body.to_string())
            }
            None => Body::empty(),
        };
        self.send(request.body(body).unwrap()).await
    }

    pub async fn get(&self, token: &str, path: &str) -> Answer {
        self.call(token, Method::GET.as_str(), path, None).await
    }

    pub async fn post(&self, token: &str, path: &str, body: Value) -> Answer {
        self.call(token, "POST", path, Some(body)).await
    }

    /// Signs a user up and answers the token.
    pub async fn user(&self, email: &str) -> String {
        let body = json!({
            "first_name": "Alice", "last_name": "Smith", "email": email, "password": "s3cureP@ssword",
        });
        let made = self.post("", "/v1/users", body).await.is(201);
        made["api_key"]["token"].as_str().unwrap().to_owned()
    }

    /// From now on there is an engine that puts policies into force at once; each change would wait for it.
    pub fn puts_in_force(&mut self) {
        let mut commands = std::mem::replace(&mut self.commands, tokio::sync::mpsc::unbounded_channel().1);
        let notifier = self.engine.notifier();
        tokio::spawn(async move {
            while let Some(command) = commands.recv().await {
                if matches!(command, Command::Policy(_)) {
                    notifier.policies_in_force(1);
                }
            }
        });
    }

    /// Makes a VM and answers its id.
    pub async fn vm(&self, token: &str, name: &str) -> String {
        let body = json!({ "name": name, "public_key": PUBLIC_KEY });
        self.post(token, "/v1/vms", body).await.is(201)["id"].as_str().unwrap().to_owned()
    }

    /// What the engine would report.
    pub async fn advance(&self, vm: &str, to: StatusDetail) {
        let vm: VmId = vm.parse().unwrap();
        self.store
            .vm_advance(&vm, to, (to == StatusDetail::Failed).then(|| "it broke".into()))
            .await
            .unwrap();
        self.engine.notifier().changed(vm);
    }

    pub async fn make_ready(&self, vm: &str) {
        for state in [StatusDetail::Starting, StatusDetail::Running, StatusDetail::Ready] {
            self.advance(vm, state).await;
        }
    }
}
