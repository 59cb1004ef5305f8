//! Git over HTTP as a forge does it: git's own backend behind Basic authentication with a token.

use super::{
    GIT_FOLDER, Shared,
    http::{Body, plain, whole},
};
use anyhow::{Context as _, Result};
use bytes::Bytes;
use hyper::{Response, StatusCode, header, http::request::Parts};
use std::process::Stdio;
use tokio::{io::AsyncWriteExt as _, process::Command};

/// Answers a request of git's protocol; 401 without the token.
pub(super) async fn answer(
    shared: &Shared,
    parts: &Parts,
    basic: Option<&str>,
    body: &Bytes,
) -> Response<Body> {
    let password = basic.and_then(|basic| basic.split_once(':')).map(|(_, password)| password);
    if password != Some(&shared.git_token) {
        let mut refusal = plain(StatusCode::UNAUTHORIZED, "a token is needed\n".into());
        let challenge = header::HeaderValue::from_static("Basic realm=\"git\"");
        refusal.headers_mut().insert(header::WWW_AUTHENTICATE, challenge);
        return refusal;
    }
    match backend(shared, parts, body).await {
        Ok(response) => response,
        Err(error) => plain(StatusCode::INTERNAL_SERVER_ERROR, format!("git: {error:#}\n")),
    }
}

/// Runs `git http-backend` as a CGI program (RFC 3875).
async fn backend(shared: &Shared, parts: &Parts, body: &Bytes) -> Result<Response<Body>> {
    let text = |name: header::HeaderName| {
        parts.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or("")
    };
    let mut command = Command::new("git");
    command
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", shared.folder.join(GIT_FOLDER))
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("GIT_CONFIG_NOSYSTEM", "1")
        .env("HOME", shared.folder.as_path())
        .env("REMOTE_USER", "guest")
        .env("REQUEST_METHOD", parts.method.as_str())
        .env("PATH_INFO", parts.uri.path())
        .env("QUERY_STRING", parts.uri.query().unwrap_or(""))
        .env("CONTENT_TYPE", text(header::CONTENT_TYPE))
        .env("CONTENT_LENGTH", body.len().to_string())
        .env("HTTP_CONTENT_ENCODING", text(header::CONTENT_ENCODING))
        .env("GIT_PROTOCOL", text(header::HeaderName::from_static("git-protocol")))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .kill_on_drop(true);
    let mut child = command.spawn().context("git could not be started")?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let body = body.clone();
    tokio::spawn(async move { stdin.write_all(&body).await });
    let output = child.wait_with_output().await?.stdout;
    let end =
        output.windows(4).position(|window| window == b"\r\n\r\n").context("no CGI header came back")?;
    let mut response = Response::new(whole(output[end + 4..].to_vec()));
    for line in std::str::from_utf8(&output[..end])?.lines() {
        let (name, value) = line.split_once(':').context("a CGI header without a colon")?;
        if name.eq_ignore_ascii_case("status") {
            *response.status_mut() = value.trim().split(' ').next().unwrap_or("").parse()?;
        } else {
            response.headers_mut().append(name.parse::<header::HeaderName>()?, value.trim().parse()?);
        }
    }
    Ok(response)
}
