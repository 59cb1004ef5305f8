//! The bounded queue between those who record and the one who writes.
//!
//! A VM with many events waiting has equal ones counted on one of those that wait; with as many as its share, further ones
//! are dropped and counted. The share shrinks as the queue fills, and never to nothing: a VM that is quiet is always heard.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use tapgate_model::{AuditEvent, Note, Stage, VmId};
use tokio::sync::watch;

/// Events that may wait; at about 300 bytes each this is some 20 MiB.
const CAPACITY: usize = 65_536;
/// Events of one VM that may wait.
const SHARE: usize = 8_192;
/// A VM gets no more than this part of the room that is left.
const OF_ROOM: usize = 4;
/// What any VM may have waiting however full it is: with 8192 VMs, twice the capacity.
const OWN: usize = 16;
/// Events of one VM that wait before equal ones are merged.
const MERGE: usize = 1_024;

/// What the log took in since the start.
#[derive(Clone, Copy, Debug, Default)]
pub struct AuditLoad {
    /// Events that wait to be written.
    pub waiting: u64,
    /// Events written.
    pub written: u64,
    /// Attempts that are in no event.
    pub dropped: u64,
    /// Attempts that were counted on an event that waited.
    pub aggregated: u64,
}

/// What one VM has waiting.
#[derive(Default)]
struct Waiting {
    count: usize,
    /// Where an event that equal ones can be counted on waits, by the hash of what has to be equal.
    alike: HashMap<u64, u64>,
}

/// What of one VM is in no event, and not stored yet.
#[derive(Default)]
pub(super) struct Dropped {
    pub(super) count: u64,
    pub(super) note: Note,
}

impl Dropped {
    fn more(&mut self, vm: &VmId, count: u64, note: Note) {
        self.count += count;
        self.note.lost(note, vm, self.count);
    }
}

#[derive(Default)]
struct State {
    events: VecDeque<AuditEvent>,
    /// The place of the first event: how many were taken before it.
    taken: u64,
    waiting: HashMap<VmId, Waiting>,
    dropped: HashMap<VmId, Dropped>,
    /// Taken in so far.
    pushed: u64,
    dropped_in_all: u64,
    aggregated: u64,
}

/// What the writer takes at once.
pub(super) struct Batch {
    pub(super) events: Vec<AuditEvent>,
    pub(super) dropped: HashMap<VmId, Dropped>,
}

pub(super) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    written: watch::Sender<u64>,
    hasher: RandomState,
}

/// Whether one event may be counted on another: the same attempt again, and no one was told of an id.
fn alike(a: &AuditEvent, b: &AuditEvent) -> bool {
    a.id.is_none()
        && b.id.is_none()
        && a.vm == b.vm
        && (&a.host, a.address, a.port, a.protocol, a.mode)
            == (&b.host, b.address, b.port, b.protocol, b.mode)
        && (&a.verdict, &a.method, &a.path, a.status) == (&b.verdict, &b.method, &b.path, b.status)
        && (&a.secrets, &a.secrets_withheld) == (&b.secrets, &b.secrets_withheld)
}

/// Counts `more` on `event`.
fn merge(event: &mut AuditEvent, more: &AuditEvent) {
    event.count = event.count.max(1).saturating_add(more.count.max(1));
    event.bytes_in = event.bytes_in.saturating_add(more.bytes_in);
    event.bytes_out = event.bytes_out.saturating_add(more.bytes_out);
    event.duration_ms = event.duration_ms.max(more.duration_ms);
    event.note_down(Stage::Ended);
}

impl State {
    /// Answers whether nothing waited before.
    fn append(&mut self, event: AuditEvent) -> bool {
        self.waiting.entry(event.vm.clone()).or_default().count += 1;
        self.events.push_back(event);
        self.pushed += 1;
        self.events.len() == 1
    }

    fn lose(&mut self, vm: VmId, count: u64, note: Note) {
        self.dropped.entry(vm.clone()).or_default().more(&vm, count, note);
        self.dropped_in_all += count;
    }
}

impl Queue {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::default(),
            filled: Condvar::new(),
            written: watch::Sender::new(0),
            hasher: RandomState::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, event: AuditEvent) {
        let mut guard = self.lock();
        let state = &mut *guard;
        let room = CAPACITY.saturating_sub(state.events.len());
        let share = SHARE.min(room / OF_ROOM).max(OWN);
        let place = state.taken + state.events.len() as u64;
        let count = state.waiting.get(&event.vm).map_or(0, |waiting| waiting.count);
        if count >= MERGE
            && let Some(waiting) = state.waiting.get_mut(&event.vm)
        {
            let hash = self.hasher.hash_one((&event.host, event.address, event.port, event.path.as_deref()));
            let at =
                waiting.alike.get(&hash).and_then(|at| usize::try_from(at.checked_sub(state.taken)?).ok());
            if let Some(waits) = at.and_then(|at| state.events.get_mut(at))
                && alike(waits, &event)
            {
                merge(waits, &event);
                state.aggregated += u64::from(event.count.max(1));
                return;
            }
            if count < share {
                waiting.alike.insert(hash, place);
            }
        }
        if count >= share {
            return state.lose(event.vm, event.count.max(1).into(), event.note);
        }
        let first = state.append(event);
        drop(guard);
        if first {
            self.filled.notify_one();
        }
    }

    /// Takes in events however many wait: what a former daemon left.
    pub(super) fn restore(&self, events: Vec<AuditEvent>) {
        let mut state = self.lock();
        events.into_iter().for_each(|event| _ = state.append(event));
        drop(state);
        self.filled.notify_one();
    }

    /// Counts attempts that are in no event.
    pub(super) fn lose(&self, vm: VmId, count: u64, note: Note) {
        self.lock().lose(vm, count, note);
        self.filled.notify_one();
    }

    /// Waits for events and takes up to `most`, with the counts of what was dropped so far.
    pub(super) fn take(&self, most: usize) -> Batch {
        let mut guard = self.lock();
        while guard.events.is_empty() && guard.dropped.is_empty() {
            guard = self.filled.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
        let state = &mut *guard;
        let count = most.min(state.events.len());
        let events: Vec<_> = state.events.drain(..count).collect();
        state.taken += count as u64;
        for event in &events {
            if let Some(waiting) = state.waiting.get_mut(&event.vm) {
                waiting.count -= 1;
                if waiting.count == 0 {
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
        self.lock().dropped.get(vm).map_or(0, |dropped| dropped.count)
    }

    /// As [`Self::dropped`], of every VM.
    pub(super) fn dropped_all(&self) -> HashMap<VmId, u64> {
        self.lock().dropped.iter().map(|(vm, dropped)| (vm.clone(), dropped.count)).collect()
    }

    pub(super) fn load(&self) -> AuditLoad {
        let written = *self.written.borrow();
        let state = self.lock();
        AuditLoad {
            waiting: state.pushed.saturating_sub(written),
            written,
            dropped: state.dropped_in_all,
            aggregated: state.aggregated,
        }
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
            note: Note::default(),
        }
    }

    fn numbered(vm: &VmId, number: usize) -> AuditEvent {
        let path = Some(format!("/{number}"));
        AuditEvent { path, ..event(vm) }
    }

    #[test]
    fn a_flood_takes_its_share_and_is_counted() {
        let queue = Queue::new();
        let (loud, quiet) = (VmId::generate(), VmId::generate());
        for number in 0..SHARE + 100 {
            queue.push(numbered(&loud, number));
        }
        queue.push(event(&quiet));
        assert_eq!(queue.dropped(&loud), 100);
        assert_eq!(queue.dropped(&quiet), 0);
        assert_eq!(queue.load().dropped, 100);
        let batch = queue.take(CAPACITY);
        assert_eq!(batch.events.len(), SHARE + 1);
        assert_eq!(batch.events.last().unwrap().vm, quiet);
        assert_eq!(batch.dropped[&loud].count, 100);
        queue.push(event(&loud));
        assert_eq!(queue.take(10).events.len(), 1, "room again once taken");
    }

    #[test]
    fn equal_events_of_a_flood_are_counted_on_one() {
        let queue = Queue::new();
        let vm = VmId::generate();
        for _ in 0..100_000 {
            queue.push(AuditEvent { bytes_out: 3, ..event(&vm) });
        }
        queue.push(AuditEvent { status: Some(403), ..event(&vm) });
        let told = tapgate_model::EventId::generate();
        queue.push(AuditEvent { id: Some(told.clone()), ..event(&vm) });
        let batch = queue.take(CAPACITY);
        assert!(batch.dropped.is_empty());
        assert!(batch.events.len() <= MERGE + 3, "{}", batch.events.len());
        let attempts: u64 = batch.events.iter().map(|event| u64::from(event.count)).sum();
        assert_eq!(attempts, 100_002, "none is lost");
        let octets: u64 = batch.events.iter().map(|event| event.bytes_out).sum();
        assert_eq!(octets, 300_000);
        assert_eq!(batch.events.iter().filter(|event| event.id.as_ref() == Some(&told)).count(), 1);
        assert_eq!(queue.load().aggregated, 100_000 - MERGE as u64 - 1);
        // What was taken is never counted on.
        queue.push(event(&vm));
        assert_eq!(queue.take(10).events[0].count, 1);
    }

    #[test]
    fn a_quiet_vm_is_heard_through_many_floods() {
        let queue = Queue::new();
        for _ in 0..100 {
            let vm = VmId::generate();
            for number in 0..2 * SHARE {
                queue.push(numbered(&vm, number));
            }
        }
        let quiet = VmId::generate();
        for number in 0..OWN {
            queue.push(numbered(&quiet, number));
        }
        assert_eq!(queue.dropped(&quiet), 0);
    }
}
