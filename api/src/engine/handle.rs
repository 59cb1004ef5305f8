//! The API's side of the engine: say what changed, and wait until the engine says that something came of it.
//!
//! Commands carry no data: what is wanted is in the store. So a command that is lost or doubled does no harm.

use std::time::Duration;
use tapgate_model::{UserId, VmId};
use tokio::sync::{broadcast, mpsc};
use tokio::time::{Instant, timeout_at};

/// Whose policy changed.
#[derive(Clone, Debug, PartialEq, Eq)]
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
    /// A VM's record.
    Vm(VmId),
}

/// Changes that a slow listener may fall behind by; beyond it, it is told that it missed some.
const BEHIND: usize = 1024;

/// Wakes the engine. Clones share the engine.
#[derive(Clone, Debug)]
pub struct Handle {
    commands: mpsc::UnboundedSender<Command>,
    changes: broadcast::Sender<VmId>,
}

/// The engine's side: tells that a VM's recorded state changed.
#[derive(Clone, Debug)]
pub struct Notifier(broadcast::Sender<VmId>);

impl Notifier {
    /// The VM's record changed.
    pub fn changed(&self, vm: VmId) {
        // Nobody waiting is fine.
        let _ = self.0.send(vm);
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
        (Self { commands, changes: broadcast::Sender::new(BEHIND) }, arriving)
    }

    /// What the engine reports changes through.
    pub fn notifier(&self) -> Notifier {
        Notifier(self.changes.clone())
    }

    /// A VM's record changed.
    pub fn wake(&self, vm: VmId) {
        self.send(Command::Vm(vm));
    }

    /// Rules, modes or secrets changed.
    pub fn policy_changed(&self, scope: Scope) {
        self.send(Command::Policy(scope));
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
}
