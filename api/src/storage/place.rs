//! Where the operator wants snapshots: a folder, or `s3://bucket/prefix` with an endpoint and credentials. Parses and
//! checks; credentials come from the environment or a private file and are never shown.

use object_store::{
    ClientOptions, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder},
};
use serde::Deserialize;
use std::{
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    time::Duration,
};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

/// For one request: a part of some MiB over a slow line.
const REQUEST: Duration = Duration::from_secs(300);
const CONNECT: Duration = Duration::from_secs(10);
/// How long one request is tried again.
const RETRY: Duration = Duration::from_secs(120);

/// What is wrong with the place; the first word is the configuration's key.
#[derive(Debug, thiserror::Error)]
#[error("configuration key `{key}`: {message}")]
pub struct PlaceError {
    /// The key.
    pub key: &'static str,
    /// What is wrong and what to write instead.
    pub message: String,
}

fn wrong(key: &'static str, message: impl Into<String>) -> PlaceError {
    PlaceError { key, message: message.into() }
}

/// Where snapshots are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// A folder of this host.
    Folder(PathBuf),
    /// A bucket.
    Bucket(Bucket),
}

/// A bucket and how it is reached.
#[derive(Clone, PartialEq, Eq)]
pub struct Bucket {
    name: String,
    /// What all keys begin with; may be empty.
    pub prefix: String,
    endpoint: Option<String>,
    region: String,
    credentials: Credentials,
}

impl std::fmt::Debug for Bucket {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "s3://{}/{}", self.name, self.prefix)
    }
}

/// Wiped when dropped, and without a way to be printed.
#[derive(Clone, PartialEq, Eq, Deserialize, Zeroize, ZeroizeOnDrop)]
#[serde(deny_unknown_fields)]
struct Credentials {
    access_key_id: String,
    secret_access_key: String,
    session_token: Option<String>,
}

impl Place {
    /// Checks the keys `snapshot_store`, `s3_endpoint`, `s3_region` and `s3_credentials`.
    ///
    /// # Errors
    /// One of them makes no sense, or there are no credentials.
    pub fn parse(
        store: Option<&str>,
        default: PathBuf,
        endpoint: Option<String>,
        region: Option<String>,
        credentials: Option<&Path>,
    ) -> Result<Self, PlaceError> {
        let Some(text) = store else { return Ok(Self::Folder(default)) };
        let Some(rest) = text.strip_prefix("s3://") else {
            let folder = PathBuf::from(text);
            return match folder.is_absolute() {
                true => Ok(Self::Folder(folder)),
                false => Err(wrong("snapshot_store", "must be an absolute path or s3://BUCKET/PREFIX")),
            };
        };
        let (name, prefix) = rest.split_once('/').unwrap_or((rest, ""));
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
        if !(3..=63).contains(&name.len()) || !name.chars().all(plain) {
            return Err(wrong("snapshot_store", format!("`{name}` is not the name of a bucket")));
        }
        let endpoint = match endpoint {
            Some(url) => match url::Url::parse(&url) {
                Ok(parsed) if matches!(parsed.scheme(), "https" | "http") && parsed.password().is_none() => {
                    Some(url)
                }
                _ => {
                    return Err(wrong(
                        "s3_endpoint",
                        "must be a URL like https://ACCOUNT.r2.cloudflarestorage.com",
                    ));
                }
            },
            None => None,
        };
        Ok(Self::Bucket(Bucket {
            name: name.to_owned(),
            prefix: prefix.trim_matches('/').to_owned(),
            endpoint,
            region: region.unwrap_or_else(|| "auto".into()),
            credentials: Credentials::find(credentials)?,
        }))
    }
}

impl Credentials {
    fn find(file: Option<&Path>) -> Result<Self, PlaceError> {
        let key = "s3_credentials";
        if let Some(path) = file {
            let shown = path.display();
            let meta = std::fs::metadata(path).map_err(|error| wrong(key, format!("{shown}: {error}")))?;
            if meta.permissions().mode() & 0o077 != 0 {
                return Err(wrong(key, format!("{shown} can be read by others; chmod 600 it")));
            }
            let text =
                std::fs::read_to_string(path).map_err(|error| wrong(key, format!("{shown}: {error}")))?;
            let text = Zeroizing::new(text);
            // The parser's own words would quote the line.
            return toml::from_str(&text).map_err(|_| {
                wrong(key, format!("{shown} must have the keys access_key_id, secret_access_key and perhaps session_token, in TOML"))
            });
        }
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        match (variable("AWS_ACCESS_KEY_ID"), variable("AWS_SECRET_ACCESS_KEY")) {
            (Some(access_key_id), Some(secret_access_key)) => {
                Ok(Self { access_key_id, secret_access_key, session_token: variable("AWS_SESSION_TOKEN") })
            }
            _ => Err(wrong(
                key,
                "a bucket needs credentials: name a file here, or set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )),
        }
    }
}

impl Bucket {
    pub(super) fn open(&self) -> Result<AmazonS3, object_store::Error> {
        let clear = self.endpoint.as_deref().is_some_and(|url| url.starts_with("http://"));
        if clear {
            tracing::warn!(bucket = ?self, "snapshots go over a connection without TLS");
        }
        let options =
            ClientOptions::new().with_timeout(REQUEST).with_connect_timeout(CONNECT).with_allow_http(clear);
        let retry = RetryConfig { retry_timeout: RETRY, ..RetryConfig::default() };
        let mut builder = AmazonS3Builder::new()
            .with_bucket_name(&self.name)
            .with_region(&self.region)
            .with_access_key_id(&self.credentials.access_key_id)
            .with_secret_access_key(&self.credentials.secret_access_key)
            .with_client_options(options)
            .with_retry(retry);
        if let Some(token) = &self.credentials.session_token {
            builder = builder.with_token(token);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        builder.build()
    }
}
