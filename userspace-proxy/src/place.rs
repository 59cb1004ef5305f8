//! Places of which a VM has so many: each held by what takes it, and given back when that is gone.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many places are taken.
#[derive(Default)]
pub(crate) struct Places(Arc<AtomicUsize>);

/// One of them; given back on drop.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Places {
    /// One more, unless so many are taken.
    pub(crate) fn take(&self, most: usize) -> Option<Place> {
        let place = Place(self.0.clone());
        (self.0.fetch_add(1, Ordering::Relaxed) < most).then_some(place)
    }

    /// How many are taken.
    pub(crate) fn taken(&self) -> usize {
        self.0.load(Ordering::Relaxed)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}
