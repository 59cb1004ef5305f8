//! What an upstream answers, made fit for the guest: hop-by-hop fields out, real values out, codings undone where values
//! are looked for.

use super::{
    body::{Body, BoxError, Cleaned},
    headers::strip_hop_by_hop,
};
use crate::secret::{
    decode::{self, Unreadable},
    patterns::Patterns,
};
use futures_util::TryStreamExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use std::{io, sync::Arc};
use tokio_util::io::{ReaderStream, StreamReader};

/// Offers of another way to the same host, past the gate.
pub(super) const ALT_SVC: HeaderName = HeaderName::from_static("alt-svc");

/// Turns values in headers into placeholders.
pub(crate) fn clean_headers(headers: &mut HeaderMap, patterns: &Patterns) {
    for value in headers.values_mut() {
        if let Some(clean) = patterns.clean_whole(value.as_bytes()) {
            // Placeholders are made of header characters, so the fallback is never needed.
            *value = HeaderValue::from_bytes(&clean).unwrap_or(HeaderValue::from_static(""));
        }
    }
}

/// Makes the answer fit. `patterns` is `None` where there is no secret to look for.
pub(crate) fn fit(
    response: Response<Body>,
    method: &Method,
    patterns: Option<Arc<Patterns>>,
) -> Result<Response<Body>, Unreadable> {
    let (mut parts, mut body) = response.into_parts();
    strip_hop_by_hop(&mut parts.headers);
    parts.headers.remove(ALT_SVC);
    let bodiless = *method == Method::HEAD
        || parts.status.is_informational()
        || matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    if bodiless {
        // What comes all the same, in HTTP/2's frames or as trailers, is part of no answer.
        body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    }
    let Some(patterns) = patterns else { return Ok(Response::from_parts(parts, body)) };
    // A reason phrase of the server's own is text too.
    parts.extensions.remove::<hyper::ext::ReasonPhrase>();
    clean_headers(&mut parts.headers, &patterns);
    if bodiless {
        return Ok(Response::from_parts(parts, body));
    }
    let codings = decode::codings(&parts.headers)?;
    if !codings.is_empty() {
        // A part of a coded body cannot be decoded, and would carry a value past.
        if parts.status == StatusCode::PARTIAL_CONTENT {
            return Err(Unreadable);
        }
        parts.headers.remove(header::CONTENT_ENCODING);
        // Nothing at all is in no coding, whatever is said of it.
        if !body.is_end_stream() {
            body = decoded(codings, body);
        }
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    // They are of the octets as sent, which the guest may not get.
    for digest in ["content-md5", "digest", "content-digest", "repr-digest"] {
        parts.headers.remove(digest);
    }
    Ok(Response::from_parts(parts, Cleaned::wrap(body, patterns)))
}

fn decoded(codings: Vec<&'static str>, body: Body) -> Body {
    let data = body.into_data_stream().map_err(io::Error::other);
    let reader = StreamReader::new(Box::pin(data));
    let stream = async move {
        let reader = decode::decoded(&codings, Box::pin(reader)).await?;
        io::Result::Ok(ReaderStream::with_capacity(reader, 16 * 1024))
    };
    let frames = futures_util::stream::once(stream)
        .try_flatten()
        .map_ok(Frame::data)
        .map_err(|error| -> BoxError { error.into() });
    StreamBody::new(frames).boxed_unsync()
}
