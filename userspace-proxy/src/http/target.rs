//! Whom a request is for, read off it before it is decided, and written on it for the connection that it goes out on.
//!
//! `Host`, `:authority` and an absolute target are one name, or the request is refused.

use super::{
    authority::{Authority, Named},
    body::{self, Body},
    upgrade,
    upstream::Sender,
};
use http::{HeaderMap, HeaderValue, Method, Request, Uri, Version, header, request::Parts, uri};
use tapgate_model::{HostName, Reason};

/// Why a request is refused before anything is sent.
pub(super) struct Refused {
    pub(super) reason: Reason,
    pub(super) detail: Option<&'static str>,
}

impl From<Reason> for Refused {
    fn from(reason: Reason) -> Self {
        Self { reason, detail: None }
    }
}

/// Who a request says it is for: `Host`, `:authority` and an absolute target must be one.
pub(super) fn who(parts: &Parts, tls: bool, port: u16) -> Result<Option<Authority>, Refused> {
    if parts.method == Method::CONNECT && !upgrade::is_extended(parts) {
        return Err(Reason::Tunnel.into());
    }
    let bad = |detail| Refused { reason: Reason::BadRequest, detail: Some(detail) };
    if parts
        .uri
        .scheme()
        .is_some_and(|scheme| *scheme != if tls { uri::Scheme::HTTPS } else { uri::Scheme::HTTP })
    {
        return Err(bad("the scheme of the request is not that of the connection"));
    }
    let mut hosts = parts.headers.get_all(header::HOST).iter();
    let host = hosts.next().map(|host| Authority::parse(host.as_bytes())).transpose()?;
    if hosts.next().is_some() {
        return Err(bad("more than one Host field"));
    }
    let target = parts.uri.authority().map(|authority| Authority::parse(authority.as_str().as_bytes()));
    let target = target.transpose()?;
    let default_port = if tls { 443 } else { 80 };
    if let (Some(a), Some(b)) = (&host, &target)
        && (!a.same_host(b) || a.port.unwrap_or(default_port) != b.port.unwrap_or(default_port))
    {
        return Err(Reason::NameMismatch.into());
    }
    let who = target.or(host);
    if who.as_ref().is_some_and(|who| who.port.is_some_and(|written| written != port)) {
        return Err(Refused {
            reason: Reason::NameMismatch,
            detail: Some("the port in Host is not the port of the connection"),
        });
    }
    Ok(who)
}

/// The name for the audit of a request that was refused for its form.
pub(super) fn name_in(parts: &Parts) -> Option<HostName> {
    let host = parts.headers.get(header::HOST).map(HeaderValue::as_bytes);
    let host = host.or(parts.uri.authority().map(|authority| authority.as_str().as_bytes()))?;
    match Authority::parse(host).ok()?.host {
        Named::Name(name) => Some(name),
        Named::Address(_) => None,
    }
}

/// A copy to send again, of a request that does the same twice as once (RFC 9110 §9.2.2) and has no body.
pub(super) fn repeatable(request: &Request<Body>) -> Option<Request<Body>> {
    (request.method().is_idempotent() && http_body::Body::is_end_stream(request.body())).then(|| {
        let mut copy = Request::new(body::full(bytes::Bytes::new()));
        *copy.method_mut() = request.method().clone();
        *copy.uri_mut() = request.uri().clone();
        *copy.headers_mut() = request.headers().clone();
        copy
    })
}

/// Addresses a request in the way of the connection it goes out on; it may have been addressed for another before.
pub(super) fn address(request: &mut Request<Body>, sender: &Sender, tls: bool) {
    let mut uri = uri::Parts::default();
    let path = request.uri().path_and_query().cloned();
    uri.path_and_query = Some(path.unwrap_or_else(|| uri::PathAndQuery::from_static("/")));
    request.headers_mut().remove(header::TRANSFER_ENCODING);
    let host = request.headers_mut().remove(header::HOST);
    let host = host.and_then(|host| uri::Authority::try_from(host.as_bytes()).ok());
    let host = host.or_else(|| request.uri().authority().cloned());
    match sender {
        Sender::Http1(_) => {
            *request.version_mut() = Version::HTTP_11;
            if let Some(Ok(host)) = host.map(|host| HeaderValue::from_str(host.as_str())) {
                request.headers_mut().insert(header::HOST, host);
            }
            join_cookies(request.headers_mut());
            // Left to itself the library takes a GET of unknown length for one without a body.
            let framed = request.headers().contains_key(header::CONTENT_LENGTH);
            if !framed && !http_body::Body::is_end_stream(request.body()) {
                request.headers_mut().insert(header::TRANSFER_ENCODING, HeaderValue::from_static("chunked"));
            }
        }
        Sender::Http2(_) => {
            *request.version_mut() = Version::HTTP_2;
            uri.scheme = host.as_ref().map(|_| if tls { uri::Scheme::HTTPS } else { uri::Scheme::HTTP });
            uri.authority = host;
        }
    }
    if let Ok(uri) = Uri::from_parts(uri) {
        *request.uri_mut() = uri;
    }
}

/// HTTP/2 may send `Cookie` in pieces; HTTP/1 may not (RFC 9113 §8.2.3).
fn join_cookies(headers: &mut HeaderMap) {
    let pieces: Vec<&[u8]> = headers.get_all(header::COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if pieces.len() > 1
        && let Ok(mut joined) = HeaderValue::from_bytes(&pieces.join(&b"; "[..]))
    {
        joined.set_sensitive(true);
        headers.insert(header::COOKIE, joined);
    }
}
