//! The requests of one connection that are under way. One on which nothing moves for too long is ended here. And a guest that
//! reads nothing of an answer is not told when it is cut, for nothing asks for the next of its octets; that is noticed here
//! too, and the connection ended.

use crate::{
    audit::Counters,
    registry::{Registry, Ticket},
};
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

struct Exchange {
    ticket: Weak<Ticket>,
    moved: Arc<Counters>,
    /// What had moved when it was last looked at.
    before: Option<u64>,
}

/// The tickets of requests whose answers have not ended.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<Vec<Exchange>>);

impl UnderWay {
    fn lock(&self) -> MutexGuard<'_, Vec<Exchange>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes one more, until its ticket goes.
    pub(super) fn add(&self, ticket: &Arc<Ticket>, moved: Arc<Counters>) {
        let mut exchanges = self.lock();
        exchanges.retain(|exchange| exchange.ticket.strong_count() > 0);
        exchanges.push(Exchange { ticket: Arc::downgrade(ticket), moved, before: None });
    }

    fn is_empty(&self) -> bool {
        self.lock().iter().all(|exchange| exchange.ticket.strong_count() == 0)
    }

    fn any_cut(&self) -> bool {
        self.lock()
            .iter()
            .filter_map(|exchange| exchange.ticket.upgrade())
            .any(|ticket| ticket.revoked.is_cancelled())
    }

    /// Ends those on which nothing moved since the last look; whether there were any.
    fn end_still(&self) -> bool {
        let mut any = false;
        for exchange in self.lock().iter_mut() {
            let now = Some(exchange.moved.total());
            if exchange.before == now
                && let Some(ticket) = exchange.ticket.upgrade()
            {
                ticket.expire();
                any = true;
            }
            exchange.before = now;
        }
        any
    }

    /// Ends when there was none for so long; `begun` counts those that were begun so far.
    pub(super) async fn none_for(&self, patience: Duration, begun: &AtomicU64) {
        let mut before = 0;
        loop {
            tokio::time::sleep(patience).await;
            let now = begun.load(Ordering::Relaxed);
            if now == before && self.is_empty() {
                return;
            }
            before = now;
        }
    }

    /// Ends when one of them was cut, or did not move for so long, and is still there after a while.
    pub(super) async fn overdue(&self, live: &Registry, idle: Duration, patience: Duration) {
        let cut = async {
            let mut cuts = live.cuts();
            while cuts.changed().await.is_ok() {
                tokio::time::sleep(patience).await;
                if self.any_cut() {
                    return;
                }
            }
        };
        let still = async {
            loop {
                tokio::time::sleep(idle).await;
                if self.end_still() {
                    tokio::time::sleep(patience).await;
                    if self.any_cut() {
                        return;
                    }
                }
            }
        };
        tokio::select! {
            () = cut => {}
            () = still => {}
        }
    }
}
