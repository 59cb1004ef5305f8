//! Guests that are held while something of theirs is written. A daemon that is told to end waits for them, for nobody else would
//! let them go on.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

/// How many there are.
#[derive(Clone, Debug, Default)]
pub struct Held(Arc<AtomicUsize>);

impl Held {
    /// One more, until what comes back is dropped.
    pub(super) fn hold(&self) -> Hold {
        self.0.fetch_add(1, Ordering::SeqCst);
        Hold(self.0.clone())
    }

    /// Whether there are any.
    pub fn any(&self) -> bool {
        self.0.load(Ordering::SeqCst) > 0
    }
}

/// A guest that is held.
pub(super) struct Hold(Arc<AtomicUsize>);

impl Drop for Hold {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}
