//! The trait that every driver fulfils. No way to boot or adopt a VM leads past a gate.

use crate::spec::{Exit, Handle, MemorySnapshot, Observed, Place, SnapshotInfo, Suspended, VmSpec, VmmError};
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;
use tapgate_datapath::Gate;
use tapgate_netns::Netns;
use tokio::sync::watch;

/// A boxed future, so that drivers can be chosen at run time.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// A way to run VMs.
pub trait Vmm: Send + Sync {
    /// `qemu`, `netns`, …
    fn name(&self) -> &'static str;

    /// Makes the VM's disk if it has none, where that takes as long as copying it does. A caller that gives up ends the work.
    fn prepare<'a>(&'a self, _spec: &'a VmSpec) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(std::future::ready(Ok(())))
    }

    /// Boots the VM. Needs the gate of this very VM: the proof that its programs are attached.
    fn boot<'a>(&'a self, spec: &'a VmSpec, gate: Gate) -> BoxFuture<'a, Result<Box<dyn Running>, VmmError>>;

    /// Takes a VM over that an earlier daemon booted. [`VmmError::Gone`] if it has ended since.
    fn adopt<'a>(
        &'a self,
        spec: &'a VmSpec,
        handle: &'a Handle,
        gate: Gate,
    ) -> BoxFuture<'a, Result<Box<dyn Running>, VmmError>>;

    /// Ends what the handle means, if it is still there, without taking it over: for VMs that cannot be adopted.
    fn discard<'a>(&'a self, place: &'a Place, handle: &'a Handle) -> BoxFuture<'a, Result<(), VmmError>>;

    /// Ends what a boot that was cut off or given up left, noted or not, once its work has ended. Nothing there is no error; that
    /// something may still run is one.
    fn sweep<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<(), VmmError>>;
}

/// A VM that runs. Dropping it leaves the VM alone: it goes on without a daemon.
pub trait Running: Send + Sync {
    /// What finds it again.
    fn handle(&self) -> &Handle;

    /// Its gate, for as long as it runs.
    fn gate(&self) -> &Gate;

    /// What is seen of it: reboots, its end.
    fn observed(&self) -> watch::Receiver<Observed>;

    /// Asks the guest to shut down; after `grace` ends it. Comes back when it has ended.
    fn shutdown(&self, grace: Duration) -> BoxFuture<'_, Result<Exit, VmmError>>;

    /// Copies the disk, as it is now, to a new file, while the guest runs on. See [`crate::VmSpec::snapshot`].
    fn snapshot<'a>(&'a self, _to: &'a Path) -> BoxFuture<'a, Result<SnapshotInfo, VmmError>> {
        Box::pin(async { Err(VmmError::Unsupported { what: "take snapshots" }) })
    }

    /// Whether the guest may be held while its disk is copied: a copy that was begun is not to be given up then.
    fn holds_for_snapshots(&self) -> bool {
        false
    }

    /// The same, and its memory of the same moment to another new file.
    fn snapshot_memory<'a>(
        &'a self,
        _disk: &'a Path,
        _memory: &'a Path,
    ) -> BoxFuture<'a, Result<MemorySnapshot, VmmError>> {
        Box::pin(async { Err(VmmError::Unsupported { what: "keep a guest's memory" }) })
    }

    /// Writes its memory into its folder and ends it: the next boot goes on from there, once. An error leaves it running.
    fn suspend(&self) -> BoxFuture<'_, Result<Suspended, VmmError>> {
        Box::pin(async { Err(VmmError::Unsupported { what: "suspend VMs" }) })
    }

    /// Whether the VMM still does its work: an error is that it does not. The caller sets the limit.
    fn check(&self) -> BoxFuture<'_, Result<(), VmmError>> {
        let stopped = self.handle().process.is_stopped();
        Box::pin(std::future::ready(match stopped {
            true => Err(VmmError::Control("its process was stopped by a signal".into())),
            false => Ok(()),
        }))
    }

    /// Ends it at once.
    fn kill(&self) -> BoxFuture<'_, Result<Exit, VmmError>>;

    /// Comes back when its SSH server answers, asked from the egress namespace. Never gives up: the caller sets the limit.
    fn ready<'a>(&'a self, egress: &'a Netns) -> BoxFuture<'a, ()> {
        Box::pin(async move { crate::ready::ssh(egress, &self.gate().net()).await })
    }

    /// Waits for its end.
    fn wait(&self) -> BoxFuture<'_, Exit> {
        let mut observed = self.observed();
        Box::pin(async move {
            match observed.wait_for(|seen| seen.exit.is_some()).await {
                Ok(seen) => seen.exit.as_deref().cloned().unwrap_or(Exit::Stopped),
                Err(_) => Exit::Crashed("its supervisor ended".into()),
            }
        })
    }
}
