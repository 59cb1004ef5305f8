//! Work for a VM that is given up when its records ask for something else: a disk is fetched for an hour at most, and whoever stops
//! the VM is not to wait for that. What such work leaves running ends by itself and is waited for where the VM is released. Must
//! never give up for less: a look at the records that fails is made again.

use super::Shared;
use std::time::Duration;
use tapgate_store::{StoreError, VmRecord};
use tokio::sync::Notify;

/// After the records could not be read.
const RETRY: Duration = Duration::from_secs(1);

/// What came of the work; nothing where the VM is to be in another state than this record says.
pub(super) async fn unless_called<T>(
    shared: &Shared,
    record: &VmRecord,
    waker: &Notify,
    work: impl Future<Output = T>,
) -> Option<T> {
    tokio::select! {
        done = work => Some(done),
        () = called(shared, record, waker) => None,
    }
}

async fn called(shared: &Shared, record: &VmRecord, waker: &Notify) {
    loop {
        waker.notified().await;
        let now = loop {
            match shared.store.vm_any(&record.id).await {
                Ok(now) => break now,
                Err(StoreError::NotFound(_)) => return,
                Err(error) => {
                    tracing::error!(vm = %record.id, %error, "vm.record_unreadable");
                    tokio::time::sleep(RETRY).await;
                }
            }
        };
        if now.detail != record.detail {
            return;
        }
    }
}
