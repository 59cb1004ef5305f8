//! Questions beyond what a VM may ask in a second: dropped before anything is made of them, for all VMs share the socket that they come
//! from; counted, and told once a second with their count.

use super::answer::Asker;
use crate::rate::Rate;
use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

/// How long is counted before it is told.
const TOLD: Duration = Duration::from_secs(1);

/// The questions of one VM.
pub(crate) struct Questions {
    rate: Rate,
    dropped: AtomicU32,
}

impl Questions {
    /// None asked yet.
    pub(crate) fn new(per_second: u32) -> Self {
        Self { rate: Rate::new(per_second), dropped: AtomicU32::new(0) }
    }
}

/// Whether the question may be looked at.
pub(crate) fn admit(asker: &Asker<'_>) -> bool {
    let per_second = asker.entry.dns_per_second();
    if asker.entry.questions.rate.take(per_second, Instant::now()) {
        return true;
    }
    if asker.entry.questions.dropped.fetch_add(1, Ordering::Relaxed) == 0 {
        tell_soon(asker);
    }
    false
}

/// One at a time for each VM.
fn tell_soon(asker: &Asker<'_>) {
    let (shared, entry, to): (Arc<_>, Arc<_>, SocketAddr) =
        (asker.shared.clone(), asker.entry.clone(), asker.to);
    asker.shared.tasks.spawn(async move {
        tokio::select! {
            () = tokio::time::sleep(TOLD) => {}
            () = shared.stop.cancelled() => {}
        }
        let count = entry.questions.dropped.swap(0, Ordering::Relaxed);
        Asker { shared: &shared, entry: &entry, to }.limited(count);
    });
}
