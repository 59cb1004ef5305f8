//! Carries what only the kernel saw — denied and tolerated datagrams, refused connections, flows that a range allows — to
//! the audit log.
//!
//! The datapath tells the first of a kind at once and what follows once a second with its count; what it could not tell
//! apart any more it counts as lost. Must never block on the log, nor write what one VM tried into another's.

use super::Shared;
use std::{collections::HashSet, sync::Arc, time::Duration};
use tapgate_datapath::{DatapathError, Event, Events};
use tapgate_model::{AuditEvent, AuditSink as _, Verdict};
use tokio::sync::{mpsc, oneshot};

/// After the events could not be read.
const RETRY: Duration = Duration::from_secs(1);

/// For the VMs that ran under a former daemon to be taken up; one that hangs takes a quarter of a minute.
const FIRST_LOOK: Duration = Duration::from_secs(60);

/// Asks for all to be told that the VM of a slot has tried so far, and hears when it was.
#[derive(Debug)]
pub(super) struct Settle {
    slot: u32,
    done: oneshot::Sender<()>,
}
/// For that; it takes a few thousand system calls at worst.
const PATIENCE: Duration = Duration::from_secs(5);

/// Runs until the daemon stops, on a thread that may be held up: a look goes through every VM's counts.
pub(super) async fn pump(shared: Arc<Shared>, mut settle: mpsc::Receiver<Settle>) {
    // Until then the kernel keeps what they tried: it would be told of slots that are nobody's yet.
    tokio::select! {
        () = shared.stop.cancelled() => return,
        _ = tokio::time::timeout(FIRST_LOOK, shared.adopting.over()) => {}
    }
    // Both outlive a failure: what was taken of the kernel is there only once, and who waits is answered when all is told.
    let (mut events, mut waiting) = (None, Vec::new());
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            // Nothing is lost meanwhile: the kernel keeps the counts.
            done = read(&shared, &mut events, &mut settle, &mut waiting) => {
                if let Err(error) = done {
                    tracing::error!(%error, "events.not_read");
                }
            }
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

/// Comes back when everything that the VM of this slot has tried is told: before the slot and its counts go.
pub(super) async fn settle(shared: &Shared, slot: u32) {
    // Nothing is read before.
    tokio::select! {
        () = shared.stop.cancelled() => {}
        _ = tokio::time::timeout(FIRST_LOOK, shared.adopting.over()) => {}
    }
    let (done, heard) = oneshot::channel();
    let told = async {
        let _ = shared.settle.send(Settle { slot, done }).await;
        let _ = heard.await;
    };
    if tokio::time::timeout(PATIENCE, told).await.is_err() {
        tracing::warn!("events.not_settled: what a VM tried last may be missing in the log");
    }
}

async fn read(
    shared: &Shared,
    events: &mut Option<Events>,
    settle: &mut mpsc::Receiver<Settle>,
    waiting: &mut Vec<Settle>,
) -> Result<(), DatapathError> {
    let events = match events {
        Some(events) => events,
        None => events.insert(shared.datapath.events()?),
    };
    loop {
        // Who waited too long has gone on.
        waiting.retain(|settle| !settle.done.is_closed());
        if !waiting.is_empty() {
            // One look for all who wait by now: many VMs may end at a time.
            waiting.extend(std::iter::from_fn(|| settle.try_recv().ok()));
            let ends: HashSet<u32> = waiting.iter().map(|settle| settle.slot).collect();
            let mut told = Vec::new();
            let looked = events.rest(|slot| ends.contains(&slot), &mut told);
            told.iter().for_each(|event| record(shared, event));
            looked?;
            for settle in waiting.drain(..) {
                let _ = settle.done.send(());
            }
        }
        tokio::select! {
            event = events.next() => record(shared, &event?),
            Some(first) = settle.recv() => waiting.push(first),
        }
    }
}

fn record(shared: &Shared, event: &Event) {
    let vm = shared.gates().of_slot(event.slot, event.moment).cloned();
    let given_up = || shared.adopting.of_slot(event.slot);
    let Some(policy) = vm.map_or_else(given_up, |vm| shared.table.policy(&vm)) else {
        tracing::debug!(slot = event.slot, "events.slot_without_vm");
        return;
    };
    let mut verdict = event.verdict.clone();
    if let Verdict::Allow { rule: rule @ None, .. } = &mut verdict {
        // The datapath has no rules of a VM that was not taken up.
        *rule = policy.rules.cidr(event.destination).cloned();
    }
    let mut audit = AuditEvent::new(&policy, event.protocol, verdict, super::now_us());
    audit.address = Some(event.destination);
    audit.port = event.port;
    audit.count = event.count;
    shared.store.audit().record(audit);
}
