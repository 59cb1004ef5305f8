//! Carries what only the kernel saw — denied and tolerated datagrams, refused connections — to the audit log.
//!
//! The datapath limits each tap before its events get here and counts what that cost. Must never block on the log.

use super::Shared;
use std::sync::Arc;
use tapgate_datapath::Event;
use tapgate_model::{AuditEvent, AuditSink as _};

/// Runs until the daemon stops.
pub(super) async fn pump(shared: Arc<Shared>) {
    let mut events = match shared.datapath.events() {
        Ok(events) => events,
        Err(error) => {
            tracing::error!(%error, "events.unavailable");
            return;
        }
    };
    loop {
        let event = tokio::select! {
            () = shared.stop.cancelled() => return,
            event = events.next() => event,
        };
        match event {
            Ok(event) => record(&shared, event).await,
            Err(error) => {
                tracing::error!(%error, "events.ended");
                return;
            }
        }
    }
}

async fn record(shared: &Shared, event: Event) {
    let Some(vm) = shared.gates().of_slot(event.slot).cloned() else {
        tracing::debug!(slot = event.slot, "events.slot_without_vm");
        return;
    };
    let Some(policy) = shared.table.policy(&vm) else { return };
    let mut audit = AuditEvent::new(&policy, event.protocol, event.verdict, super::now_us());
    audit.address = Some(event.destination);
    audit.port = event.port;
    audit.count = event.count;
    shared.store.audit().record(audit);
}
