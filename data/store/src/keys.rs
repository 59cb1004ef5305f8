//! API keys: 256 random bits, shown once, kept as their SHA-256. Looked up by hash, so no comparison leaks a prefix.

use crate::error::{Kind, Result, StoreError};
use crate::seal::random;
use crate::store::{Store, quota};
use crate::time::now_us;
use crate::users::id;
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rusqlite::{OptionalExtension as _, Row, Transaction, params};
use sha2::{Digest as _, Sha256};
use tapgate_model::{ApiKeyId, UserId};

/// What every token begins with.
const PREFIX: &str = "iron_live_";
/// The last use is noted this often at most (microseconds): a read must not become a write.
const USE_NOTED_EVERY: i64 = 60_000_000;

/// A key as it can be shown.
#[derive(Clone, Debug)]
pub struct ApiKeyRecord {
    /// Id.
    pub id: ApiKeyId,
    /// What it is for.
    pub name: String,
    /// Microseconds since the epoch.
    pub created_at: i64,
    /// When it was last used, to the minute.
    pub last_used_at: Option<i64>,
}

/// A key just made. The token exists nowhere else.
#[derive(Clone)]
pub struct IssuedKey {
    /// The key.
    pub record: ApiKeyRecord,
    /// What to send as `Authorization: Bearer`.
    pub token: String,
}

/// Who is calling.
#[derive(Clone, Debug)]
pub struct Caller {
    /// The account.
    pub user: UserId,
    /// The key that was presented.
    pub key: ApiKeyId,
}

fn read(row: &Row<'_>) -> rusqlite::Result<ApiKeyRecord> {
    Ok(ApiKeyRecord {
        id: id(row, "id")?,
        name: row.get("name")?,
        created_at: row.get("created_at")?,
        last_used_at: row.get("last_used_at")?,
    })
}

/// The hash of a secret text with enough randomness of its own.
pub(crate) fn hash(token: &str) -> Vec<u8> {
    Sha256::digest(token.as_bytes()).to_vec()
}

/// Whether the account may have another key.
pub(crate) fn room(tx: &Transaction<'_>, user: &UserId, limit: u32) -> Result<()> {
    let count = "SELECT count(*) FROM api_keys WHERE user = ?1";
    quota(tx, "API keys", count, user.as_str(), limit)
}

pub(crate) fn issue(tx: &Transaction<'_>, user: &UserId, name: &str) -> Result<IssuedKey> {
    let mut bytes = zeroize::Zeroizing::new([0u8; 32]);
    random(&mut bytes[..])?;
    // Without `-` and `_` a double click selects the whole token.
    let body = URL_SAFE_NO_PAD.encode(&bytes[..]).replace('-', "a").replace('_', "b");
    let token = format!("{PREFIX}{body}");
    let record = ApiKeyRecord {
        id: ApiKeyId::generate(),
        name: name.to_owned(),
        created_at: now_us(),
        last_used_at: None,
    };
    tx.execute(
        "INSERT INTO api_keys (id, user, name, hash, created_at) VALUES (?1, ?2, ?3, ?4, ?5)",
        params![record.id.as_str(), user.as_str(), record.name, hash(&token), record.created_at],
    )?;
    Ok(IssuedKey { record, token })
}

impl Store {
    /// Who this token belongs to; `None` if it is no key, revoked, or its account closed.
    pub async fn authenticate(&self, token: &str) -> Result<Option<Caller>> {
        if !token.starts_with(PREFIX) || token.len() > 128 {
            return Ok(None);
        }
        let hash = hash(token);
        let found = self
            .db
            .read(move |db| {
                Ok(db
                    .prepare_cached(
                        "SELECT k.id AS id, k.user AS user, k.last_used_at AS used FROM api_keys k
                         JOIN users u ON u.id = k.user
                         WHERE k.hash = ?1 AND u.disabled = 0",
                    )?
                    .query_row([hash], |row| {
                        let caller = Caller { user: id(row, "user")?, key: id(row, "id")? };
                        Ok((caller, row.get::<_, Option<i64>>("used")?))
                    })
                    .optional()?)
            })
            .await?;
        let Some((caller, used)) = found else { return Ok(None) };
        let now = now_us();
        if used.is_none_or(|used| now.saturating_sub(used) > USE_NOTED_EVERY) {
            let key = caller.key.clone();
            // Best effort: a full disk must not lock people out of reading.
            let noted = self.db.write(move |tx| {
                tx.execute(
                    "UPDATE api_keys SET last_used_at = ?2 WHERE id = ?1",
                    params![key.as_str(), now],
                )?;
                Ok(())
            });
            if let Err(error) = noted.await {
                tracing::warn!(%error, "the last use of an API key was not noted");
            }
        }
        Ok(Some(caller))
    }

    /// Makes another key for an account.
    pub async fn key_create(&self, user: &UserId, name: &str, limit: u32) -> Result<IssuedKey> {
        let (user, name) = (user.clone(), name.to_owned());
        self.db
            .write(move |tx| {
                room(tx, &user, limit)?;
                issue(tx, &user, &name)
            })
            .await
    }

    /// The account's keys, oldest first.
    pub async fn keys(&self, user: &UserId) -> Result<Vec<ApiKeyRecord>> {
        let user = user.clone();
        self.db
            .read(move |db| {
                let mut statement = db.prepare_cached(
                    "SELECT id, name, created_at, last_used_at FROM api_keys
                     WHERE user = ?1 ORDER BY created_at, seq",
                )?;
                let keys = statement.query_map([user.as_str()], read)?.collect::<rusqlite::Result<_>>()?;
                Ok(keys)
            })
            .await
    }

    /// Whether a key is still good: for connections that outlive the request that was authenticated.
    pub async fn key_lives(&self, key: &ApiKeyId) -> Result<bool> {
        let key = key.clone();
        self.db
            .read(move |db| {
                let sql = "SELECT EXISTS (SELECT 1 FROM api_keys k JOIN users u ON u.id = k.user
                           WHERE k.id = ?1 AND u.disabled = 0)";
                Ok(db.prepare_cached(sql)?.query_row([key.as_str()], |row| row.get(0))?)
            })
            .await
    }

    /// Revokes a key at once. Nothing of it is kept: keys may be made and revoked without end.
    pub async fn key_revoke(&self, user: &UserId, key: &ApiKeyId) -> Result<()> {
        let (user, key) = (user.clone(), key.clone());
        self.db
            .write(move |tx| {
                let gone = tx.execute(
                    "DELETE FROM api_keys WHERE id = ?2 AND user = ?1",
                    params![user.as_str(), key.as_str()],
                )?;
                if gone == 0 { Err(StoreError::NotFound(Kind::ApiKey)) } else { Ok(()) }
            })
            .await
    }
}
