//! Answers kept for retries.

use crate::error::Result;
use crate::seal::SealKey;
use crate::store::Store;
use crate::time::now_us;
use rusqlite::{OptionalExtension as _, Transaction, params};
use tapgate_model::UserId;

/// How long an answer is kept (microseconds): a day.
const KEPT: i64 = 86_400_000_000;
/// After this, one that never ended (the daemon was killed) no longer stands in the way.
const RUNNING: i64 = 300_000_000;
/// Answers of one account at most; the oldest goes first.
const MOST: i64 = 10_000;
/// The name that answers are sealed under.
const TABLE: &str = "idempotency";

/// What is known of a key.
#[derive(Debug)]
pub enum Known {
    /// Nothing: go on, and say how it ended.
    New,
    /// The first one still runs.
    Running,
    /// It ended like this.
    Ended {
        /// HTTP status.
        status: u16,
        /// The answer's body.
        body: Vec<u8>,
    },
    /// The key was used for another request.
    Other,
}

fn row(user: &str, key: &str) -> String {
    format!("{user}\0{key}")
}

/// Seals the kept answers with the key's newest part: a retry after a rotation is answered all the same.
pub(crate) fn seal_anew(tx: &Transaction<'_>, seal: &SealKey) -> Result<usize> {
    let mut select = tx.prepare("SELECT user, key, body FROM idempotency WHERE body IS NOT NULL")?;
    let rows: Vec<(String, String, Vec<u8>)> = select
        .query_map([], |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)))?
        .collect::<rusqlite::Result<_>>()?;
    for (user, key, body) in &rows {
        let name = row(user, key);
        let body = seal.seal(TABLE, &name, &seal.open(TABLE, &name, body)?)?;
        tx.execute(
            "UPDATE idempotency SET body = ?3 WHERE user = ?1 AND key = ?2",
            params![user, key, body],
        )?;
    }
    Ok(rows.len())
}

impl Store {
    /// Takes a key for a request, unless it was taken before.
    pub async fn idempotency_begin(&self, user: &UserId, key: &str, fingerprint: Vec<u8>) -> Result<Known> {
        let (user, key, seal) = (user.clone(), key.to_owned(), self.key.clone());
        self.db
            .write(move |tx| {
                let now = now_us();
                tx.execute("DELETE FROM idempotency WHERE created_at < ?1", [now - KEPT])?;
                tx.execute(
                    "DELETE FROM idempotency WHERE status IS NULL AND created_at < ?1 AND user = ?2 AND key = ?3",
                    params![now - RUNNING, user.as_str(), key],
                )?;
                type Found = (Vec<u8>, Option<u16>, Option<Vec<u8>>);
                let found: Option<Found> = tx
                    .query_row(
                        "SELECT fingerprint, status, body FROM idempotency WHERE user = ?1 AND key = ?2",
                        params![user.as_str(), key],
                        |row| Ok((row.get(0)?, row.get(1)?, row.get(2)?)),
                    )
                    .optional()?;
                match found {
                    Some((of, ..)) if of != fingerprint => Ok(Known::Other),
                    Some((_, Some(status), Some(body))) => {
                        let body = seal.open(TABLE, &row(user.as_str(), &key), &body)?.to_vec();
                        Ok(Known::Ended { status, body })
                    }
                    Some(_) => Ok(Known::Running),
                    None => {
                        tx.execute(
                            "DELETE FROM idempotency WHERE user = ?1 AND key IN (
                                 SELECT key FROM idempotency WHERE user = ?1 ORDER BY created_at DESC LIMIT -1 OFFSET ?2)",
                            params![user.as_str(), MOST - 1],
                        )?;
                        tx.execute(
                            "INSERT INTO idempotency (user, key, fingerprint, created_at) VALUES (?1, ?2, ?3, ?4)",
                            params![user.as_str(), key, fingerprint, now],
                        )?;
                        Ok(Known::New)
                    }
                }
            })
            .await
    }

    /// Keeps the answer; `None` frees the key, for a request that may well work next time.
    pub async fn idempotency_end(
        &self,
        user: &UserId,
        key: &str,
        answer: Option<(u16, Vec<u8>)>,
    ) -> Result<()> {
        let (user, key, seal) = (user.clone(), key.to_owned(), self.key.clone());
        self.db
            .write(move |tx| {
                match answer {
                    None => tx.execute(
                        "DELETE FROM idempotency WHERE user = ?1 AND key = ?2",
                        params![user.as_str(), key],
                    )?,
                    Some((status, body)) => tx.execute(
                        "UPDATE idempotency SET status = ?3, body = ?4 WHERE user = ?1 AND key = ?2",
                        params![
                            user.as_str(),
                            key,
                            status,
                            seal.seal(TABLE, &row(user.as_str(), &key), &body)?
                        ],
                    )?,
                };
                Ok(())
            })
            .await
    }
}
