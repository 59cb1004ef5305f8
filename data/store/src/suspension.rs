//! Whether a VM's memory is kept, as the records have it. Whether there is one says its folder; both must.

use crate::error::Result;
use crate::store::Store;
use crate::time::now_us;
use rusqlite::params;
use tapgate_model::{StatusDetail, VmId};

/// Whether a VM's memory is kept for its next start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Suspension {
    /// It is not.
    #[default]
    None,
    /// A user asked for it, and it is not whole yet.
    Wanted,
    /// It is whole, and was not used.
    Kept,
    /// There is one of another VM, which this one is a clone of; it was not used.
    Cloned,
}

impl Suspension {
    pub(crate) const fn word(self) -> Option<&'static str> {
        match self {
            Self::None => None,
            Self::Wanted => Some("wanted"),
            Self::Kept | Self::Cloned => Some("kept"),
        }
    }

    pub(crate) fn from_columns(word: Option<&str>, clone: bool) -> Self {
        match word {
            Some("wanted") => Self::Wanted,
            Some("kept") if clone => Self::Cloned,
            Some("kept") => Self::Kept,
            _ => Self::None,
        }
    }
}

impl Store {
    /// The engine's report that a VM whose suspension was asked for has ended and its memory is whole. What runs in it goes
    /// on later, so its agent's state stays.
    pub async fn vm_suspended(&self, vm: &VmId) -> Result<()> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                let changed = tx.execute(
                    "UPDATE vms SET detail = 'stopped', suspension = 'kept', updated_at = max(?2, created_at)
                     WHERE id = ?1 AND detail = 'stopping' AND suspension = 'wanted'",
                    params![vm.as_str(), now_us()],
                )?;
                match changed {
                    0 => Ok(()),
                    _ => crate::snapshots::follow(tx, &vm, StatusDetail::Stopped),
                }
            })
            .await
    }

    /// The engine's report that a VM could not be suspended and runs on: the user's call is taken back.
    pub async fn vm_not_suspended(&self, vm: &VmId, reason: String) -> Result<()> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                tx.execute(
                    "UPDATE vms SET detail = 'running', desired = 'running', suspension = NULL, suspend_failure = ?2,
                            updated_at = max(?3, created_at)
                     WHERE id = ?1 AND detail = 'stopping' AND suspension = 'wanted'",
                    params![vm.as_str(), reason, now_us()],
                )?;
                Ok(())
            })
            .await
    }

    /// The engine's report that a VM has no memory to go on with any more: used, or lost for this reason.
    pub async fn vm_memory_gone(&self, vm: &VmId, lost: Option<String>) -> Result<()> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                tx.execute(
                    "UPDATE vms SET suspension = NULL, suspend_failure = ?2, clone = 0 WHERE id = ?1",
                    params![vm.as_str(), lost],
                )?;
                Ok(())
            })
            .await
    }
}
