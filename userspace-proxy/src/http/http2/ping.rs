//! Whether the other side of a connection is still there: asked by a PING when nothing came for a while.

use h2::{Ping, PingPong};
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::time::{Instant, Sleep, sleep};

#[derive(Debug)]
struct Last {
    begun: Instant,
    /// When something came last, in milliseconds since the beginning.
    came: AtomicU64,
    streams: AtomicUsize,
}

/// What comes on one connection.
#[derive(Clone, Debug)]
pub(super) struct Activity(Arc<Last>);

impl Activity {
    /// Counts a stream as open until it is dropped.
    pub(super) fn open(&self) -> Open {
        self.0.streams.fetch_add(1, Ordering::Relaxed);
        Open(self.0.clone())
    }
}

/// Notes what comes on one stream.
#[derive(Debug)]
pub(super) struct Open(Arc<Last>);

impl Open {
    pub(super) fn note(&self) {
        self.0.note();
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.streams.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Last {
    fn note(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.came.store(now, Ordering::Relaxed);
    }

    fn came(&self) -> Instant {
        self.begun + Duration::from_millis(self.came.load(Ordering::Relaxed))
    }
}

/// When to ask, and how long to wait for the answer.
pub(super) struct Patience {
    pub interval: Duration,
    pub answer: Duration,
    /// Also while no stream is open.
    pub idle: bool,
}

/// Polled in the connection's own task.
pub(super) struct KeepAlive {
    pings: Option<PingPong>,
    patience: Patience,
    last: Arc<Last>,
    asked: bool,
    sleep: Pin<Box<Sleep>>,
}

impl KeepAlive {
    pub(super) fn new(pings: Option<PingPong>, patience: Patience) -> Self {
        let (came, streams) = (AtomicU64::new(0), AtomicUsize::new(0));
        let last = Arc::new(Last { begun: Instant::now(), came, streams });
        let sleep = Box::pin(sleep(patience.interval));
        Self { pings, patience, last, asked: false, sleep }
    }

    pub(super) fn activity(&self) -> Activity {
        Activity(self.last.clone())
    }

    /// Ready when there was no answer. A connection that ends says so itself.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Some(pings) = &mut self.pings else { return Poll::Pending };
        loop {
            if self.asked {
                match pings.poll_pong(cx) {
                    Poll::Ready(Ok(_)) => {
                        self.asked = false;
                        self.last.note();
                        self.sleep.as_mut().reset(Instant::now() + self.patience.interval);
                    }
                    Poll::Ready(Err(_)) => return Poll::Pending,
                    Poll::Pending => return self.sleep.as_mut().poll(cx),
                }
                continue;
            }
            ready!(self.sleep.as_mut().poll(cx));
            let (now, due) = (Instant::now(), self.last.came() + self.patience.interval);
            let open = self.patience.idle || self.last.streams.load(Ordering::Relaxed) > 0;
            if due > now {
                self.sleep.as_mut().reset(due);
            } else if !open {
                self.sleep.as_mut().reset(now + self.patience.interval);
            } else if pings.send_ping(Ping::opaque()).is_ok() {
                self.asked = true;
                self.sleep.as_mut().reset(now + self.patience.answer);
            } else {
                return Poll::Pending;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::future::poll_fn;
    use tokio::time::timeout;

    const PATIENCE: Patience =
        Patience { interval: Duration::from_millis(50), answer: Duration::from_millis(250), idle: true };

    #[tokio::test]
    async fn only_who_does_not_answer_is_given_up() {
        for there in [true, false] {
            let (ours, theirs) = tokio::io::duplex(4096);
            let (_requests, mut connection) = h2::client::handshake(ours).await.unwrap();
            let mut alive = KeepAlive::new(connection.ping_pong(), PATIENCE);
            let other = tokio::spawn(async move {
                let mut served = h2::server::handshake(theirs).await.unwrap();
                match there {
                    true => drop(served.accept().await),
                    false => std::future::pending().await,
                }
            });
            let given_up = poll_fn(|cx| {
                assert!(Pin::new(&mut connection).poll(cx).is_pending());
                alive.poll(cx)
            });
            let limit = Duration::from_secs(if there { 1 } else { 20 });
            assert_eq!(timeout(limit, given_up).await.is_ok(), !there);
            other.abort();
        }
    }

    #[tokio::test]
    async fn a_connection_at_rest_is_asked_only_where_that_is_wanted() {
        let (ours, _theirs) = tokio::io::duplex(4096);
        let (_requests, mut connection) = h2::client::handshake(ours).await.unwrap();
        let mut alive = KeepAlive::new(connection.ping_pong(), Patience { idle: false, ..PATIENCE });
        let activity = alive.activity();
        let mut given_up = poll_fn(|cx| {
            let _ = Pin::new(&mut connection).poll(cx);
            alive.poll(cx)
        });
        assert!(timeout(Duration::from_secs(1), &mut given_up).await.is_err());
        let _open = activity.open();
        timeout(Duration::from_secs(20), given_up).await.unwrap();
    }
}
