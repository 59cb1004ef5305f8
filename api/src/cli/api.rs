//! Calls to the API: one place that builds requests and turns error envelopes into exit codes.

use super::Options;
use super::exit::{Done, Exit, Failure};
use super::profile::Profile;
use serde_json::Value;
use std::sync::Arc;
use std::time::Duration;
use ureq::tls::{Certificate, RootCerts, TlsConfig};
use url::Url;
use url::form_urlencoded::Serializer;

const DEFAULT_URL: &str = "http://127.0.0.1:7070";
/// `start` waits up to thirty seconds on the server.
const TIMEOUT: Duration = Duration::from_secs(60);

/// TLS as everywhere in tapgate: one provider of cryptography, and the authorities that this machine trusts.
fn tls() -> TlsConfig {
    let trusted: Vec<_> = rustls_native_certs::load_native_certs().certs;
    let roots: Vec<_> = trusted.iter().map(|der| Certificate::from_der(der).to_owned()).collect();
    TlsConfig::builder()
        .root_certs(RootCerts::new_with_certs(&roots))
        .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .build()
}

/// A connection to the API.
pub(super) struct Api {
    base: String,
    key: Option<String>,
    agent: ureq::Agent,
    /// Whether to print JSON.
    pub(super) json: bool,
}

impl Api {
    /// The connection that options, environment and profile describe, in this order.
    pub(super) fn new(options: &Options) -> Done<Self> {
        let profile = Profile::load()?;
        let from_env = std::env::var("TAPGATE_API_KEY").ok().filter(|key| !key.is_empty());
        let url = options.api_url.clone().or(profile.api_url).unwrap_or_else(|| DEFAULT_URL.into());
        let url = url.trim_end_matches('/').to_owned();
        let parsed = Url::parse(&url).ok().filter(|u| matches!(u.scheme(), "http" | "https") && u.has_host());
        if parsed.is_none() {
            return Err(Failure::usage(format!(
                "`{url}` is not the URL of an API; write it like {DEFAULT_URL}"
            )));
        }
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .timeout_global(Some(TIMEOUT))
            .tls_config(tls())
            .user_agent(concat!("tapgate/", env!("CARGO_PKG_VERSION")))
            .build();
        Ok(Self {
            base: url,
            key: from_env.or(profile.api_key),
            agent: config.new_agent(),
            json: options.json,
        })
    }

    /// Where the API is.
    pub(super) fn url(&self) -> &str {
        &self.base
    }

    /// Uses this key from now on.
    pub(super) fn set_key(&mut self, key: String) {
        self.key = Some(key);
    }

    /// Whether there is a key.
    pub(super) fn need_key(&self) -> Done {
        match self.key {
            Some(_) => Ok(()),
            None => Err(Failure::new(
                Exit::Unauthorized,
                "no API key: set TAPGATE_API_KEY, or run `tapgate login` or `tapgate signup`",
            )),
        }
    }

    pub(super) fn get(&self, path: &str, query: &[(&str, String)]) -> Done<Value> {
        self.need_key()?;
        self.call("GET", path, query, None)
    }

    pub(super) fn send(&self, method: &str, path: &str, body: Option<Value>) -> Done<Value> {
        self.need_key()?;
        self.call(method, path, &[], body)
    }

    /// One request. No content is answered as null.
    pub(super) fn call(
        &self,
        method: &str,
        path: &str,
        query: &[(&str, String)],
        body: Option<Value>,
    ) -> Done<Value> {
        let mut url = format!("{}{path}", self.base);
        if !query.is_empty() {
            url.push('?');
            url.push_str(&Serializer::new(String::new()).extend_pairs(query).finish());
        }
        let mut request = http::Request::builder().method(method).uri(url);
        if let Some(key) = &self.key {
            request = request.header("authorization", format!("Bearer {key}"));
        }
        let wrong = |error: http::Error| Failure::new(Exit::Other, error.to_string());
        let answer = match body {
            Some(body) => {
                let request = request.header("content-type", "application/json");
                self.agent.run(request.body(body.to_string()).map_err(wrong)?)
            }
            None if method == "POST" || method == "PUT" || method == "PATCH" => {
                self.agent.run(request.body(String::new()).map_err(wrong)?)
            }
            None => self.agent.run(request.body(()).map_err(wrong)?),
        };
        let mut answer = answer.map_err(|error| {
            let message =
                format!("cannot reach the API at {}: {error}; is `tapgate serve` running?", self.base);
            Failure::new(Exit::Unreachable, message)
        })?;
        let status = answer.status().as_u16();
        let text = answer.body_mut().read_to_string().map_err(|error| {
            Failure::new(Exit::Unreachable, format!("the API's answer broke off: {error}"))
        })?;
        let value = if text.is_empty() { Some(Value::Null) } else { serde_json::from_str(&text).ok() };
        match value {
            Some(value) if (200..300).contains(&status) => Ok(value),
            Some(value) => {
                let message = value["error"]["message"].as_str().unwrap_or("the API gave no reason");
                Err(Failure::new(Exit::of_status(status), format!("{message} ({status})")))
            }
            None => {
                let message =
                    format!("{} is not tapgate's API: it answered {status} without JSON", self.base);
                Err(Failure::new(Exit::Other, message))
            }
        }
    }

    /// All pages of a list, or the first `most` items.
    pub(super) fn list(
        &self,
        path: &str,
        query: &[(&str, String)],
        page: u32,
        most: usize,
    ) -> Done<Vec<Value>> {
        let mut query = query.to_vec();
        query.push(("limit", page.to_string()));
        let mut out = Vec::new();
        loop {
            let mut answer = self.get(path, &query)?;
            if let Value::Array(items) = answer["data"].take() {
                out.extend(items);
            }
            query.retain(|(name, _)| *name != "cursor");
            match answer["cursor"].as_str() {
                Some(cursor) if out.len() < most => query.push(("cursor", cursor.to_owned())),
                _ => {
                    out.truncate(most);
                    return Ok(out);
                }
            }
        }
    }

    /// The id of a VM given by id or by name.
    pub(super) fn vm_id(&self, given: &str) -> Done<String> {
        if given.parse::<tapgate_model::VmId>().is_ok() {
            return Ok(given.to_owned());
        }
        let found = self.list("/v1/vms", &[("name", given.to_owned())], 100, 100)?;
        found
            .iter()
            .find(|vm| vm["status"] != "destroyed")
            .and_then(|vm| vm["id"].as_str())
            .map(str::to_owned)
            .ok_or_else(|| {
                Failure::new(Exit::NotFound, format!("there is no VM with the ID or name {given}"))
            })
    }
}
