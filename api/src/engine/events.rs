//! Carries what only the kernel saw — denied and tolerated datagrams, refused connections, flows that a range allows — to
//! the audit log.
//!
//! The datapath tells the first of a kind at once and what follows once a second with its count; what it could not tell
//! apart any more it counts as lost. Must never block on the log.

use super::Shared;
use std::{sync::Arc, time::Duration};
use tapgate_datapath::{DatapathError, Event};
use tapgate_model::{AuditEvent, AuditSink as _};

/// After the events could not be read.
const RETRY: Duration = Duration::from_secs(1);

/// Runs until the daemon stops.
pub(super) async fn pump(shared: Arc<Shared>) {
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            // Nothing is lost meanwhile: the kernel keeps the counts.
            done = read(&shared) => if let Err(error) = done { tracing::error!(%error, "events.not_read") },
        }
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(RETRY) => {}
        }
    }
}

async fn read(shared: &Shared) -> Result<(), DatapathError> {
    let mut events = shared.datapath.events()?;
    loop {
        record(shared, &events.next().await?);
    }
}

fn record(shared: &Shared, event: &Event) {
    let Some(vm) = shared.gates().of_slot(event.slot).cloned() else {
        tracing::debug!(slot = event.slot, "events.slot_without_vm");
        return;
    };
    let Some(policy) = shared.table.policy(&vm) else { return };
    let mut audit = AuditEvent::new(&policy, event.protocol, event.verdict.clone(), super::now_us());
    audit.address = Some(event.destination);
    audit.port = event.port;
    audit.count = event.count;
    shared.store.audit().record(audit);
}
