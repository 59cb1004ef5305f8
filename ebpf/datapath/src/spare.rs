//! A spare tap: made, and given its programs, before a VM asks for it.
//!
//! The kernel waits for every processor (an RCU grace period, 10 ms or more) whenever a link gets its first program in a
//! direction, so a VM that finds its tap ready starts some 25 ms sooner. A spare is down and has no entry in any map: if it
//! were up, its programs would drop everything. It goes with this process. Only for TCX: filters of clsact do not wait.

use crate::{Attachment, DatapathError, Shared, hook, world};
use std::{
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tapgate_ebpf_common::net::GATEWAY_MAC;
use tapgate_netns::{Rtnl, Tap};

/// After a failure; the next VM makes its tap itself.
const PAUSE: Duration = Duration::from_secs(5);
/// Never the same twice in one process; what another one left is gone.
static NEXT: AtomicU32 = AtomicU32::new(0);

/// One that is ready.
#[derive(Debug)]
pub(crate) struct Spare {
    pub tap: Tap,
    pub index: u32,
    name: String,
}

/// Keeps one ready until it is aborted.
pub(crate) async fn run(shared: Arc<Shared>) {
    if shared.attachment != Attachment::Tcx {
        return;
    }
    loop {
        let missing = shared.spare().is_none();
        match if missing { make(&shared).await.map(Some) } else { Ok(None) } {
            Ok(Some(made)) => *shared.spare() = Some(made),
            Ok(None) => shared.spare_taken.notified().await,
            Err(error) => {
                tracing::debug!(%error, "no spare tap could be made");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn make(shared: &Arc<Shared>) -> Result<Spare, DatapathError> {
    let name = format!("{}{}", hook::SPARE, NEXT.fetch_add(1, Ordering::Relaxed));
    let tap = Tap::create(&shared.egress, &name)?;
    let inside = Rtnl::connect(&shared.egress)?;
    let index = inside.link(&name).await?;
    inside.configure_link(index, Some(GATEWAY_MAC), world::MTU).await?;
    let spare = Spare { tap, index, name };
    let shared = Arc::clone(shared);
    let attached = tokio::task::spawn_blocking(move || {
        // Held until it is over: a teardown waits here, and takes the programs with it.
        let mut programs = shared.programs();
        let Some(programs) = programs.as_mut() else { return Ok(None) };
        let Shared { attachment, egress, pins, .. } = &*shared;
        let attached = hook::attach(*attachment, programs, egress, pins, &spare.name, &spare.name);
        // Half of it would stay pinned, and more with each attempt.
        attached.or_else(|error| hook::unpin(pins, &spare.name).and(Err(error)))?;
        Ok(Some(spare))
    });
    let closed = || DatapathError::Config("the datapath is being removed".into());
    attached.await.map_err(|_| closed())?.and_then(|spare| spare.ok_or_else(closed))
}

impl Spare {
    /// Makes it the tap of a slot: its name, its pins. The link is still down.
    pub(crate) async fn become_tap(
        self,
        shared: &Shared,
        inside: &Rtnl,
        slot: u32,
        link: &str,
    ) -> Result<(Tap, u32), DatapathError> {
        let renamed = match inside.rename_link(self.index, link).await {
            Ok(()) => hook::rename(&shared.pins, &self.name, &slot.to_string()),
            Err(error) => Err(error.into()),
        };
        if let Err(error) = renamed {
            hook::unpin(&shared.pins, &self.name)?;
            return Err(error);
        }
        Ok((self.tap, self.index))
    }
}

impl Shared {
    pub(crate) fn spare(&self) -> std::sync::MutexGuard<'_, Option<Spare>> {
        self.spare.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the spare, if there is one. Another is made once [`Shared::replace_spare`] says so.
    pub(crate) fn take_spare(&self) -> Option<Spare> {
        self.spare().take()
    }

    /// Has another made when what it answers is dropped, which is when the VM has its gate: making one holds the kernel's lock of
    /// all links, which that waits for too.
    pub(crate) fn replace_spare(&self) -> impl Drop {
        struct Replaces<'a>(&'a Shared);
        impl Drop for Replaces<'_> {
            fn drop(&mut self) {
                self.0.spare_taken.notify_one();
            }
        }
        Replaces(self)
    }
}
