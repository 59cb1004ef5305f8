//! What an upstream answers, made fit for the guest: hop-by-hop fields out, real values out, codings undone where values
//! are looked for.

use super::{
    body::{Body, BoxError, Cleaned},
    headers::strip_hop_by_hop,
};
use crate::secret::{
    decode::{self, Unreadable},
    patterns::Patterns,
    room::{Decoders, NoRoom, Room},
};
use futures_util::TryStreamExt as _;
use http::{HeaderMap, HeaderName, HeaderValue, Method, Response, StatusCode, header};
use http_body::{Body as _, Frame};
use http_body_util::{BodyExt as _, Empty, StreamBody};
use std::{io, sync::Arc, time::Duration};
use tapgate_model::Reason;
use tokio_util::{
    io::{ReaderStream, StreamReader},
    sync::CancellationToken,
};

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

/// Why an answer is not passed on.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unfit {
    #[error(transparent)]
    Unreadable(#[from] Unreadable),
    #[error(transparent)]
    NoRoom(#[from] NoRoom),
    #[error("the rules stopped allowing it while it waited to be decoded")]
    Revoked,
}

impl Unfit {
    /// The word for the audit.
    pub(crate) const fn reason(&self) -> Reason {
        match self {
            Self::Unreadable(_) => Reason::Unreachable,
            Self::NoRoom(_) => Reason::Limit,
            Self::Revoked => Reason::Revoked,
        }
    }
}

/// Codings to be undone, and the room for it.
pub(crate) struct Coded {
    codings: Vec<&'static str>,
    room: Room,
}

fn is_bodiless(method: &Method, status: StatusCode) -> bool {
    *method == Method::HEAD
        || status.is_informational()
        || matches!(status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
}

/// What has to be undone of an answer in which values are looked for; waits for room, as long as its request stands.
pub(crate) async fn coded(
    (status, headers): (StatusCode, &HeaderMap),
    method: &Method,
    decoders: &Decoders,
    patience: Duration,
    revoked: &CancellationToken,
) -> Result<Option<Coded>, Unfit> {
    if is_bodiless(method, status) {
        return Ok(None);
    }
    let codings = decode::codings(headers)?;
    if codings.is_empty() {
        return Ok(None);
    }
    // A part of a coded body cannot be decoded, and would carry a value past.
    if status == StatusCode::PARTIAL_CONTENT {
        return Err(Unreadable.into());
    }
    // Apart, so that an answer in no coding has no room for it.
    let waiting = decoders.take(decode::needs(&codings), patience);
    let room = Box::pin(revoked.run_until_cancelled(waiting)).await.ok_or(Unfit::Revoked)??;
    Ok(Some(Coded { codings, room }))
}

/// Makes the answer fit. `patterns` is `None` where there is no secret to look for; `coded` is what has to be undone to look.
pub(crate) fn fit(
    response: Response<Body>,
    method: &Method,
    patterns: Option<Arc<Patterns>>,
    coded: Option<Coded>,
) -> Response<Body> {
    let (mut parts, mut body) = response.into_parts();
    strip_hop_by_hop(&mut parts.headers);
    parts.headers.remove(ALT_SVC);
    let bodiless = is_bodiless(method, parts.status);
    if bodiless {
        // What comes all the same, in HTTP/2's frames or as trailers, is part of no answer.
        body = Empty::new().map_err(|never| match never {}).boxed_unsync();
    }
    let Some(patterns) = patterns else { return Response::from_parts(parts, body) };
    // A reason phrase of the server's own is text too.
    parts.extensions.remove::<hyper::ext::ReasonPhrase>();
    clean_headers(&mut parts.headers, &patterns);
    if bodiless {
        return Response::from_parts(parts, body);
    }
    if let Some(coded) = coded {
        parts.headers.remove(header::CONTENT_ENCODING);
        // Nothing at all is in no coding, whatever is said of it.
        if !body.is_end_stream() {
            body = decoded(coded, body);
        }
    }
    parts.headers.remove(header::CONTENT_LENGTH);
    // They are of the octets as sent, which the guest may not get.
    for digest in ["content-md5", "digest", "content-digest", "repr-digest"] {
        parts.headers.remove(digest);
    }
    Response::from_parts(parts, Cleaned::wrap(body, patterns))
}

fn decoded(coded: Coded, body: Body) -> Body {
    let Coded { codings, mut room } = coded;
    let data = body.into_data_stream().map_err(io::Error::other);
    let reader = StreamReader::new(Box::pin(data));
    let stream = async move {
        let reader = decode::decoded(&codings, Box::pin(reader), &mut room).await?;
        let pieces = ReaderStream::with_capacity(reader, 16 * 1024);
        // The room is held as long as what is in it.
        io::Result::Ok(pieces.inspect_ok(move |_| _ = &room))
    };
    let frames = futures_util::stream::once(stream)
        .try_flatten()
        .map_ok(Frame::data)
        .map_err(|error| -> BoxError { error.into() });
    StreamBody::new(frames).boxed_unsync()
}
