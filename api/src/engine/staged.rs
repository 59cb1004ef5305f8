//! The room that staged copies are promised, each from before it is begun until it is stored or removed. Nothing is staged before it
//! is known what a former daemon left. Never touches a file.

use crate::promised::Promise;
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};
use tapgate_model::SnapshotId;
use tokio_util::sync::CancellationToken;

/// The promises.
#[derive(Debug, Default)]
pub(super) struct Staged {
    promises: Mutex<HashMap<SnapshotId, Promise>>,
    opened: CancellationToken,
}

impl Staged {
    /// What was left is known.
    pub(super) fn open(&self) {
        self.opened.cancel();
    }

    /// Comes back once it is.
    pub(super) async fn opened(&self) {
        self.opened.cancelled().await;
    }

    /// Keeps the promise for as long as the snapshot is staged.
    pub(super) fn keep(&self, snapshot: &SnapshotId, promise: Promise) {
        self.all().insert(snapshot.clone(), promise);
    }

    /// The copy is made, and it is known now what it takes until it is stored.
    pub(super) fn is(&self, snapshot: &SnapshotId, octets: u64) {
        if let Some(promise) = self.all().get(snapshot) {
            promise.is(octets);
        }
    }

    /// Asks about the promise; one that is not staged has none.
    pub(super) fn ask<T>(&self, snapshot: &SnapshotId, about: impl FnOnce(&Promise) -> T) -> Option<T> {
        self.all().get(snapshot).map(about)
    }

    /// Nothing is left of it.
    pub(super) fn gone(&self, snapshot: &SnapshotId) {
        // Not while all are held: who waits for room looks at once.
        let gone = self.all().remove(snapshot);
        drop(gone);
    }

    fn all(&self) -> MutexGuard<'_, HashMap<SnapshotId, Promise>> {
        self.promises.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
