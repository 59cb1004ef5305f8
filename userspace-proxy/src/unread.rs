//! What was passed to one side of a VM's connections and not yet written there: bounded for all of them together. Each piece
//! carries what it takes and gives it back when it is gone, wherever the library keeps it until then. Where all is taken the
//! next piece of content waits, and so does who sends it; a head is refused. Must never be taken for more than pieces in memory.

use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::PollSemaphore;

/// For all connections of a VM, each way, in octets.
const MOST: u32 = 64 * 1024 * 1024;

/// What a field takes in a map besides its text: at most so much, in octets.
const FIELD: usize = 128;
/// What a head takes besides its fields while it waits.
const HEAD: usize = 512;

/// How much of it a VM has left.
pub(crate) struct Unread(Arc<Semaphore>);

impl Default for Unread {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST as usize)))
    }
}

/// A piece of content with what it takes.
struct Piece {
    data: Bytes,
    _taken: OwnedSemaphorePermit,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

/// The next piece of one body, until there is room for it.
pub(crate) struct Next {
    left: PollSemaphore,
    waiting: Option<Bytes>,
}

impl Unread {
    /// Whether there is room for a head, or for trailers, right now. Its longest value carries what it takes.
    pub(crate) fn take_head(&self, head: &mut HeaderMap) -> bool {
        let fields = head.iter().map(|(name, value)| name.as_str().len() + value.len() + FIELD);
        let octets = fields.fold(HEAD, usize::saturating_add);
        let Some(longest) = head.values_mut().max_by_key(|value| value.len()) else { return true };
        let Some(taken) =
            u32::try_from(octets).ok().and_then(|n| self.0.clone().try_acquire_many_owned(n).ok())
        else {
            return false;
        };
        let data = Bytes::copy_from_slice(longest.as_bytes());
        let carrying = Bytes::from_owner(Piece { data, _taken: taken });
        let Ok(mut carrying) = HeaderValue::from_maybe_shared(carrying) else { return false };
        carrying.set_sensitive(longest.is_sensitive());
        *longest = carrying;
        true
    }

    /// For one body.
    pub(crate) fn next(&self) -> Next {
        Next { left: PollSemaphore::new(self.0.clone()), waiting: None }
    }
}

impl Next {
    /// Whether nothing waits here.
    pub(crate) fn is_empty(&self) -> bool {
        self.waiting.is_none()
    }

    /// The body's next frame, once there is room for it.
    pub(crate) fn poll<B>(
        &mut self,
        body: Pin<&mut B>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, B::Error>>>
    where
        B: Body<Data = Bytes>,
    {
        let data = match self.waiting.take() {
            Some(data) => data,
            None => match ready!(body.poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => data,
                    Err(other) => return Poll::Ready(Some(Ok(other))),
                },
                ended => return Poll::Ready(ended),
            },
        };
        if data.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(data))));
        }
        let octets = u32::try_from(data.len()).unwrap_or(MOST).min(MOST);
        let Poll::Ready(taken) = self.left.poll_acquire_many(cx, octets) else {
            self.waiting = Some(data);
            return Poll::Pending;
        };
        let data = match taken {
            Some(taken) => Bytes::from_owner(Piece { data, _taken: taken }),
            None => data,
        };
        Poll::Ready(Some(Ok(Frame::data(data))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt as _, Full};
    use std::task::Waker;

    #[tokio::test]
    async fn what_finds_no_room_waits_until_what_took_it_is_gone() {
        let unread = Unread::default();
        let most = Bytes::from(vec![0; MOST as usize]);
        let mut cx = Context::from_waker(Waker::noop());
        let (mut one, mut other) = (Full::new(most), Full::new(Bytes::from_static(b"next")));
        let (mut first, mut second) = (unread.next(), unread.next());
        let Poll::Ready(Some(Ok(held))) = first.poll(Pin::new(&mut one), &mut cx) else {
            panic!("there is room")
        };
        assert!(second.poll(Pin::new(&mut other), &mut cx).is_pending());
        assert!(!second.is_empty());
        // As a library may: it keeps a part of what it was given.
        let mut data = held.into_data().unwrap();
        let part = data.split_to(1);
        drop(data);
        assert!(second.poll(Pin::new(&mut other), &mut cx).is_pending());
        drop(part);
        let Poll::Ready(Some(Ok(next))) = second.poll(Pin::new(&mut other), &mut cx) else {
            panic!("given back")
        };
        assert_eq!(next.into_data().unwrap(), "next");
        assert!(second.is_empty() && other.frame().await.is_none());
    }
}
