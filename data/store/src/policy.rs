//! Egress policy: the account's mode, the VM's own, and the effective policy that the proxy and the datapath enforce.

use crate::error::{Kind, Result, StoreError};
use crate::rules::read_rule;
use crate::store::{Store, next_generation};
use crate::users::id;
use crate::version::Expected;
use crate::{secrets, vms};
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use std::sync::Arc;
use tapgate_model::policy::SecretsOverHttp;
use tapgate_model::{Mode, RuleSet, UserId, VmId, VmPolicy};

/// The account's policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccountPolicy {
    /// What holds for every VM without a mode of its own.
    pub mode: Mode,
}

/// A VM's own policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VmEgress {
    /// The mode in force: its own, else the account's.
    pub mode: Mode,
    /// Its own, if it has one.
    pub own_mode: Option<Mode>,
    /// Whether the account's rules hold for it besides its own.
    pub inherit_rules: bool,
}

impl AccountPolicy {
    /// Its version: what it says.
    pub fn version(&self) -> String {
        self.mode.word().to_owned()
    }
}

impl VmEgress {
    /// Its version: what it says.
    pub fn version(&self) -> String {
        format!("{}-{}-{}", self.mode.word(), self.own_mode.is_none(), self.inherit_rules)
    }
}

fn mode(word: &str) -> Result<Mode> {
    Mode::from_word(word).ok_or_else(|| StoreError::Internal(format!("unknown mode {word}")))
}

fn account_mode(db: &Connection, user: &UserId) -> Result<Mode> {
    let word: String = db
        .prepare_cached("SELECT mode FROM users WHERE id = ?1")?
        .query_row([user.as_str()], |row| row.get(0))
        .optional()?
        .ok_or(StoreError::NotFound(Kind::User))?;
    mode(&word)
}

fn vm_egress(db: &Connection, user: &UserId, vm: &VmId) -> Result<VmEgress> {
    let (own, inherit_rules): (Option<String>, bool) = db
        .prepare_cached("SELECT mode, inherit_rules FROM vms WHERE id = ?1 AND user = ?2")?
        .query_row(params![vm.as_str(), user.as_str()], |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?
        .ok_or(StoreError::NotFound(Kind::Vm))?;
    let own_mode = own.as_deref().map(mode).transpose()?;
    let mode = match own_mode {
        Some(mode) => mode,
        None => account_mode(db, user)?,
    };
    Ok(VmEgress { mode, own_mode, inherit_rules })
}

/// Notes that the policy of the VM, or of all of the account's, changed.
pub(crate) fn touch(tx: &Transaction<'_>, user: &UserId, vm: Option<&VmId>) -> Result<()> {
    let generation = next_generation(tx)?;
    match vm {
        Some(vm) => {
            tx.execute("UPDATE vms SET generation = ?2 WHERE id = ?1", params![vm.as_str(), generation])?
        }
        None => {
            tx.execute("UPDATE users SET generation = ?2 WHERE id = ?1", params![user.as_str(), generation])?
        }
    };
    Ok(())
}

impl Store {
    /// The account's policy.
    pub async fn policy(&self, user: &UserId) -> Result<AccountPolicy> {
        let user = user.clone();
        self.db.read(move |db| Ok(AccountPolicy { mode: account_mode(db, &user)? })).await
    }

    /// Sets the account's mode.
    pub async fn policy_set(&self, user: &UserId, mode: Mode, expected: Expected) -> Result<AccountPolicy> {
        let user = user.clone();
        self.db
            .write(move |tx| {
                expected.check(&AccountPolicy { mode: account_mode(tx, &user)? }.version())?;
                tx.execute("UPDATE users SET mode = ?2 WHERE id = ?1", params![user.as_str(), mode.word()])?;
                touch(tx, &user, None)?;
                Ok(AccountPolicy { mode: account_mode(tx, &user)? })
            })
            .await
    }

    /// A VM's policy.
    pub async fn vm_egress(&self, user: &UserId, vm: &VmId) -> Result<VmEgress> {
        let (user, vm) = (user.clone(), vm.clone());
        self.db.read(move |db| vm_egress(db, &user, &vm)).await
    }

    /// Replaces a VM's policy. `None` as mode goes back to the account's.
    pub async fn vm_egress_set(
        &self,
        user: &UserId,
        vm: &VmId,
        mode: Option<Mode>,
        inherit_rules: bool,
        expected: Expected,
    ) -> Result<VmEgress> {
        let (user, vm) = (user.clone(), vm.clone());
        self.db
            .write(move |tx| {
                vms::owned(tx, &user, &vm)?;
                expected.check(&vm_egress(tx, &user, &vm)?.version())?;
                tx.execute(
                    "UPDATE vms SET mode = ?2, inherit_rules = ?3 WHERE id = ?1",
                    params![vm.as_str(), mode.map(Mode::word), inherit_rules],
                )?;
                touch(tx, &user, Some(&vm))?;
                vm_egress(tx, &user, &vm)
            })
            .await
    }

    /// The policy in force for a VM, secrets opened. One snapshot of the database: never half of a change.
    pub async fn effective_policy(&self, vm: &VmId, over_http: SecretsOverHttp) -> Result<VmPolicy> {
        let (vm, store) = (vm.clone(), self.clone());
        self.db.read(move |db| store.effective(db, &vm, over_http)).await
    }

    /// The policies in force for all of a user's VMs that are not destroyed.
    pub async fn effective_policies(
        &self,
        user: &UserId,
        over_http: SecretsOverHttp,
    ) -> Result<Vec<VmPolicy>> {
        let (user, store) = (user.clone(), self.clone());
        self.db
            .read(move |db| {
                let mut statement = db.prepare_cached(
                    "SELECT id FROM vms WHERE user = ?1 AND detail <> 'destroyed' ORDER BY seq",
                )?;
                let ids: Vec<VmId> = statement
                    .query_map([user.as_str()], |row| id(row, "id"))?
                    .collect::<rusqlite::Result<_>>()?;
                ids.iter().map(|vm| store.effective(db, vm, over_http)).collect()
            })
            .await
    }

    fn effective(&self, db: &Connection, vm: &VmId, secrets_over_http: SecretsOverHttp) -> Result<VmPolicy> {
        let (user, generation): (UserId, i64) = db
            .prepare_cached(
                "SELECT v.user AS user, max(v.generation, u.generation) AS generation
                 FROM vms v JOIN users u ON u.id = v.user WHERE v.id = ?1",
            )?
            .query_row([vm.as_str()], |row| Ok((id(row, "user")?, row.get("generation")?)))
            .optional()?
            .ok_or(StoreError::NotFound(Kind::Vm))?;
        let VmEgress { mode, inherit_rules, .. } = vm_egress(db, &user, vm)?;
        // The VM's own first: where both name one target, audit events name the nearer rule.
        let mut statement = db.prepare_cached(
            "SELECT id, host, cidr FROM rules WHERE user = ?1 AND (vm = ?2 OR (vm IS NULL AND ?3))
             ORDER BY vm IS NULL, seq",
        )?;
        let rules = statement
            .query_map(params![user.as_str(), vm.as_str(), inherit_rules], read_rule)?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        Ok(VmPolicy {
            vm: vm.clone(),
            generation: u64::try_from(generation).unwrap_or(0),
            mode,
            rules: RuleSet::new(rules),
            secrets: Arc::from(secrets::bindings(self, db, &user)?),
            secrets_over_http,
            user,
        })
    }
}
