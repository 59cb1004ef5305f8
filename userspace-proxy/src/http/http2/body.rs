//! A body that comes on a stream. What is taken of it is given back to the sender's window at once: how much may wait elsewhere
//! is bounded there.

use super::{client::Sending, content_length, ping::Open};
use bytes::Bytes;
use h2::{Reason, RecvStream};
use http::HeaderMap;
use http_body::{Body, Frame, SizeHint};
use std::{
    pin::Pin,
    task::{Context, Poll, ready},
};

/// A request's or an answer's body.
pub(crate) struct Streamed {
    stream: RecvStream,
    /// What is left of the length that was announced.
    left: Option<u64>,
    data_done: bool,
    open: Open,
    /// Asks for the body, where its sender waits to be asked.
    ask: Option<Box<dyn FnOnce() + Send + Sync>>,
    /// The body of the request that this is the answer's of.
    sending: Option<Sending>,
}

impl Streamed {
    pub(super) fn new(stream: RecvStream, headers: &HeaderMap, open: Open) -> Self {
        let none = stream.is_end_stream().then_some(0);
        Self {
            left: content_length(headers).or(none),
            stream,
            data_done: false,
            open,
            ask: None,
            sending: None,
        }
    }

    /// Ends the request's body with this one, if it is dropped before its end.
    pub(super) fn answering(mut self, sending: Sending) -> Self {
        self.sending = Some(sending);
        self
    }

    /// Calls this when the body is wanted and has not come.
    pub(super) fn asking(mut self, ask: impl FnOnce() + Send + Sync + 'static) -> Self {
        self.ask = Some(Box::new(ask));
        self
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        // Its end may come after all that was announced, and is not always waited for.
        if (self.stream.is_end_stream() || self.left == Some(0))
            && let Some(sending) = &mut self.sending
        {
            sending.let_go();
        }
    }
}

/// A stream that its sender ended without an error is one that is not needed any more (RFC 9113 §8.1).
fn end(error: h2::Error) -> Option<Result<Frame<Bytes>, h2::Error>> {
    (error.reason() != Some(Reason::NO_ERROR)).then_some(Err(error))
}

impl Body for Streamed {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        if !self.data_done {
            let Poll::Ready(data) = self.stream.poll_data(cx) else {
                if let Some(ask) = self.ask.take() {
                    ask();
                }
                return Poll::Pending;
            };
            match data {
                Some(Ok(data)) => {
                    self.ask = None;
                    // It fails for a stream that is gone, which needs no window.
                    let _ = self.stream.flow_control().release_capacity(data.len());
                    self.left = self.left.map(|left| left.saturating_sub(data.len() as u64));
                    self.open.note();
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(end(error)),
                None => self.data_done = true,
            }
        }
        let trailers = ready!(self.stream.poll_trailers(cx));
        self.open.note();
        Poll::Ready(match trailers {
            Ok(trailers) => trailers.map(|trailers| Ok(Frame::trailers(trailers))),
            Err(error) => end(error),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
