//! Egress rules, of the account (`vm` is `None`) or of one VM.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Page, PageRequest};
use crate::policy::touch;
use crate::store::{Store, quota};
use crate::time::now_us;
use crate::users::id;
use crate::vms;
use rusqlite::types::Value;
use rusqlite::{OptionalExtension as _, Row, params};
use tapgate_model::lifecycle::Refusal;
use tapgate_model::{Rule, RuleId, RuleTarget, Status, UserId, VmId};

/// A rule to be made.
#[derive(Clone, Debug)]
pub struct NewRule {
    /// Unique in the account.
    pub name: Option<String>,
    /// What it allows.
    pub target: RuleTarget,
    /// Why it is there.
    pub comment: Option<String>,
}

/// A rule.
#[derive(Clone, Debug)]
pub struct RuleRecord {
    /// Id.
    pub id: RuleId,
    /// Unique in the account.
    pub name: Option<String>,
    /// What it allows.
    pub target: RuleTarget,
    /// Why it is there.
    pub comment: Option<String>,
    /// Microseconds since the epoch.
    pub created_at: i64,
}

/// Which rules to list.
#[derive(Clone, Debug, Default)]
pub struct RuleFilter {
    /// With exactly this pattern.
    pub host: Option<String>,
    /// With exactly this range, in canonical form.
    pub cidr: Option<String>,
    /// Of exactly this name.
    pub name: Option<String>,
}

/// What rules are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum RuleSort {
    /// Creation.
    #[default]
    Created,
    /// Pattern; rules of ranges come first when ascending.
    Host,
}

const SELECT: &str = "SELECT seq, id, name, host, cidr, comment, created_at FROM rules";

/// Reads `id`, `host`, `cidr`.
pub(crate) fn read_rule(row: &Row<'_>) -> rusqlite::Result<Rule> {
    let bad = || rusqlite::Error::InvalidColumnName("host, cidr".into());
    let host: Option<String> = row.get("host")?;
    let cidr: Option<String> = row.get("cidr")?;
    let target = match (host, cidr) {
        (Some(host), None) => RuleTarget::Host(host.parse().map_err(|_| bad())?),
        (None, Some(cidr)) => RuleTarget::Cidr(cidr.parse().map_err(|_| bad())?),
        _ => return Err(bad()),
    };
    Ok(Rule { id: id(row, "id")?, target })
}

fn read(row: &Row<'_>) -> rusqlite::Result<RuleRecord> {
    let Rule { id, target } = read_rule(row)?;
    Ok(RuleRecord {
        id,
        target,
        name: row.get("name")?,
        comment: row.get("comment")?,
        created_at: row.get("created_at")?,
    })
}

impl Store {
    /// Adds a rule to the account, or to one of its VMs.
    pub async fn rule_create(
        &self,
        user: &UserId,
        vm: Option<&VmId>,
        new: NewRule,
        limit: u32,
    ) -> Result<RuleRecord> {
        let (user, vm) = (user.clone(), vm.cloned());
        self.db
            .write(move |tx| {
                if let Some(vm) = &vm
                    && vms::owned(tx, &user, vm)?.detail.status() == Status::Destroyed
                {
                    // Its rules went when it was destroyed: this one's name would be taken for good.
                    return Err(Conflict::State(Refusal::Destroyed).into());
                }
                if let Some(name) = &new.name {
                    let taken: bool = tx.query_row(
                        "SELECT EXISTS (SELECT 1 FROM rules WHERE user = ?1 AND name = ?2)",
                        params![user.as_str(), name],
                        |row| row.get(0),
                    )?;
                    if taken {
                        return Err(Conflict::RuleName.into());
                    }
                }
                let count = "SELECT count(*) FROM rules WHERE user = ?1";
                quota(tx, "egress rules", count, user.as_str(), limit)?;
                let record = RuleRecord {
                    id: RuleId::generate(),
                    name: new.name,
                    target: new.target,
                    comment: new.comment,
                    created_at: now_us(),
                };
                let (host, cidr) = match &record.target {
                    RuleTarget::Host(host) => (Some(host.to_string()), None),
                    RuleTarget::Cidr(cidr) => (None, Some(cidr.to_string())),
                };
                tx.execute(
                    "INSERT INTO rules (id, user, vm, name, host, cidr, comment, created_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
                    params![
                        record.id.as_str(),
                        user.as_str(),
                        vm.as_ref().map(VmId::as_str),
                        record.name,
                        host,
                        cidr,
                        record.comment,
                        record.created_at
                    ],
                )?;
                touch(tx, &user, vm.as_ref())?;
                Ok(record)
            })
            .await
    }

    /// The account's rules, or a VM's own.
    pub async fn rules(
        &self,
        user: &UserId,
        vm: Option<&VmId>,
        filter: RuleFilter,
        sort: RuleSort,
        page: PageRequest,
    ) -> Result<Page<RuleRecord>> {
        let (user, vm, cursors) = (user.clone(), vm.cloned(), self.cursors.clone());
        self.db
            .read(move |db| {
                if let Some(vm) = &vm {
                    vms::owned(db, &user, vm)?;
                }
                let scope = format!("rules\0{user}\0{vm:?}\0{filter:?}");
                let mut filters = vec![("user = ?", Value::Text(user.into()))];
                match vm {
                    Some(vm) => filters.push(("vm = ?", Value::Text(vm.into()))),
                    None => filters.push(("vm IS NULL", Value::Null)),
                }
                for (condition, value) in
                    [("host = ?", filter.host), ("cidr = ?", filter.cidr), ("name = ?", filter.name)]
                {
                    if let Some(value) = value {
                        filters.push((condition, Value::Text(value)));
                    }
                }
                let sort = match sort {
                    RuleSort::Created => "created_at",
                    RuleSort::Host => "ifnull(host, '')",
                };
                Listing { select: SELECT, filters, sort, scope }.run(db, &cursors, &page, read)
            })
            .await
    }

    /// One rule of the account, or of one of its VMs.
    pub async fn rule(&self, user: &UserId, vm: Option<&VmId>, rule: &RuleId) -> Result<RuleRecord> {
        let (user, vm, rule) = (user.clone(), vm.cloned(), rule.clone());
        self.db
            .read(move |db| {
                db.prepare_cached(&format!("{SELECT} WHERE id = ?1 AND user = ?2 AND vm IS ?3"))?
                    .query_row(params![rule.as_str(), user.as_str(), vm.as_ref().map(VmId::as_str)], read)
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::Rule))
            })
            .await
    }

    /// Removes a rule of the account, or of one of its VMs.
    pub async fn rule_delete(&self, user: &UserId, vm: Option<&VmId>, rule: &RuleId) -> Result<()> {
        let (user, vm, rule) = (user.clone(), vm.cloned(), rule.clone());
        self.db
            .write(move |tx| {
                if let Some(vm) = &vm {
                    vms::owned(tx, &user, vm)?;
                }
                let gone = tx.execute(
                    "DELETE FROM rules WHERE id = ?1 AND user = ?2 AND vm IS ?3",
                    params![rule.as_str(), user.as_str(), vm.as_ref().map(VmId::as_str)],
                )?;
                if gone == 0 {
                    return Err(StoreError::NotFound(Kind::Rule));
                }
                touch(tx, &user, vm.as_ref())
            })
            .await
    }
}
