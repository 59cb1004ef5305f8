//! The bounded queue between those who record and the one who writes.

use std::collections::{HashMap, VecDeque};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tapgate_model::{AuditEvent, VmId};
use tokio::sync::watch;

/// Events that may wait; at about 300 bytes each this is some 20 MiB.
const CAPACITY: usize = 65_536;
/// Events of one VM that may wait.
const SHARE: usize = 8_192;

#[derive(Default)]
struct State {
    events: VecDeque<AuditEvent>,
    waiting: HashMap<VmId, usize>,
    dropped: HashMap<VmId, u64>,
    /// Taken in so far.
    pushed: u64,
}

/// What the writer takes at once.
pub(super) struct Batch {
    pub(super) events: Vec<AuditEvent>,
    pub(super) dropped: HashMap<VmId, u64>,
}

pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    written: watch::Sender<u64>,
}

impl Queue {
    pub(super) fn new() -> Self {
        Self { state: Mutex::default(), filled: Condvar::new(), written: watch::Sender::new(0) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: AuditEvent) {
        let mut state = self.lock();
        let waiting = state.waiting.get(&event.vm).copied().unwrap_or(0);
        if state.events.len() >= CAPACITY || waiting >= SHARE {
            *state.dropped.entry(event.vm).or_default() += u64::from(event.count.max(1));
            return;
        }
        *state.waiting.entry(event.vm.clone()).or_default() += 1;
        state.events.push_back(event);
        state.pushed += 1;
        let first = state.events.len() == 1;
        drop(state);
        if first {
            self.filled.notify_one();
        }
    }

    /// Waits for events and takes up to `most`, with the counts of what was dropped so far.
    pub(super) fn take(&self, most: usize) -> Batch {
        let mut state = self.lock();
        while state.events.is_empty() && state.dropped.is_empty() {
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        let count = most.min(state.events.len());
        let events: Vec<_> = state.events.drain(..count).collect();
        for event in &events {
            if let Some(waiting) = state.waiting.get_mut(&event.vm) {
                *waiting -= 1;
                if *waiting == 0 {
                    state.waiting.remove(&event.vm);
                }
            }
        }
        Batch { events, dropped: std::mem::take(&mut state.dropped) }
    }

    /// Tells the waiting that this many more events can be read.
    pub(super) fn done(&self, count: usize) {
        self.written.send_modify(|written| *written += count as u64);
    }

    pub(super) fn pushed(&self) -> u64 {
        self.lock().pushed
    }

    pub(super) fn written(&self) -> watch::Receiver<u64> {
        self.written.subscribe()
    }

    /// Dropped and not yet in the database.
    pub(super) fn dropped(&self, vm: &VmId) -> u64 {
        self.lock().dropped.get(vm).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::{Mode, Protocol, Reason, UserId, Verdict};

    fn event(vm: &VmId) -> AuditEvent {
        AuditEvent {
            id: None,
            timestamp_us: 1,
            vm: vm.clone(),
            user: "usr_a".parse::<UserId>().unwrap(),
            host: None,
            address: None,
            port: None,
            protocol: Protocol::Tcp,
            verdict: Verdict::Deny { reason: Reason::NoRule },
            mode: Mode::Enforce,
            method: None,
            path: None,
            status: None,
            secrets: Vec::new(),
            secrets_withheld: Vec::new(),
            bytes_out: 0,
            bytes_in: 0,
            duration_ms: 0,
            count: 1,
        }
    }

    #[test]
    fn a_flood_takes_its_share_and_is_counted() {
        let queue = Queue::new();
        let (loud, quiet) = (VmId::generate(), VmId::generate());
        for _ in 0..SHARE + 100 {
            queue.push(event(&loud));
        }
        queue.push(event(&quiet));
        assert_eq!(queue.dropped(&loud), 100);
        assert_eq!(queue.dropped(&quiet), 0);
        let batch = queue.take(CAPACITY);
        assert_eq!(batch.events.len(), SHARE + 1);
        assert_eq!(batch.events.last().unwrap().vm, quiet);
        assert_eq!(batch.dropped[&loud], 100);
        queue.push(event(&loud));
        assert_eq!(queue.take(10).events.len(), 1, "room again once taken");
    }
}
