//! `ETag` and `If-Match`: a change that insists on having seen the newest version, or is refused with 412.

use super::{ApiError, Code};
use axum::extract::FromRequestParts;
use axum::http::request::Parts;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use tapgate_store::Expected;

/// The versions that a request accepts.
pub struct IfMatch(pub Expected);

impl<S: Send + Sync> FromRequestParts<S> for IfMatch {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        let mut versions = Vec::new();
        let mut given = false;
        for value in parts.headers.get_all(header::IF_MATCH) {
            given = true;
            let wrong = || ApiError::new(Code::InvalidIfMatch, "If-Match must be * or tags as ETag has them");
            for tag in value.to_str().map_err(|_| wrong())?.split(',').map(str::trim) {
                if tag == "*" {
                    return Ok(Self(Expected::there()));
                }
                // Ours are strong, and a weak one is never the same as a strong one (RFC 9110, section 8.8.3.2).
                let weak = tag.strip_prefix("W/");
                let tag = weak
                    .unwrap_or(tag)
                    .strip_prefix('"')
                    .and_then(|tag| tag.strip_suffix('"'))
                    .ok_or_else(wrong)?;
                if weak.is_none() {
                    versions.push(tag.to_owned());
                }
            }
        }
        Ok(Self(if given { Expected::one_of(versions) } else { Expected::any() }))
    }
}

/// An answer with its version as `ETag`.
pub struct Versioned<T>(pub String, pub T);

impl<T: IntoResponse> IntoResponse for Versioned<T> {
    fn into_response(self) -> Response {
        let mut response = self.1.into_response();
        if let Ok(tag) = HeaderValue::try_from(format!("\"{}\"", self.0)) {
            response.headers_mut().insert(header::ETAG, tag);
        }
        response
    }
}
