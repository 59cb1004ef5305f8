//! VM records: what was asked for, what the engine made of it, and the one place where a state changes.

mod create;
mod record;

pub(crate) use create::insert;
pub use create::{Capacity, NewVm, SshPorts};
#[cfg(test)]
pub(crate) use create::{DISK_TAKEN, HELD, LIVING, MEMORY_TAKEN};
pub use record::{CaPem, Desired, Resources, VmRecord};

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Page, PageRequest};
use crate::store::{Store, next_generation};
use crate::suspension::Suspension;
use crate::time::now_us;
use crate::users::id;
use record::{SELECT, find, read};
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use tapgate_model::lifecycle::{Answer, Call, decide, may_follow};
use tapgate_model::{Status, StatusDetail, UserId, VmId};
use zeroize::Zeroizing;

/// Which VMs to list.
#[derive(Clone, Debug, Default)]
pub struct VmFilter {
    /// Of this status.
    pub status: Option<Status>,
    /// In this state.
    pub detail: Option<StatusDetail>,
    /// Of exactly this name.
    pub name: Option<String>,
}

/// What VMs are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum VmSort {
    /// Creation.
    #[default]
    Created,
    /// Last change.
    Updated,
    /// Name.
    Name,
}

pub(crate) const LIVING_STATES: &str = "SELECT id, detail FROM vms WHERE detail <> 'destroyed'";

/// The VM if it is the user's; else the answer for one that never was.
pub(crate) fn owned(db: &Connection, user: &UserId, vm: &VmId) -> Result<VmRecord> {
    find(db, vm).and_then(
        |record| {
            if record.user == *user { Ok(record) } else { Err(StoreError::NotFound(Kind::Vm)) }
        },
    )
}

/// Acts on a user's call inside a transaction. Answers whether the state changed.
pub(crate) fn call(tx: &Transaction<'_>, vm: &VmRecord, call: Call) -> Result<bool> {
    let next = match decide(call, vm.detail) {
        Err(refusal) => return Err(Conflict::State(refusal).into()),
        Ok(Answer::Stay) => return Ok(false),
        Ok(Answer::Enter(next)) => next,
    };
    let desired = match call {
        Call::Destroy => Desired::Destroyed,
        Call::Stop | Call::Suspend => Desired::Stopped,
        Call::Start | Call::Snapshot => Desired::Running,
    };
    tx.execute(
        "UPDATE vms SET detail = ?2, desired = ?3, failure = NULL, updated_at = ?4 WHERE id = ?1",
        params![vm.id.as_str(), next.word(), desired.word(), now_us().max(vm.created_at)],
    )?;
    if call != Call::Start {
        // A start needs to know whether there is a memory; the engine notes when it was used.
        let wanted = if call == Call::Suspend { Suspension::Wanted } else { Suspension::None };
        tx.execute(
            "UPDATE vms SET suspension = ?2, suspend_failure = NULL, clone = 0 WHERE id = ?1",
            params![vm.id.as_str(), wanted.word()],
        )?;
    }
    crate::agents::follow(tx, &vm.id, next, None)?;
    if call == Call::Destroy {
        // Its rules' names are free at once; without them it may reach less, never more.
        tx.execute("DELETE FROM rules WHERE vm = ?1", [vm.id.as_str()])?;
        let generation = next_generation(tx)?;
        tx.execute(
            "UPDATE vms SET mode = NULL, generation = ?2 WHERE id = ?1",
            params![vm.id.as_str(), generation],
        )?;
    }
    Ok(true)
}

impl Store {
    /// Makes a VM's record in `creating`, with an address and an SSH port of its own.
    pub async fn vm_create(&self, new: NewVm) -> Result<VmRecord> {
        let store = self.clone();
        self.db.write(move |tx| insert(&store, tx, &new)).await
    }

    /// One VM of a user.
    pub async fn vm(&self, user: &UserId, vm: &VmId) -> Result<VmRecord> {
        let (user, vm) = (user.clone(), vm.clone());
        self.db.read(move |db| owned(db, &user, &vm)).await
    }

    /// One VM, whoever owns it: for the engine.
    pub async fn vm_any(&self, vm: &VmId) -> Result<VmRecord> {
        let vm = vm.clone();
        self.db.read(move |db| find(db, &vm)).await
    }

    /// Every VM that is not destroyed, and its state: for counting them.
    pub async fn vms_living_states(&self) -> Result<Vec<(VmId, StatusDetail)>> {
        self.db
            .read(|db| {
                let mut statement = db.prepare_cached(LIVING_STATES)?;
                let rows = statement.query_map([], |row| {
                    let detail: String = row.get("detail")?;
                    let detail = StatusDetail::from_word(&detail);
                    let bad = || rusqlite::Error::InvalidColumnName("detail".to_owned());
                    Ok((id(row, "id")?, detail.ok_or_else(bad)?))
                })?;
                Ok(rows.collect::<rusqlite::Result<_>>()?)
            })
            .await
    }

    /// Every VM that is not destroyed, whoever owns it: for the engine at start.
    pub async fn vms_living(&self) -> Result<Vec<VmRecord>> {
        self.db
            .read(|db| {
                let mut statement =
                    db.prepare_cached(&format!("{SELECT} WHERE detail <> 'destroyed' ORDER BY seq"))?;
                let vms = statement.query_map([], read)?.collect::<rusqlite::Result<_>>()?;
                Ok(vms)
            })
            .await
    }

    /// A user's VMs.
    pub async fn vms(
        &self,
        user: &UserId,
        filter: VmFilter,
        sort: VmSort,
        page: PageRequest,
    ) -> Result<Page<VmRecord>> {
        let (user, cursors) = (user.clone(), self.cursors.clone());
        self.db
            .read(move |db| {
                let scope = format!("vms\0{user}\0{filter:?}");
                let mut filters = vec![("user = ?", Value::Text(user.into()))];
                if let Some(status) = filter.status {
                    filters.push((states(status), Value::Null));
                }
                if let Some(detail) = filter.detail {
                    filters.push(("detail = ?", Value::Text(detail.word().into())));
                }
                if let Some(name) = filter.name {
                    filters.push(("name = ?", Value::Text(name)));
                }
                let sort = match sort {
                    VmSort::Created => "created_at",
                    VmSort::Updated => "updated_at",
                    VmSort::Name => "name",
                };
                Listing { select: SELECT, filters, sort, scope }.run(db, &cursors, &page, read)
            })
            .await
    }

    /// A user's call: checks that it is legal now and enters the next state, in one transaction. Answers the VM as it
    /// is afterwards and whether the engine has something to do.
    pub async fn vm_call(&self, user: &UserId, vm: &VmId, asked: Call) -> Result<(VmRecord, bool)> {
        self.vm_call_within(user, vm, asked, Capacity::default()).await
    }

    /// The same for a call that needs room on the host.
    pub async fn vm_call_within(
        &self,
        user: &UserId,
        vm: &VmId,
        asked: Call,
        capacity: Capacity,
    ) -> Result<(VmRecord, bool)> {
        let (user, vm) = (user.clone(), vm.clone());
        self.db
            .write(move |tx| {
                let record = owned(tx, &user, &vm)?;
                if asked == Call::Start && decide(asked, record.detail).is_ok() {
                    capacity.check_memory(tx, record.resources)?;
                }
                let changed = call(tx, &record, asked)?;
                Ok((find(tx, &vm)?, changed))
            })
            .await
    }

    /// The engine's report that a VM reached a state. Refused if it cannot follow the recorded one, as when a user's
    /// stop came in between. `failure` is kept with `failed` only.
    pub async fn vm_advance(&self, vm: &VmId, to: StatusDetail, failure: Option<String>) -> Result<VmRecord> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                let now = find(tx, &vm)?;
                if !may_follow(now.detail, to) {
                    return Err(StoreError::Illegal { from: now.detail.word(), to: to.word() });
                }
                let failure = failure.filter(|_| to == StatusDetail::Failed);
                if now.detail != to || failure.is_some() {
                    tx.execute(
                        "UPDATE vms SET detail = ?2, failure = ?3, updated_at = ?4 WHERE id = ?1",
                        params![vm.as_str(), to.word(), failure, now_us().max(now.created_at)],
                    )?;
                    crate::agents::follow(tx, &vm, to, failure.as_deref())?;
                    crate::snapshots::follow(tx, &vm, to)?;
                }
                if to == StatusDetail::Destroyed {
                    // The record stays for good, so what nobody needs any more goes: it may be long, or not for keeping.
                    let sql = "UPDATE vms SET handle = NULL, ca_key = x'', ca_cert = '', public_key = '' WHERE id = ?1";
                    tx.execute(sql, [vm.as_str()])?;
                }
                find(tx, &vm)
            })
            .await
    }

    /// Keeps (or forgets) the driver's handle of the running VMM.
    pub async fn vm_set_handle(&self, vm: &VmId, handle: Option<String>) -> Result<()> {
        let vm = vm.clone();
        self.db
            .write(move |tx| {
                tx.execute("UPDATE vms SET handle = ?2 WHERE id = ?1", params![vm.as_str(), handle])?;
                Ok(())
            })
            .await
    }

    /// The certificate of a VM's CA alone, for which nothing has to be opened.
    pub async fn vm_ca_cert(&self, vm: &VmId) -> Result<String> {
        let vm = vm.clone();
        self.db
            .read(move |db| {
                db.prepare_cached("SELECT ca_cert FROM vms WHERE id = ?1")?
                    .query_row([vm.as_str()], |row| row.get(0))
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::Vm))
            })
            .await
    }

    /// A VM's CA, its key opened.
    pub async fn vm_ca(&self, vm: &VmId) -> Result<CaPem> {
        let (vm, key) = (vm.clone(), self.key.clone());
        self.db
            .read(move |db| {
                let (cert, blob): (String, Vec<u8>) = db
                    .prepare_cached("SELECT ca_cert, ca_key FROM vms WHERE id = ?1")?
                    .query_row([vm.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::Vm))?;
                let opened = key.open("vms.ca_key", vm.as_str(), &blob)?;
                let text = std::str::from_utf8(&opened)
                    .map_err(|_| StoreError::Internal("a CA key is not PEM".into()))?;
                Ok(CaPem { cert, key: Zeroizing::new(text.to_owned()) })
            })
            .await
    }
}

/// The states of a simplified status, as a condition.
const fn states(status: Status) -> &'static str {
    match status {
        Status::Pending => "detail IN ('queued', 'creating', 'starting')",
        Status::Running => "detail IN ('running', 'ready')",
        Status::Stopped => "detail IN ('stopping', 'stopped')",
        Status::Destroyed => "detail IN ('destroying', 'destroyed')",
        Status::Failed => "detail = 'failed'",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_condition_of_a_status_lists_its_states() {
        for state in StatusDetail::ALL {
            let word = format!("'{}'", state.word());
            for status in
                [Status::Pending, Status::Running, Status::Stopped, Status::Destroyed, Status::Failed]
            {
                assert_eq!(states(status).contains(&word), state.status() == status, "{state:?} {status:?}");
            }
        }
    }
}
