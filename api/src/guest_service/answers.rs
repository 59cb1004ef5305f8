//! Long answers on their way to guests, user-data and an agent's task: one copy of each for each guest, however many of its connections
//! are answered and however slowly they read. Must never be built for more than a few guests at a time.

use crate::engine::{Guests, agents::AgentError};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tapgate_model::VmId;
use tokio::sync::{AcquireError, Semaphore, SemaphorePermit};

/// Texts that are built at one time; who waits is served in order.
const BUILDERS: usize = 2;

/// What is being sent.
pub(super) struct Answers {
    turns: Semaphore,
    user_data: Sent,
    tasks: Sent,
}

/// A shared text as the octets of a body.
pub(super) struct Octets(pub(super) Arc<str>);

impl AsRef<[u8]> for Octets {
    fn as_ref(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

impl Answers {
    pub(super) fn new() -> Self {
        Self { turns: Semaphore::new(BUILDERS), user_data: Sent::default(), tasks: Sent::default() }
    }

    /// The VM's user-data as it is now.
    pub(super) async fn user_data(&self, guests: &Guests, vm: &VmId) -> Result<Arc<str>, String> {
        let _turn = self.turn().await.map_err(|error| error.to_string())?;
        Ok(self.user_data.share(vm, guests.user_data(vm).await?.into()))
    }

    /// The task of the VM's agent as it is now, in JSON.
    pub(super) async fn task(&self, guests: &Guests, vm: &VmId) -> Result<Arc<str>, AgentError> {
        let _turn = self.turn().await.map_err(|error| AgentError::Internal(error.to_string()))?;
        Ok(self.tasks.share(vm, guests.task(vm).await?.into()))
    }

    async fn turn(&self) -> Result<SemaphorePermit<'_>, AcquireError> {
        self.turns.acquire().await
    }
}

/// The texts of one kind.
#[derive(Default)]
struct Sent(Mutex<HashMap<VmId, Weak<str>>>);

impl Sent {
    /// The copy that is being sent already, if it is the same.
    fn share(&self, vm: &VmId, text: Arc<str>) -> Arc<str> {
        let mut sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(same) = sent.get(vm).and_then(Weak::upgrade).filter(|same| *same == text) {
            return same;
        }
        sent.retain(|_, copy| copy.strong_count() > 0);
        sent.insert(vm.clone(), Arc::downgrade(&text));
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_has_one_copy_while_it_is_sent() {
        let (sent, vm, other) = (Sent::default(), VmId::generate(), VmId::generate());
        let first = sent.share(&vm, "text".into());
        assert!(Arc::ptr_eq(&first, &sent.share(&vm, "text".into())));
        assert!(!Arc::ptr_eq(&first, &sent.share(&other, "text".into())), "each guest its own");
        assert_eq!(&*sent.share(&vm, "news".into()), "news");
        drop(first);
        sent.share(&other, "text".into());
        assert_eq!(sent.0.lock().unwrap().len(), 1, "what was sent is forgotten");
    }
}
