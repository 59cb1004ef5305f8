//! Secrets: values sealed under their row's id, opened only for the effective policy.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Page, PageRequest};
use crate::policy::touch;
use crate::seal::OVERHEAD;
use crate::store::{Store, quota};
use crate::time::now_us;
use crate::users::id;
use crate::version::Expected;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Row, params};
use tapgate_model::secret::PLACEHOLDER_PREFIX;
use tapgate_model::{HostPattern, SecretBinding, SecretId, SecretValue, UserId};

/// A secret to be made.
#[derive(Clone, Debug)]
pub struct NewSecret {
    /// Unique in the account.
    pub name: String,
    /// The value.
    pub value: SecretValue,
    /// Unique in the account.
    pub env_var: String,
    /// Where it may go.
    pub hosts: Vec<HostPattern>,
    /// Why it is there.
    pub comment: Option<String>,
}

/// What to change of a secret; `None` leaves it.
#[derive(Clone, Debug, Default)]
pub struct SecretChange {
    /// The value.
    pub value: Option<SecretValue>,
    /// The variable.
    pub env_var: Option<String>,
    /// Where it may go.
    pub hosts: Option<Vec<HostPattern>>,
    /// `Some(None)` removes it.
    pub comment: Option<Option<String>>,
}

/// How much of secrets an account may have.
#[derive(Clone, Copy, Debug)]
pub struct SecretQuota {
    /// How many.
    pub count: u32,
    /// Octets of their values together: each is looked for in every answer.
    pub octets: u32,
}

/// A secret as it can be shown: without its value.
#[derive(Clone, Debug)]
pub struct SecretRecord {
    /// Id.
    pub id: SecretId,
    /// Name.
    pub name: String,
    /// Variable.
    pub env_var: String,
    /// Where it may go.
    pub hosts: Vec<HostPattern>,
    /// Why it is there.
    pub comment: Option<String>,
    /// Microseconds since the epoch.
    pub created_at: i64,
    /// Microseconds since the epoch.
    pub updated_at: i64,
}

impl SecretRecord {
    /// Its version: another after each change.
    pub fn version(&self) -> String {
        self.updated_at.to_string()
    }
}

/// Which secrets to list.
#[derive(Clone, Debug, Default)]
pub struct SecretFilter {
    /// Of exactly this name.
    pub name: Option<String>,
}

/// What secrets are sorted by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SecretSort {
    /// Creation.
    #[default]
    Created,
    /// Name.
    Name,
}

const SELECT: &str = "SELECT seq, id, name, env_var, hosts, comment, created_at, updated_at FROM secrets";
const TABLE: &str = "secrets";

fn hosts(row: &Row<'_>) -> rusqlite::Result<Vec<HostPattern>> {
    serde_json::from_str(&row.get::<_, String>("hosts")?)
        .map_err(|_| rusqlite::Error::InvalidColumnName("hosts".into()))
}

fn read(row: &Row<'_>) -> rusqlite::Result<SecretRecord> {
    Ok(SecretRecord {
        id: id(row, "id")?,
        name: row.get("name")?,
        env_var: row.get("env_var")?,
        hosts: hosts(row)?,
        comment: row.get("comment")?,
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    })
}

fn find(db: &Connection, user: &UserId, secret: &SecretId) -> Result<SecretRecord> {
    db.prepare_cached(&format!("{SELECT} WHERE id = ?1 AND user = ?2"))?
        .query_row(params![secret.as_str(), user.as_str()], read)
        .optional()?
        .ok_or(StoreError::NotFound(Kind::Secret))
}

fn env_var_free(db: &Connection, user: &UserId, env_var: &str, except: Option<&SecretId>) -> Result<()> {
    let taken: bool = db.query_row(
        "SELECT EXISTS (SELECT 1 FROM secrets WHERE user = ?1 AND env_var = ?2 AND id IS NOT ?3)",
        params![user.as_str(), env_var, except.map(SecretId::as_str)],
        |row| row.get(0),
    )?;
    if taken { Err(Conflict::EnvVar.into()) } else { Ok(()) }
}

/// Refuses a value that makes the account's too long together; `except` is the secret that it replaces.
fn octets_left(
    db: &Connection,
    user: &UserId,
    value: &SecretValue,
    limit: u32,
    except: Option<&SecretId>,
) -> Result<()> {
    // Sealed, each is longer by as much.
    let (others, count): (i64, i64) = db.query_row(
        "SELECT coalesce(sum(length(value)), 0), count(*) FROM secrets WHERE user = ?1 AND id IS NOT ?2",
        params![user.as_str(), except.map(SecretId::as_str)],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    let value = i64::try_from(value.expose().len()).unwrap_or(i64::MAX);
    if value.saturating_add(others - count * OVERHEAD) > i64::from(limit) {
        return Err(Conflict::Quota { what: "bytes of secrets", limit }.into());
    }
    Ok(())
}

fn json(hosts: &[HostPattern]) -> Result<String> {
    serde_json::to_string(hosts).map_err(|e| StoreError::Internal(e.to_string()))
}

/// The user's secrets with their values, oldest first.
pub(crate) fn bindings(store: &Store, db: &Connection, user: &UserId) -> Result<Vec<SecretBinding>> {
    let mut statement = db
        .prepare_cached("SELECT id, name, env_var, hosts, value FROM secrets WHERE user = ?1 ORDER BY seq")?;
    let mut rows = statement.query([user.as_str()])?;
    let mut out = Vec::new();
    while let Some(row) = rows.next()? {
        let row_id: String = row.get("id")?;
        let blob: Vec<u8> = row.get("value")?;
        let opened = store.key.open(TABLE, &row_id, &blob)?;
        let value = SecretValue::new(opened.to_vec()).map_err(|e| StoreError::Internal(e.to_string()))?;
        out.push(SecretBinding {
            name: row.get("name")?,
            env_var: row.get("env_var")?,
            hosts: hosts(row)?,
            value,
        });
    }
    Ok(out)
}

impl Store {
    /// What guests of the user get for the user's secrets: variable and placeholder, oldest first.
    pub async fn placeholders(&self, user: &UserId) -> Result<Vec<(String, String)>> {
        let user = user.clone();
        self.db
            .read(move |db| {
                let mut statement =
                    db.prepare_cached("SELECT env_var, name FROM secrets WHERE user = ?1 ORDER BY seq")?;
                let found = statement
                    .query_map([user.as_str()], |row| {
                        let name: String = row.get("name")?;
                        Ok((row.get("env_var")?, format!("{PLACEHOLDER_PREFIX}{name}")))
                    })?
                    .collect::<rusqlite::Result<_>>()?;
                Ok(found)
            })
            .await
    }

    /// All of a user's secrets, oldest first: for what guests are told.
    pub async fn secrets_all(&self, user: &UserId) -> Result<Vec<SecretRecord>> {
        let user = user.clone();
        self.db
            .read(move |db| {
                let mut statement = db.prepare_cached(&format!("{SELECT} WHERE user = ?1 ORDER BY seq"))?;
                let found = statement.query_map([user.as_str()], read)?.collect::<rusqlite::Result<_>>()?;
                Ok(found)
            })
            .await
    }

    /// Makes a secret.
    pub async fn secret_create(
        &self,
        user: &UserId,
        new: NewSecret,
        limit: SecretQuota,
    ) -> Result<SecretRecord> {
        let (user, key) = (user.clone(), self.key.clone());
        self.db
            .write(move |tx| {
                let taken: bool = tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM secrets WHERE user = ?1 AND name = ?2)",
                    params![user.as_str(), new.name],
                    |row| row.get(0),
                )?;
                if taken {
                    return Err(Conflict::SecretName.into());
                }
                env_var_free(tx, &user, &new.env_var, None)?;
                let count = "SELECT count(*) FROM secrets WHERE user = ?1";
                quota(tx, "secrets", count, user.as_str(), limit.count)?;
                octets_left(tx, &user, &new.value, limit.octets, None)?;
                let secret = SecretId::generate();
                let now = now_us();
                tx.execute(
                    "INSERT INTO secrets (id, user, name, env_var, hosts, value, comment, created_at, updated_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?8)",
                    params![
                        secret.as_str(),
                        user.as_str(),
                        new.name,
                        new.env_var,
                        json(&new.hosts)?,
                        key.seal(TABLE, secret.as_str(), new.value.expose())?,
                        new.comment,
                        now
                    ],
                )?;
                touch(tx, &user, None)?;
                find(tx, &user, &secret)
            })
            .await
    }

    /// A user's secrets.
    pub async fn secrets(
        &self,
        user: &UserId,
        filter: SecretFilter,
        sort: SecretSort,
        page: PageRequest,
    ) -> Result<Page<SecretRecord>> {
        let (user, cursors) = (user.clone(), self.cursors.clone());
        self.db
            .read(move |db| {
                let scope = format!("secrets\0{user}\0{filter:?}");
                let mut filters = vec![("user = ?", Value::Text(user.into()))];
                if let Some(name) = filter.name {
                    filters.push(("name = ?", Value::Text(name)));
                }
                let sort = match sort {
                    SecretSort::Created => "created_at",
                    SecretSort::Name => "name",
                };
                Listing { select: SELECT, filters, sort, scope }.run(db, &cursors, &page, read)
            })
            .await
    }

    /// One secret.
    pub async fn secret(&self, user: &UserId, secret: &SecretId) -> Result<SecretRecord> {
        let (user, secret) = (user.clone(), secret.clone());
        self.db.read(move |db| find(db, &user, &secret)).await
    }

    /// Changes a secret.
    pub async fn secret_update(
        &self,
        user: &UserId,
        secret: &SecretId,
        change: SecretChange,
        expected: Expected,
        limit: SecretQuota,
    ) -> Result<SecretRecord> {
        let (user, secret, key) = (user.clone(), secret.clone(), self.key.clone());
        self.db
            .write(move |tx| {
                let now = find(tx, &user, &secret)?;
                expected.check(&now.version())?;
                let env_var = change.env_var.unwrap_or(now.env_var);
                env_var_free(tx, &user, &env_var, Some(&secret))?;
                let hosts = change.hosts.unwrap_or(now.hosts);
                let comment = change.comment.unwrap_or(now.comment);
                // Never the same twice, so that it can serve as a version.
                let updated = now_us().max(now.updated_at + 1);
                tx.execute(
                    "UPDATE secrets SET env_var = ?2, hosts = ?3, comment = ?4, updated_at = ?5 WHERE id = ?1",
                    params![secret.as_str(), env_var, json(&hosts)?, comment, updated],
                )?;
                if let Some(value) = change.value {
                    octets_left(tx, &user, &value, limit.octets, Some(&secret))?;
                    let blob = key.seal(TABLE, secret.as_str(), value.expose())?;
                    tx.execute("UPDATE secrets SET value = ?2 WHERE id = ?1", params![secret.as_str(), blob])?;
                }
                touch(tx, &user, None)?;
                find(tx, &user, &secret)
            })
            .await
    }

    /// Removes a secret.
    pub async fn secret_delete(&self, user: &UserId, secret: &SecretId, expected: Expected) -> Result<()> {
        let (user, secret) = (user.clone(), secret.clone());
        self.db
            .write(move |tx| {
                expected.check(&find(tx, &user, &secret)?.version())?;
                tx.execute("DELETE FROM secrets WHERE id = ?1", [secret.as_str()])?;
                touch(tx, &user, None)
            })
            .await
    }
}
