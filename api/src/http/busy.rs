//! Whether anything goes on on a connection: a request counts from its head until the last octet of its answer.

use axum::body::{Body, Bytes, HttpBody};
use hyper::body::{Frame, SizeHint};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::watch;

/// The requests of one connection.
#[derive(Clone, Debug)]
pub(crate) struct Requests(watch::Sender<usize>);

/// One that goes on until it is dropped.
#[derive(Debug)]
pub(crate) struct Request(watch::Sender<usize>);

impl Requests {
    pub(crate) fn new() -> Self {
        Self(watch::Sender::new(0))
    }

    pub(crate) fn begin(&self) -> Request {
        self.0.send_modify(|count| *count += 1);
        Request(self.0.clone())
    }

    /// Returns when there was none for so long.
    pub(crate) async fn idle(&self, long: Duration) {
        let mut count = self.0.subscribe();
        loop {
            // The sender is this one: it is not gone.
            let _ = count.wait_for(|count| *count == 0).await;
            if tokio::time::timeout(long, count.changed()).await.is_err() {
                return;
            }
        }
    }
}

impl Request {
    /// The answer, with which the request ends.
    pub(crate) fn answered(self, response: axum::response::Response) -> axum::response::Response {
        response.map(|body| Body::new(Answer { body, _request: self }))
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

struct Answer {
    body: Body,
    _request: Request,
}

impl HttpBody for Answer {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
