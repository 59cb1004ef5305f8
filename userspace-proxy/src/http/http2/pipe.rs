//! Writes a body to a stream, as far as the other side's window lets it. The next piece is asked for when the one before is on
//! its way; window is claimed for a piece that is there, and never ahead.

use super::{outbox::Outbox, ping::Open};
use crate::http::body::{Body, BoxError};
use bytes::Bytes;
use h2::{Reason, SendStream};
use http::HeaderMap;
use http_body::Body as _;
use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll, ready},
};

/// Largest piece that window is claimed for at once: a stream that waits claims no more than a frame of its connection's.
const CLAIM: usize = 16 * 1024;

/// Trailers that wait for room.
type Trailers = Pin<Box<dyn Future<Output = Option<HeaderMap>> + Send>>;

/// Ends when all is written, the body broke off, or the other side reset the stream; the body is gone then.
pub(super) struct Pipe {
    /// Gone when nothing more comes of it.
    body: Option<Body>,
    to: SendStream<Bytes>,
    /// What of a piece is not written yet, and whether it is the last one.
    piece: Option<(Bytes, bool)>,
    trailers: Option<Trailers>,
    outbox: Outbox,
    _open: Open,
}

impl Pipe {
    pub(super) fn new(body: Body, to: SendStream<Bytes>, outbox: Outbox, open: Open) -> Self {
        Self { body: Some(body), to, piece: None, trailers: None, outbox, _open: open }
    }

    fn poll_all(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), h2::Error>> {
        loop {
            // Whoever waits here, for the body or for window, is told of a reset.
            if let Poll::Ready(reason) = self.to.poll_reset(cx)? {
                return Poll::Ready(Err(reason.into()));
            }
            if let Some((piece, last)) = &mut self.piece {
                let room = ready!(poll_room(&mut self.to, piece.len(), cx))?;
                let part = piece.split_to(room);
                let last = *last && piece.is_empty();
                if piece.is_empty() {
                    self.piece = None;
                }
                self.to.send_data(part, last)?;
                if last {
                    return Poll::Ready(Ok(()));
                }
                continue;
            }
            if let Some(waiting) = &mut self.trailers {
                let trailers = ready!(waiting.as_mut().poll(cx)).ok_or(Reason::STREAM_CLOSED)?;
                return Poll::Ready(self.to.send_trailers(trailers));
            }
            let Some(body) = &mut self.body else { return Poll::Ready(Ok(())) };
            match ready!(Pin::new(&mut *body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    // It needs no window.
                    Ok(data) if data.is_empty() => {
                        if body.is_end_stream() {
                            return Poll::Ready(self.to.send_data(data, true));
                        }
                    }
                    Ok(data) => self.piece = Some((data, body.is_end_stream())),
                    Err(other) => {
                        if let Ok(trailers) = other.into_trailers() {
                            self.trailers = Some(Box::pin(self.outbox.clone().trailers(trailers)));
                            self.body = None;
                        }
                    }
                },
                Some(Err(error)) => {
                    self.to.send_reset(reason_of(&error));
                    return Poll::Ready(Ok(()));
                }
                None => return Poll::Ready(self.to.send_data(Bytes::new(), true)),
            }
        }
    }
}

impl Future for Pipe {
    type Output = Result<(), h2::Error>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        self.poll_all(cx)
    }
}

/// How much of so much may be sent, once it is anything.
pub(super) fn poll_room(
    to: &mut SendStream<Bytes>,
    wanted: usize,
    cx: &mut Context<'_>,
) -> Poll<Result<usize, h2::Error>> {
    let wanted = wanted.min(CLAIM);
    if to.capacity() < wanted {
        to.reserve_capacity(wanted);
    }
    while to.capacity() == 0 {
        match ready!(to.poll_capacity(cx)) {
            Some(room) => room?,
            None => return Poll::Ready(Err(Reason::STREAM_CLOSED.into())),
        };
    }
    Poll::Ready(Ok(to.capacity().min(wanted)))
}

/// A body that broke off because its own stream was reset says what that said.
fn reason_of(error: &BoxError) -> Reason {
    let mut source: Option<&(dyn Error + 'static)> = Some(error.as_ref());
    while let Some(error) = source {
        if let Some(error) = error.downcast_ref::<h2::Error>() {
            return error.reason().unwrap_or(Reason::INTERNAL_ERROR);
        }
        source = error.source();
    }
    Reason::INTERNAL_ERROR
}
