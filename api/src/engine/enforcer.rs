//! The task that carries changes of policy to where they hold, and opens again what had to be closed.
//!
//! Owns what is still to be read. However often an account changes its policy, the others wait for one reading of it; a call to a VM
//! waits for none. Must never drop a change: what is put together is the same work, not less.

use super::{Scope, Shared, backoff::Backoff, policy};
use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};
use tapgate_model::UserId;
use tokio::sync::Notify;

/// What changed and is not in force yet.
#[derive(Debug, Default)]
pub(super) struct Changes {
    pending: Mutex<Pending>,
    told: Notify,
    closed: Notify,
}

/// Several changes as one piece of work.
#[derive(Debug, Default)]
struct Pending {
    /// Whose policies are to be read, each once.
    scopes: HashSet<Scope>,
    /// How many changes that answers.
    count: u64,
}

impl Changes {
    /// These policies are to be read again, for so many changes.
    pub(super) fn tell(&self, scopes: HashSet<Scope>, count: u64) {
        let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
        pending.scopes.extend(scopes);
        pending.count += count;
        self.told.notify_one();
    }

    /// A VM had to be closed, though the records may allow it something.
    pub(super) fn closed(&self) {
        self.closed.notify_one();
    }

    fn take(&self) -> Pending {
        std::mem::take(&mut self.pending.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Puts changes in force, until the daemon stops.
pub(super) async fn enforce(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = shared.changes.told.notified() => {}
        }
        tapgate_fault::mistake("policy.enforced");
        let Pending { scopes, count } = shared.changes.take();
        for scope in &scopes {
            policy::refresh(&shared, scope).await;
        }
        if count > 0 {
            shared.notifier.policies_in_force(count);
            // Secrets bring placeholders with them.
            shared.news.send_modify(|news| *news = news.wrapping_add(1));
        }
    }
}

/// Tries VMs that were closed for want of a policy again, until the daemon stops: the store may have been busy for a moment only.
pub(super) async fn reopen(shared: Arc<Shared>) {
    let mut backoff = Backoff::new();
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = shared.changes.closed.notified() => {}
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(backoff.pause()) => {}
        }
        let users = closed(&shared);
        for user in &users {
            policy::install(&shared, user, None).await;
        }
        // What could not be opened has asked for another try.
        if closed(&shared).is_empty() {
            backoff = Backoff::new();
        }
    }
}

fn closed(shared: &Shared) -> HashSet<UserId> {
    let gates = shared.gates();
    gates.of(None).filter(|(_, gated)| gated.policy.is_none()).map(|(_, gated)| gated.user.clone()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::VmId;

    #[test]
    fn ten_thousand_changes_of_one_account_are_one_reading_of_it() {
        let (busy, other) = (Scope::User(UserId::generate()), Scope::Vm(VmId::generate()));
        let changes = Changes::default();
        for _ in 0..10_000 {
            changes.tell([busy.clone()].into(), 1);
        }
        changes.tell([other.clone()].into(), 1);
        let taken = changes.take();
        assert_eq!((taken.scopes, taken.count), (HashSet::from([busy, other]), 10_001));
        assert_eq!(changes.take().count, 0);
    }
}
