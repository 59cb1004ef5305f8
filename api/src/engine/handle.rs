//! The API's side of the engine: say what changed, and wait until the engine says that something came of it.
//!
//! Commands carry no data: what is wanted is in the store. So a command that is lost or doubled does no harm.

use super::meters::{Meters, VmCounters};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;
use tapgate_datapath::{Counters, DatapathError};
use tapgate_model::{UserId, VmId};
use tokio::sync::{broadcast, mpsc, watch};
use tokio::time::{Instant, timeout_at};

/// Whose policy changed.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Scope {
    /// All of an account's VMs'.
    User(UserId),
    /// One VM's.
    Vm(VmId),
}

/// What the engine is to look at again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// The environment variables of an account.
    Env(UserId),
    /// The rules, modes or secrets.
    Policy(Scope),
    /// Snapshots that were deleted.
    Snapshots,
    /// A VM's record.
    Vm(VmId),
}

/// Changes that a slow listener may fall behind by; beyond it, it is told that it missed some.
const BEHIND: usize = 1024;

/// How long an answer to a change of policy waits until the change is in force; it takes milliseconds.
const IN_FORCE: Duration = Duration::from_secs(10);

/// A change of policy is stored, and does not hold yet.
#[derive(Debug, thiserror::Error)]
#[error("the change is stored, and is not in force yet: the daemon is busy or in trouble")]
pub struct NotInForce;

/// How many changes of policy were asked for, and how many are in force.
#[derive(Debug, Default)]
struct Policies {
    asked: Mutex<u64>,
    in_force: watch::Sender<u64>,
    /// Whether there is an engine to wait for.
    engine: AtomicBool,
}

/// Wakes the engine. Clones share the engine.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    changes: broadcast::Sender<VmId>,
    policies: Arc<Policies>,
    meters: Meters,
}

/// The engine's side: tells that a VM's recorded state changed.
#[derive(Clone, Debug)]
pub struct Notifier {
    changes: broadcast::Sender<VmId>,
    policies: Arc<Policies>,
    /// Where the API reads the engine's numbers.
    pub(super) meters: Meters,
}

impl Notifier {
    /// The VM's record changed.
    pub fn changed(&self, vm: VmId) {
        // Nobody waiting is fine.
        let _ = self.changes.send(vm);
    }

    /// So many more of the changes of policy, in the order in which they were asked for, are in force.
    pub fn policies_in_force(&self, more: u64) {
        self.policies.in_force.send_modify(|count| *count += more);
    }
}

/// Waits for changes of one VM, from the moment it was made.
#[derive(Debug)]
pub struct Watch {
    vm: VmId,
    changes: broadcast::Receiver<VmId>,
}

impl Watch {
    /// Waits for the next change; `false` when the deadline came first.
    pub async fn changed(&mut self, deadline: Instant) -> bool {
        loop {
            match timeout_at(deadline, self.changes.recv()).await {
                Ok(Ok(vm)) if vm == self.vm => return true,
                Ok(Ok(_)) => {}
                // Some were missed: look at the record, it may be ours.
                Ok(Err(broadcast::error::RecvError::Lagged(_))) => return true,
                Ok(Err(broadcast::error::RecvError::Closed)) | Err(_) => return false,
            }
        }
    }
}

impl Handle {
    /// A handle, and where its commands arrive.
    pub fn new() -> (Self, mpsc::UnboundedReceiver<Command>) {
        let (commands, arriving) = mpsc::unbounded_channel();
        let changes = broadcast::Sender::new(BEHIND);
        (Self { commands, changes, policies: Arc::default(), meters: Meters::default() }, arriving)
    }

    /// What the engine reports changes through.
    pub fn notifier(&self) -> Notifier {
        self.policies.engine.store(true, Ordering::Relaxed);
        Notifier {
            changes: self.changes.clone(),
            policies: self.policies.clone(),
            meters: self.meters.clone(),
        }
    }

    /// What the datapath counted for a VM; `None` while it has no gate (it does not run, or there is no engine).
    ///
    /// # Errors
    /// The kernel's maps cannot be read.
    pub async fn counters(&self, vm: &VmId) -> Result<Option<VmCounters>, DatapathError> {
        let (meters, vm) = (self.meters.clone(), vm.clone());
        off_the_runtime(move || meters.one(&vm)).await
    }

    /// The same for every VM that has a gate, in no order.
    ///
    /// # Errors
    /// The kernel's maps cannot be read.
    pub async fn all_counters(&self) -> Result<Vec<VmCounters>, DatapathError> {
        let meters = self.meters.clone();
        off_the_runtime(move || meters.all()).await
    }

    /// Frames from taps that no VM has: always dropped. `None` without an engine.
    ///
    /// # Errors
    /// The kernel's maps cannot be read.
    pub async fn stray_counters(&self) -> Result<Option<Counters>, DatapathError> {
        let meters = self.meters.clone();
        off_the_runtime(move || meters.stray()).await
    }

    /// A VM's record changed.
    pub fn wake(&self, vm: VmId) {
        self.send(Command::Vm(vm));
    }

    /// Rules, modes or secrets changed. Comes back when the change is in force on every VM, so that whoever was told
    /// that a rule is gone can rely on it.
    ///
    /// # Errors
    /// It takes too long. The change comes into force nevertheless, as soon as that can be.
    pub async fn policy_changed(&self, scope: Scope) -> Result<(), NotInForce> {
        let mut in_force = self.policies.in_force.subscribe();
        let number = {
            // Under the lock, so that numbers and commands have one order.
            let mut asked = self.policies.asked.lock().unwrap_or_else(PoisonError::into_inner);
            *asked += 1;
            self.send(Command::Policy(scope));
            *asked
        };
        if !self.policies.engine.load(Ordering::Relaxed) {
            return Ok(());
        }
        let reached = in_force.wait_for(|count| *count >= number);
        match tokio::time::timeout(IN_FORCE, reached).await {
            Ok(Ok(_)) => Ok(()),
            _ => {
                tracing::error!("policy.not_in_force");
                Err(NotInForce)
            }
        }
    }

    /// Snapshots were deleted.
    pub fn snapshots_deleted(&self) {
        self.send(Command::Snapshots);
    }

    /// Environment variables changed.
    pub fn env_changed(&self, user: UserId) {
        self.send(Command::Env(user));
    }

    fn send(&self, command: Command) {
        if self.commands.send(command).is_err() {
            // It is shutting down; at the next start it reads the store.
            tracing::debug!("the engine no longer takes commands");
        }
    }

    /// Watches a VM from now on. Make it before the change whose effect is waited for.
    pub fn watch(&self, vm: &VmId) -> Watch {
        Watch { vm: vm.clone(), changes: self.changes.subscribe() }
    }

    /// Waits until the engine reports a change of the VM, or the time is over.
    pub async fn settled(&self, vm: &VmId, timeout: Duration) -> bool {
        self.watch(vm).changed(Instant::now() + timeout).await
    }
}

/// A thousand VMs' maps take milliseconds to read.
async fn off_the_runtime<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(read).await {
        Ok(read) => read,
        // It is never cancelled while it runs; at shutdown nobody waits any more.
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => std::future::pending().await,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_watch_hears_its_own_vm_alone() {
        let (handle, mut commands) = Handle::new();
        let (mine, other) = (VmId::generate(), VmId::generate());
        let mut watch = handle.watch(&mine);
        handle.wake(mine.clone());
        assert_eq!(commands.recv().await, Some(Command::Vm(mine.clone())));
        handle.notifier().changed(other);
        assert!(!watch.changed(Instant::now()).await, "another VM's change is not ours");
        handle.notifier().changed(mine);
        assert!(watch.changed(Instant::now() + Duration::from_secs(60)).await);
    }

    #[tokio::test(start_paused = true)]
    async fn a_change_that_does_not_come_into_force_is_not_told_as_if_it_had() {
        let (handle, mut arriving) = Handle::new();
        let scope = || Scope::Vm(VmId::generate());
        assert!(handle.policy_changed(scope()).await.is_ok(), "there is nobody to wait for");
        let engine = handle.notifier();
        assert!(handle.policy_changed(scope()).await.is_err());
        // It is asked for all the same, and the next one is told when both are.
        engine.policies_in_force(2);
        let (told, ()) = tokio::join!(handle.policy_changed(scope()), async {
            tokio::time::sleep(IN_FORCE / 2).await;
            engine.policies_in_force(1);
        });
        assert!(told.is_ok() && std::iter::from_fn(|| arriving.try_recv().ok()).count() == 3);
    }
}
