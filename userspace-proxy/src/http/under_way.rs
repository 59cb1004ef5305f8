//! The requests of one connection that are under way. A guest that reads nothing of an answer is not told when the rules cut
//! it, for nothing asks for the next of its octets; that is noticed here, and the connection ended.

use crate::registry::{Registry, Ticket};
use std::{
    sync::{Arc, Mutex, PoisonError, Weak},
    time::Duration,
};

/// The tickets of requests whose answers have not ended.
#[derive(Default)]
pub(super) struct UnderWay(Mutex<Vec<Weak<Ticket>>>);

impl UnderWay {
    /// Notes one more, until its ticket goes.
    pub(super) fn add(&self, ticket: &Arc<Ticket>) {
        let mut tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.retain(|ticket| ticket.strong_count() > 0);
        tickets.push(Arc::downgrade(ticket));
    }

    fn any_cut(&self) -> bool {
        let tickets = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        tickets.iter().filter_map(Weak::upgrade).any(|ticket| ticket.revoked.is_cancelled())
    }

    /// Ends when one of them was cut and is still there after a while.
    pub(super) async fn overdue(&self, live: &Registry, patience: Duration) {
        let mut cuts = live.cuts();
        while cuts.changed().await.is_ok() {
            tokio::time::sleep(patience).await;
            if self.any_cut() {
                return;
            }
        }
    }
}
