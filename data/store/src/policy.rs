//! Egress policy: the account's mode, the VM's own, and the effective policy that the proxy and the datapath enforce.

use crate::error::{Kind, Result, StoreError};
use crate::rules::read_rule;
use crate::store::{Store, next_generation};
use crate::users::id;
use crate::version::Expected;
use crate::{secrets, vms};
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use tapgate_model::policy::SecretsOverHttp;
use tapgate_model::{Mode, Rule, RuleLayer, RuleSet, SecretBinding, UserId, VmId, VmPolicy};

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
        self.db
            .read(move |db| {
                let user: UserId = db
                    .prepare_cached("SELECT user FROM vms WHERE id = ?1")?
                    .query_row([vm.as_str()], |row| id(row, "user"))
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::Vm))?;
                let found = store.effective(db, &user, Some(&vm), over_http, &HashMap::new())?;
                found.into_iter().next().ok_or(StoreError::NotFound(Kind::Vm))
            })
            .await
    }

    /// The policies in force for all of a user's VMs that are not destroyed, or for one of them, by one look at the
    /// database. What did not change since the policies that are known already is taken from them: rules that are
    /// the same are the same in memory.
    ///
    /// # Errors
    /// The database cannot be read. A VM that is not there has no policy in the answer.
    pub async fn effective_policies(
        &self,
        user: &UserId,
        vm: Option<&VmId>,
        over_http: SecretsOverHttp,
        known: HashMap<VmId, Arc<VmPolicy>>,
    ) -> Result<Vec<VmPolicy>> {
        let (user, vm, store) = (user.clone(), vm.cloned(), self.clone());
        self.db.read(move |db| store.effective(db, &user, vm.as_ref(), over_http, &known)).await
    }

    fn effective(
        &self,
        db: &Connection,
        user: &UserId,
        vm: Option<&VmId>,
        secrets_over_http: SecretsOverHttp,
        known: &HashMap<VmId, Arc<VmPolicy>>,
    ) -> Result<Vec<VmPolicy>> {
        let account = Account::read(self, db, user, known)?;
        let mut statement = db.prepare_cached(
            "SELECT id, generation, mode, inherit_rules FROM vms
             WHERE user = ?1 AND detail <> 'destroyed' AND (?2 IS NULL OR id = ?2) ORDER BY seq",
        )?;
        let mut rows = statement.query(params![user.as_str(), vm.map(VmId::as_str)])?;
        let mut policies = Vec::new();
        while let Some(row) = rows.next()? {
            let vm: VmId = id(row, "id")?;
            let since = generation(row)?;
            let own_mode = row.get::<_, Option<String>>("mode")?.as_deref().map(mode).transpose()?;
            let inherits: bool = row.get("inherit_rules")?;
            // Generations rise over all accounts, so one that is not above the policy's was in it.
            let own = match known.get(&vm).filter(|policy| since <= policy.generation) {
                Some(policy) => Arc::clone(policy.rules.own()),
                None => Arc::new(RuleLayer::new(rules(db, user, Some(&vm))?)),
            };
            let inherited = if inherits { Arc::clone(&account.rules) } else { RuleLayer::none() };
            policies.push(VmPolicy {
                vm,
                user: user.clone(),
                generation: since.max(account.generation),
                mode: own_mode.unwrap_or(account.mode),
                // The VM's own first: where both name one target, audit events name the nearer rule.
                rules: RuleSet::layered(own, inherited),
                secrets: Arc::clone(&account.secrets),
                secrets_over_http,
            });
        }
        Ok(policies)
    }
}

/// What an account's VMs have in common.
struct Account {
    generation: u64,
    mode: Mode,
    rules: Arc<RuleLayer>,
    secrets: Arc<[SecretBinding]>,
}

impl Account {
    fn read(
        store: &Store,
        db: &Connection,
        user: &UserId,
        known: &HashMap<VmId, Arc<VmPolicy>>,
    ) -> Result<Self> {
        let (word, generation) = db
            .prepare_cached("SELECT mode, generation FROM users WHERE id = ?1")?
            .query_row([user.as_str()], |row| Ok((row.get::<_, String>("mode")?, generation(row)?)))
            .optional()?
            .ok_or(StoreError::NotFound(Kind::User))?;
        let newest = known.values().filter(|policy| policy.user == *user).max_by_key(|p| p.generation);
        let secrets = match newest.filter(|policy| generation <= policy.generation) {
            Some(policy) => Arc::clone(&policy.secrets),
            None => Arc::from(secrets::bindings(store, db, user)?),
        };
        let fresh = RuleLayer::new(rules(db, user, None)?);
        // Each layer is compared once, however many VMs share it.
        let mut seen = HashSet::new();
        let mut layers = known.values().map(|policy| policy.rules.account());
        let same = layers.find(|layer| seen.insert(Arc::as_ptr(layer)) && ***layer == fresh);
        let rules = same.map_or_else(|| Arc::new(fresh), Arc::clone);
        Ok(Self { generation, mode: mode(&word)?, rules, secrets })
    }
}

/// The account's rules, or those of one VM alone, oldest first.
fn rules(db: &Connection, user: &UserId, vm: Option<&VmId>) -> Result<Vec<Rule>> {
    let mut statement =
        db.prepare_cached("SELECT id, host, cidr FROM rules WHERE user = ?1 AND vm IS ?2 ORDER BY seq")?;
    let rows = statement.query_map(params![user.as_str(), vm.map(VmId::as_str)], read_rule)?;
    Ok(rows.collect::<rusqlite::Result<_>>()?)
}

fn generation(row: &Row<'_>) -> rusqlite::Result<u64> {
    Ok(u64::try_from(row.get::<_, i64>("generation")?).unwrap_or(0))
}
