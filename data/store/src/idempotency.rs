//! Answers kept for retries.

pub(crate) mod request;
mod room;

use crate::error::Result;
use crate::seal::SealKey;
use crate::store::Store;
use crate::time::now_us;
use room::BOUNDS;
use rusqlite::{OptionalExtension as _, Transaction, params};
use tapgate_model::UserId;

/// How long an answer is kept (microseconds): a day.
const KEPT: i64 = 86_400_000_000;
/// After this, one that never ended (a fault of ours) no longer stands in the way.
const RUNNING: i64 = 300_000_000;
/// In place of a status: what the request did stored something, and nobody knows its answer.
const LOST: u16 = 0;
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
    /// It stored something, and was cut off before its answer was kept.
    Lost,
    /// The key was used for another request.
    Other,
    /// As many requests of the account run as may.
    Full,
}

fn row(user: &str, key: &str) -> String {
    format!("{user}\0{key}")
}

/// Seals the kept answers with the key's newest part: a retry after a rotation is answered all the same.
pub(crate) fn seal_anew(tx: &Transaction<'_>, seal: &SealKey) -> Result<usize> {
    let next = "SELECT user, key, body FROM idempotency
                WHERE (user, key) > (?1, ?2) AND body IS NOT NULL ORDER BY user, key LIMIT 1";
    let (mut next, mut at, mut count) = (tx.prepare(next)?, (String::new(), String::new()), 0);
    // One at a time: all of them together may be large.
    while let Some((user, key, body)) = next
        .query_row(params![at.0, at.1], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?, row.get::<_, Vec<u8>>(2)?))
        })
        .optional()?
    {
        let name = row(&user, &key);
        let body = seal.seal(TABLE, &name, &seal.open(TABLE, &name, &body)?)?;
        tx.execute(
            "UPDATE idempotency SET body = ?3 WHERE user = ?1 AND key = ?2",
            params![user, key, body],
        )?;
        (at, count) = ((user, key), count + 1);
    }
    Ok(count)
}

impl Store {
    /// Takes a key for a request, unless it was taken before.
    pub async fn idempotency_begin(&self, user: &UserId, key: &str, fingerprint: Vec<u8>) -> Result<Known> {
        let (user, key, seal) = (user.clone(), key.to_owned(), self.key.clone());
        self.db
            .write(move |tx| {
                let now = now_us();
                tx.prepare_cached(room::TOO_OLD)?.execute([now - KEPT])?;
                for sql in room::GIVEN_UP {
                    tx.prepare_cached(sql)?.execute(params![user.as_str(), now - RUNNING])?;
                }
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
                    Some((_, Some(LOST), _)) => Ok(Known::Lost),
                    Some((_, Some(status), Some(body))) => {
                        let body = seal.open(TABLE, &row(user.as_str(), &key), &body)?.to_vec();
                        Ok(Known::Ended { status, body })
                    }
                    Some(_) => Ok(Known::Running),
                    None if room::is_full(tx, &BOUNDS, user.as_str())? => Ok(Known::Full),
                    None => {
                        tx.execute(
                            "INSERT INTO idempotency (user, key, fingerprint, created_at) VALUES (?1, ?2, ?3, ?4)",
                            params![user.as_str(), key, fingerprint, now],
                        )?;
                        room::make(tx, &BOUNDS, user.as_str(), &key)?;
                        Ok(Known::New)
                    }
                }
            })
            .await
    }

    /// For a daemon that began at this moment: what ran in the one before has ended. What stored nothing may be tried again at once.
    pub async fn idempotency_cut_off(&self, begun: jiff::Timestamp) -> Result<()> {
        self.db
            .write(move |tx| {
                for sql in room::CUT_OFF {
                    tx.execute(sql, [begun.as_microsecond()])?;
                }
                Ok(())
            })
            .await
    }

    /// Keeps the answer; `None` frees the key, for a request that may well work next time, unless it stored something.
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
                    None => room::ENDED_WITHOUT.iter().try_fold(0, |rows, sql| {
                        tx.execute(sql, params![user.as_str(), key]).map(|more| rows + more)
                    })?,
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
                room::make(tx, &BOUNDS, user.as_str(), &key)
            })
            .await
    }
}
