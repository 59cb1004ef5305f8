//! User-data on its way to guests: one copy for each guest, however many of its connections are answered and however slowly
//! they read. Must never be built for more than a few guests at a time.

use crate::engine::Guests;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};
use tapgate_model::VmId;
use tokio::sync::Semaphore;

/// Texts that are built at one time; who waits is served in order.
const BUILDERS: usize = 2;

/// What is being sent.
pub(super) struct Answers {
    turns: Semaphore,
    sent: Mutex<HashMap<VmId, Weak<str>>>,
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
        Self { turns: Semaphore::new(BUILDERS), sent: Mutex::default() }
    }

    /// The VM's user-data as it is now.
    pub(super) async fn of(&self, guests: &Guests, vm: &VmId) -> Result<Arc<str>, String> {
        let _turn = self.turns.acquire().await.map_err(|error| error.to_string())?;
        Ok(self.share(vm, guests.user_data(vm).await?.into()))
    }

    /// The copy that is being sent already, if it is the same.
    fn share(&self, vm: &VmId, text: Arc<str>) -> Arc<str> {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
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
        let (answers, vm, other) = (Answers::new(), VmId::generate(), VmId::generate());
        let first = answers.share(&vm, "text".into());
        assert!(Arc::ptr_eq(&first, &answers.share(&vm, "text".into())));
        assert!(!Arc::ptr_eq(&first, &answers.share(&other, "text".into())), "each guest its own");
        assert_eq!(&*answers.share(&vm, "news".into()), "news");
        drop(first);
        answers.share(&other, "text".into());
        assert_eq!(answers.sent.lock().unwrap().len(), 1, "what was sent is forgotten");
    }
}
