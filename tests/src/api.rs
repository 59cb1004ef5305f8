//! A client of the daemon's API: curl on the daemon's host, and the calls that tests and the demo make.

use crate::{World, sh::capture};
use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::{thread, time::Duration};

/// How many times we ask for a VM's state, twice a second.
const TRIES: usize = 600;

/// An answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Reply {
    /// The HTTP status.
    pub status: u16,
    /// The body; null if there is none.
    pub body: Value,
}

impl Reply {
    /// The body, if the status is the expected one.
    pub fn expect(self, status: u16) -> Result<Value> {
        ensure!(self.status == status, "expected {status}, the API answered {}: {}", self.status, self.body);
        Ok(self.body)
    }
}

/// A client with or without a key.
#[derive(Clone)]
pub struct Client<'world> {
    world: &'world World,
    base: String,
    key: Option<String>,
}

impl<'world> Client<'world> {
    /// A client without a key.
    pub fn new(world: &'world World, base: String) -> Self {
        Self { world, base, key: None }
    }

    /// Signs somebody up and uses the key that comes back.
    pub fn sign_up(&self, name: &str) -> Result<Self> {
        let person = json!({
            "first_name": name, "last_name": "Example", "email": format!("{name}@example.com"),
            "password": "correct horse battery staple",
        });
        let reply = self.call("POST", "/v1/users", Some(&person))?.expect(201)?;
        let token = reply["api_key"]["token"].as_str().context("sign-up returned no token")?;
        Ok(Self { key: Some(token.to_owned()), ..self.clone() })
    }

    /// The key.
    pub fn key(&self) -> Option<&str> {
        self.key.as_deref()
    }

    /// Where a path of the API is.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.base)
    }

    /// GET.
    pub fn get(&self, path: &str) -> Result<Reply> {
        self.call("GET", path, None)
    }

    /// POST.
    pub fn post(&self, path: &str, body: &Value) -> Result<Reply> {
        self.call("POST", path, Some(body))
    }

    /// PUT.
    pub fn put(&self, path: &str, body: &Value) -> Result<Reply> {
        self.call("PUT", path, Some(body))
    }

    /// DELETE.
    pub fn delete(&self, path: &str) -> Result<Reply> {
        self.call("DELETE", path, None)
    }

    /// Any call.
    pub fn call(&self, method: &str, path: &str, body: Option<&Value>) -> Result<Reply> {
        let mut curl = self.world.on_host("curl");
        curl.args(["--silent", "--show-error", "--noproxy", "*", "--max-time", "60", "--request", method]);
        curl.args(["--write-out", "\n%{http_code}"]);
        if let Some(key) = &self.key {
            curl.args(["--header", &format!("Authorization: Bearer {key}")]);
        }
        let input = body.map(Value::to_string).unwrap_or_default();
        if body.is_some() {
            curl.args(["--header", "Content-Type: application/json", "--data-binary", "@-"]);
        }
        curl.arg(format!("{}{path}", self.base));
        let done = capture(&mut curl, input.as_bytes())?;
        ensure!(done.ok(), "{method} {path}: {}", done.gist());
        let (text, status) = done.out.rsplit_once('\n').context("curl wrote no status")?;
        let body = match text.trim() {
            "" => Value::Null,
            text => serde_json::from_str(text).unwrap_or_else(|_| Value::String(text.to_owned())),
        };
        Ok(Reply { status: status.trim().parse()?, body })
    }

    /// Creates a VM; its id.
    pub fn create_vm(&self, name: &str, public_key: &str) -> Result<String> {
        let vm = self.post("/v1/vms", &json!({ "name": name, "public_key": public_key }))?.expect(201)?;
        Ok(vm["id"].as_str().context("a VM without an id")?.to_owned())
    }

    /// Polls until the VM is `running`/`ready`; the words of `status_detail` that were seen on the way.
    pub fn wait_ready(&self, vm: &str) -> Result<Vec<String>> {
        let mut seen: Vec<String> = Vec::new();
        for _ in 0..TRIES {
            let body = self.get(&format!("/v1/vms/{vm}"))?.expect(200)?;
            let detail = body["status_detail"].as_str().unwrap_or("?").to_owned();
            if seen.last() != Some(&detail) {
                seen.push(detail.clone());
            }
            match (body["status"].as_str(), detail.as_str()) {
                (Some("running"), "ready") => return Ok(seen),
                (Some("failed"), _) => bail!("the VM failed: {body}"),
                _ => thread::sleep(Duration::from_millis(500)),
            }
        }
        bail!("the VM does not become ready; it went through {}", seen.join(", "))
    }

    /// Polls until the VM's `status_detail` is this word.
    pub fn wait_for(&self, vm: &str, wanted: &str) -> Result<()> {
        for _ in 0..TRIES {
            let body = self.get(&format!("/v1/vms/{vm}"))?.expect(200)?;
            if body["status_detail"] == wanted {
                return Ok(());
            }
            ensure!(body["status"] != "failed", "the VM failed: {body}");
            thread::sleep(Duration::from_millis(500));
        }
        bail!("the VM does not become {wanted}")
    }

    /// Creates an agent on a branch of the world's repository; the agent and its VM.
    pub fn create_agent(&self, body: &Value) -> Result<(String, String)> {
        let agent = self.post("/v1/agents", body)?.expect(201)?;
        let text = |name: &str| agent[name].as_str().map(str::to_owned).context("an agent without an id");
        Ok((text("id")?, text("vm_id")?))
    }

    /// Polls until the agent's status is this word; the agent.
    pub fn wait_agent(&self, agent: &str, wanted: &str) -> Result<Value> {
        let mut body = Value::Null;
        for _ in 0..TRIES {
            body = self.get(&format!("/v1/agents/{agent}"))?.expect(200)?;
            if body["status"] == wanted {
                return Ok(body);
            }
            ensure!(body["status"] != "idle", "the agent is idle too early: {body}");
            thread::sleep(Duration::from_millis(500));
        }
        bail!("the agent does not become {wanted}: {body}")
    }

    /// Adds a rule for the account (`host` or `cidr`); its id.
    pub fn rule(&self, kind: &str, target: &str) -> Result<String> {
        let rule = self.post("/v1/egress/rules", &json!({ kind: target }))?.expect(201)?;
        Ok(rule["id"].as_str().context("a rule without an id")?.to_owned())
    }

    /// Takes a rule away.
    pub fn remove_rule(&self, id: &str) -> Result<()> {
        self.delete(&format!("/v1/egress/rules/{id}"))?.expect(204).map(drop)
    }

    /// Sets the account's mode.
    pub fn mode(&self, mode: &str) -> Result<()> {
        self.put("/v1/egress/policy", &json!({ "mode": mode }))?.expect(200).map(drop)
    }

    /// Stores a secret for these hosts; its placeholder.
    pub fn secret(&self, name: &str, variable: &str, value: &str, hosts: &[&str]) -> Result<String> {
        let secret = json!({ "name": name, "secret": value, "env_var": variable, "hosts": hosts });
        let reply = self.post("/v1/secrets", &secret)?.expect(201)?;
        ensure!(!reply.to_string().contains(value), "the API handed the secret back: {reply}");
        Ok(reply["proxy_value"].as_str().context("a secret without a proxy_value")?.to_owned())
    }

    /// Audit events of the VM, oldest first; `filter` is more of a query (`&host=...`).
    pub fn audit(&self, vm: &str, filter: &str) -> Result<Vec<Value>> {
        let path = format!("/v1/audit/egress?vm_id={vm}&limit=500&order=asc{filter}");
        let mut events = Vec::new();
        let mut cursor = String::new();
        loop {
            let page = self.get(&format!("{path}{cursor}"))?.expect(200)?;
            events.extend(page["data"].as_array().context("no list of events")?.iter().cloned());
            match page["cursor"].as_str() {
                Some(next) if page["has_more"] == true => cursor = format!("&cursor={next}"),
                _ => return Ok(events),
            }
        }
    }
}
