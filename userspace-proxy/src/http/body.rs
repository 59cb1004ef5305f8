//! Bodies on their way through: counted, cut when the rules change, cleaned. Nothing is gathered: frames go on as they come.

use super::{headers::strip_trailers, received::Received};
use crate::{
    audit::Record,
    registry::Ticket,
    secret::{clean::Cleaner, patterns::Patterns},
    table::VmEntry,
    throttle::Pause,
    unread::Next,
};
use bytes::Bytes;
use http_body::{Frame, SizeHint};
use http_body_util::{BodyExt as _, Full, combinators::UnsyncBoxBody};
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tapgate_model::{Reason, Verdict};
use tokio_util::sync::WaitForCancellationFutureOwned;

/// How long the end of a message may be held back because values could be made of it and what follows.
pub(crate) const HELD_BACK: Duration = Duration::from_millis(50);

/// What goes wrong in a body.
pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
/// A body of either direction.
pub(crate) type Body = UnsyncBoxBody<Bytes, BoxError>;

/// Why a body ends before its trailers.
const UNREAD: &str = "heads and trailers of more than 64 MiB were not read";

/// A body that is there already.
pub(crate) fn full(bytes: Bytes) -> Body {
    Full::new(bytes).map_err(|never| match never {}).boxed_unsync()
}

/// A request's body: counted as it goes out, broken off when the rules no longer allow the request (its answer may be at a
/// standstill then), its trailers kept to what trailers may say.
pub(crate) struct Outgoing {
    inner: Received,
    revoked: Option<Revoked>,
    count: Arc<crate::audit::Counters>,
    entry: Arc<VmEntry>,
    pause: Pause,
    next: Next,
}

impl Outgoing {
    pub(crate) fn wrap(
        inner: Received,
        ticket: &Ticket,
        count: Arc<crate::audit::Counters>,
        entry: Arc<VmEntry>,
    ) -> Body {
        let revoked = (!http_body::Body::is_end_stream(&inner)).then(|| revoked(ticket));
        let next = entry.uploads.next();
        Self { inner, revoked, count, entry, pause: Pause::default(), next }.boxed_unsync()
    }
}

/// Ready when the rules no longer allow what was let out.
type Revoked = Pin<Box<WaitForCancellationFutureOwned>>;

fn revoked(ticket: &Ticket) -> Revoked {
    Box::pin(ticket.revoked.clone().cancelled_owned())
}

/// Whether it was revoked; said once.
fn poll_revoked(revoked: &mut Option<Revoked>, cx: &mut Context<'_>) -> Poll<BoxError> {
    let Some(waiting) = revoked else { return Poll::Pending };
    ready!(waiting.as_mut().poll(cx));
    *revoked = None;
    Poll::Ready("the rules no longer allow this request, or nothing moved on it".into())
}

fn add(count: &AtomicU64, frame: &Frame<Bytes>) {
    if let Some(data) = frame.data_ref() {
        count.fetch_add(data.len() as u64, Ordering::Relaxed);
    }
}

fn spend(entry: &VmEntry, frame: &Frame<Bytes>) -> Option<Duration> {
    entry.throttle.spend(frame.data_ref().map_or(0, Bytes::len), Instant::now())
}

impl http_body::Body for Outgoing {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(error) = poll_revoked(&mut self.revoked, cx) {
            return Poll::Ready(Some(Err(error)));
        }
        ready!(self.pause.poll(cx));
        let this = &mut *self;
        let mut frame = ready!(this.next.poll(Pin::new(&mut this.inner), cx));
        if let Some(Ok(frame)) = &mut frame {
            add(&self.count.out, frame);
            let pause = spend(&self.entry, frame);
            self.pause.begin(pause);
            if let Some(trailers) = frame.trailers_mut() {
                strip_trailers(trailers);
                if !self.entry.heads.take_head(trailers) {
                    return Poll::Ready(Some(Err(UNREAD.into())));
                }
            }
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.next.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A response's body: counted, and cut short when the rules no longer allow the request. Its end completes the audit
/// record.
pub(crate) struct Incoming {
    inner: Body,
    record: Option<Record>,
    revoked: Option<Revoked>,
    ticket: Option<Arc<Ticket>>,
    entry: Arc<VmEntry>,
    pause: Pause,
    next: Next,
}

impl Incoming {
    pub(crate) fn wrap(
        inner: Body,
        record: Record,
        ticket: Option<Arc<Ticket>>,
        entry: Arc<VmEntry>,
    ) -> Body {
        let revoked = ticket.as_deref().map(revoked);
        let pause = Pause::default();
        let next = entry.answers.next();
        Self { inner, record: Some(record), revoked, ticket, entry, pause, next }.boxed_unsync()
    }

    /// Hands the record over, as revoked if that was the end.
    fn complete(&mut self) {
        if let Some(mut record) = self.record.take()
            && self
                .ticket
                .as_ref()
                .is_some_and(|ticket| ticket.revoked.is_cancelled() && !ticket.is_expired())
        {
            record.verdict(Verdict::Deny { reason: Reason::Revoked });
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        self.complete();
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        if let Poll::Ready(error) = poll_revoked(&mut self.revoked, cx) {
            self.complete();
            return Poll::Ready(Some(Err(error)));
        }
        ready!(self.pause.poll(cx));
        let this = &mut *self;
        let mut frame = ready!(this.next.poll(Pin::new(&mut this.inner), cx));
        if let Some(Ok(frame)) = &mut frame {
            let pause = spend(&self.entry, frame);
            self.pause.begin(pause);
            if let Some(trailers) = frame.trailers_mut()
                && !self.entry.heads.take_head(trailers)
            {
                drop(self.record.take());
                return Poll::Ready(Some(Err(UNREAD.into())));
            }
        }
        match (&frame, &self.record) {
            (Some(Ok(frame)), Some(record)) => add(&record.counters.r#in, frame),
            _ => drop(self.record.take()),
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.next.is_empty() && self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// A body that is cleaned of real values, trailers included.
pub(crate) struct Cleaned {
    inner: Body,
    patterns: Arc<Patterns>,
    cleaner: Option<Cleaner>,
    after: Option<Frame<Bytes>>,
    /// Runs while the end of what was read is held back and nothing follows.
    patience: Pause,
}

impl Cleaned {
    pub(crate) fn wrap(inner: Body, patterns: Arc<Patterns>) -> Body {
        let cleaner = Some(Cleaner::new(patterns.clone()));
        Self { inner, patterns, cleaner, after: None, patience: Pause::default() }.boxed_unsync()
    }

    /// A message whose end is held back would wait for the next one, which may wait for its answer.
    fn poll_patience(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let Some(cleaner) = self.cleaner.as_mut().filter(|cleaner| cleaner.is_waiting()) else {
            return Poll::Pending;
        };
        if !self.patience.is_running() {
            self.patience.begin(Some(HELD_BACK));
        }
        ready!(self.patience.poll(cx));
        Poll::Ready(Some(Ok(Frame::data(cleaner.show().into()))))
    }

    /// What was held back, at the end of the data.
    fn rest(&mut self) -> Option<Bytes> {
        let rest = self.cleaner.take()?.finish();
        (!rest.is_empty()).then(|| rest.into())
    }
}

impl http_body::Body for Cleaned {
    type Data = Bytes;
    type Error = BoxError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        loop {
            if let Some(after) = self.after.take() {
                return Poll::Ready(Some(Ok(after)));
            }
            let Poll::Ready(frame) = Pin::new(&mut self.inner).poll_frame(cx) else {
                return self.poll_patience(cx);
            };
            self.patience = Pause::default();
            match frame {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        let last = self.inner.is_end_stream();
                        let Some(cleaner) = &mut self.cleaner else { continue };
                        let data = if last { cleaner.end_with(data) } else { cleaner.feed_bytes(data) };
                        if !data.is_empty() {
                            return Poll::Ready(Some(Ok(Frame::data(data))));
                        }
                    }
                    Err(mut frame) => {
                        if let Some(trailers) = frame.trailers_mut() {
                            super::response::clean_headers(trailers, &self.patterns);
                        }
                        match self.rest() {
                            Some(rest) => {
                                self.after = Some(frame);
                                return Poll::Ready(Some(Ok(Frame::data(rest))));
                            }
                            None => return Poll::Ready(Some(Ok(frame))),
                        }
                    }
                },
                // A body that breaks off says nothing of what was held back.
                Some(Err(error)) => {
                    self.cleaner = None;
                    return Poll::Ready(Some(Err(error)));
                }
                None => return Poll::Ready(self.rest().map(|rest| Ok(Frame::data(rest)))),
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        // An answer that is nothing but a head and its end stays that: gRPC takes an empty frame of data for a broken one.
        let held = self.cleaner.as_ref().is_some_and(|cleaner| !cleaner.is_empty());
        !held && self.after.is_none() && self.inner.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::substitute::tests::policy;
    use http::HeaderMap;
    use http_body_util::StreamBody;

    #[tokio::test]
    async fn a_cleaned_body_keeps_its_trailers_and_cleans_them() {
        let patterns = Patterns::new(policy(&[("s", "VALUE", &["*"])]).secrets.iter()).unwrap().unwrap();
        let mut trailers = HeaderMap::new();
        trailers.insert("x-sum", "VALUE".parse().unwrap());
        let frames = ["a VA", "LUE b VAL"].map(|text| Ok::<_, BoxError>(Frame::data(Bytes::from(text))));
        let frames = frames.into_iter().chain([Ok(Frame::trailers(trailers))]);
        let body = StreamBody::new(futures_util::stream::iter(frames)).boxed_unsync();
        let all = Cleaned::wrap(body, patterns).collect().await.unwrap();
        assert_eq!(all.trailers().unwrap()["x-sum"], "IRONSH_PROXY_s");
        assert_eq!(all.to_bytes(), "a IRONSH_PROXY_s b VAL");
    }
}
