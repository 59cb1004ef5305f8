//! Environment variables. Values are sealed too: people put credentials here whatever the documentation says.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::page::{Listing, Order, Page, PageRequest};
use crate::seal::{OVERHEAD, SealKey};
use crate::store::{Store, quota};
use crate::time::now_us;
use crate::users::id;
use crate::version::Expected;
use rusqlite::types::Value;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use tapgate_model::{EnvId, UserId};

/// A variable.
#[derive(Clone)]
pub struct EnvRecord {
    /// Id.
    pub id: EnvId,
    /// Unique in the account.
    pub key: String,
    /// Value.
    pub value: String,
    /// Microseconds since the epoch.
    pub created_at: i64,
    /// Microseconds since the epoch.
    pub updated_at: i64,
}

impl EnvRecord {
    /// Its version: another after each change.
    pub fn version(&self) -> String {
        self.updated_at.to_string()
    }
}

const SELECT: &str = "SELECT seq, id, key, value, created_at, updated_at FROM env";
const TABLE: &str = "env";

type Raw = (EnvRecord, Vec<u8>);

fn read(row: &Row<'_>) -> rusqlite::Result<Raw> {
    let record = EnvRecord {
        id: id(row, "id")?,
        key: row.get("key")?,
        value: String::new(),
        created_at: row.get("created_at")?,
        updated_at: row.get("updated_at")?,
    };
    Ok((record, row.get("value")?))
}

fn open(seal: &SealKey, (mut record, blob): Raw) -> Result<EnvRecord> {
    let opened = seal.open(TABLE, record.id.as_str(), &blob)?;
    record.value = String::from_utf8_lossy(&opened).into_owned();
    Ok(record)
}

fn find(db: &Connection, user: &UserId, key: &str) -> Result<Option<Raw>> {
    Ok(db
        .prepare_cached(&format!("{SELECT} WHERE user = ?1 AND key = ?2"))?
        .query_row(params![user.as_str(), key], read)
        .optional()?)
}

/// Of all variables of an account together, names and values as they are stored: each of its guests is told all of them, in up
/// to four files, where a value can be six times as long.
const MOST_KIB: u32 = 256;

/// Refuses a value with which the account's variables would be more than a guest's seed carries.
fn room(tx: &Transaction<'_>, user: &UserId, key: &str, value: usize) -> Result<()> {
    let sum = "SELECT ifnull(sum(length(key) + length(value)), 0) FROM env WHERE user = ?1 AND key <> ?2";
    let others: i64 = tx.query_row(sum, params![user.as_str(), key], |row| row.get(0))?;
    let own = i64::try_from(key.len() + value).unwrap_or(i64::MAX);
    if others.saturating_add(own) > i64::from(MOST_KIB) * 1024 {
        return Err(Conflict::Quota { what: "KiB of environment variables", limit: MOST_KIB }.into());
    }
    Ok(())
}

impl Store {
    /// A user's variables, by key. Always this order: the contract has no other.
    pub async fn env_list(
        &self,
        user: &UserId,
        limit: u32,
        cursor: Option<String>,
    ) -> Result<Page<EnvRecord>> {
        let (user, cursors, seal) = (user.clone(), self.cursors.clone(), self.key.clone());
        self.db
            .read(move |db| {
                let scope = format!("env\0{user}");
                let filters = vec![("user = ?", Value::Text(user.into()))];
                Listing { select: SELECT, filters, sort: "key", scope }
                    .run(db, &cursors, &PageRequest { limit, cursor, order: Order::Asc }, read)?
                    .map(|raw| open(&seal, raw))
            })
            .await
    }

    /// All of a user's variables: for a guest's seed.
    pub async fn env_all(&self, user: &UserId) -> Result<Vec<EnvRecord>> {
        Ok(self.env_list(user, u32::MAX - 1, None).await?.items)
    }

    /// One variable.
    pub async fn env(&self, user: &UserId, key: &str) -> Result<EnvRecord> {
        let (user, key, seal) = (user.clone(), key.to_owned(), self.key.clone());
        self.db
            .read(move |db| {
                let raw = find(db, &user, &key)?.ok_or(StoreError::NotFound(Kind::Env))?;
                open(&seal, raw)
            })
            .await
    }

    /// Makes or replaces a variable.
    pub async fn env_set(
        &self,
        user: &UserId,
        key: &str,
        value: &str,
        limit: u32,
        expected: Expected,
    ) -> Result<EnvRecord> {
        let (user, key, value, seal) = (user.clone(), key.to_owned(), value.to_owned(), self.key.clone());
        self.db
            .write(move |tx| {
                let now = now_us();
                let old = find(tx, &user, &key)?;
                expected.check(&old.as_ref().map_or(String::new(), |(old, _)| old.version()))?;
                // What gets shorter is no more than there was.
                let sealed = value.len() + OVERHEAD as usize;
                if sealed > old.as_ref().map_or(0, |(_, blob)| blob.len()) {
                    room(tx, &user, &key, sealed)?;
                }
                match old {
                    Some((old, _)) => {
                        let blob = seal.seal(TABLE, old.id.as_str(), value.as_bytes())?;
                        tx.execute(
                            "UPDATE env SET value = ?2, updated_at = ?3 WHERE id = ?1",
                            params![old.id.as_str(), blob, now.max(old.updated_at + 1)],
                        )?;
                    }
                    None => {
                        let count = "SELECT count(*) FROM env WHERE user = ?1";
                        quota(tx, "environment variables", count, user.as_str(), limit)?;
                        let new = EnvId::generate();
                        let blob = seal.seal(TABLE, new.as_str(), value.as_bytes())?;
                        tx.execute(
                            "INSERT INTO env (id, user, key, value, created_at, updated_at)
                             VALUES (?1, ?2, ?3, ?4, ?5, ?5)",
                            params![new.as_str(), user.as_str(), key, blob, now],
                        )?;
                    }
                }
                let raw = find(tx, &user, &key)?.ok_or(StoreError::NotFound(Kind::Env))?;
                open(&seal, raw)
            })
            .await
    }

    /// Removes a variable.
    pub async fn env_delete(&self, user: &UserId, key: &str, expected: Expected) -> Result<()> {
        let (user, key) = (user.clone(), key.to_owned());
        self.db
            .write(move |tx| {
                let (old, _) = find(tx, &user, &key)?.ok_or(StoreError::NotFound(Kind::Env))?;
                expected.check(&old.version())?;
                tx.execute("DELETE FROM env WHERE id = ?1", [old.id.as_str()])?;
                Ok(())
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An account that has more than the bound, from before there was one, can get below it step by step.
    #[tokio::test]
    async fn what_gets_shorter_is_taken_above_the_bound_too() {
        let folder = tempfile::tempdir().unwrap();
        let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
        let store = Store::open(&folder.path().join("db"), key).unwrap();
        let account = crate::NewUser {
            email: "a@example.com".into(),
            first_name: "A".into(),
            last_name: "L".into(),
            password: "$argon2id$".into(),
        };
        let user = store.user_create(account, "key").await.unwrap().0.id;
        let large = "x".repeat(100_000);
        for name in ["A", "B"] {
            store.env_set(&user, name, &large, 10, Expected::any()).await.unwrap();
        }
        let (of, blob) = (user.clone(), vec![0u8; 200_000]);
        let old = move |tx: &Transaction<'_>| {
            let sql = "INSERT INTO env (id, user, key, value, created_at, updated_at) VALUES ('env_old', ?1, 'OLD', ?2, 1, 1)";
            Ok(tx.execute(sql, params![of.as_str(), blob])?)
        };
        store.db.write(old).await.unwrap();
        assert!(store.env_set(&user, "A", &"x".repeat(100_001), 10, Expected::any()).await.is_err());
        store.env_set(&user, "A", &"y".repeat(100_000), 10, Expected::any()).await.unwrap();
        store.env_set(&user, "A", &"x".repeat(99_999), 10, Expected::any()).await.unwrap();
        store.env_set(&user, "A", "short", 10, Expected::any()).await.unwrap();
        assert!(store.env_set(&user, "C", "new", 10, Expected::any()).await.is_err());
    }
}
