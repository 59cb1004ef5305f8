//! Device login: short codes that a person confirms elsewhere. Kept hashed, short-lived, handed out once, and few
//! at a time for each requester.

use crate::error::{Kind, Result, StoreError};
use crate::keys::{self, hash};
use crate::seal::random;
use crate::store::Store;
use crate::time::now_us;
use crate::users::id;
use rusqlite::{OptionalExtension as _, params};
use tapgate_model::UserId;

/// Letters that are not mistaken for one another or for digits, and spell no words.
const LETTERS: &[u8; 20] = b"BCDFGHJKLMNPQRSTVWXZ";
/// How long a code can be confirmed (microseconds): fifteen minutes.
const LIFE: i64 = 15 * 60 * 1_000_000;
/// Open codes for one requester.
const OPEN: i64 = 10;

pub(crate) const LONG_OVER: &str = "DELETE FROM device_codes WHERE expires_at < ?1";

/// A fresh code.
#[derive(Clone, Debug)]
pub struct DeviceCode {
    /// What the person types, as `ABCD-1234`.
    pub code: String,
    /// Microseconds since the epoch.
    pub expires_at: i64,
}

/// What polling a code answers.
#[derive(Clone)]
pub enum DeviceState {
    /// Confirmed; the token is handed out now and never again.
    Authorized(String),
    /// Over, used, or never was.
    Expired,
    /// Not confirmed yet.
    Pending,
}

fn fresh() -> Result<String> {
    let mut bytes = [0u8; 8];
    random(&mut bytes)?;
    let letter = |b: &u8| char::from(LETTERS[usize::from(*b) % LETTERS.len()]);
    let digit = |b: &u8| char::from(b'0' + *b % 10);
    Ok(bytes[..4].iter().map(letter).chain(['-']).chain(bytes[4..].iter().map(digit)).collect())
}

/// A code as its hash is kept: upper case, without what people put between.
fn normal(code: &str) -> String {
    code.chars().filter(char::is_ascii_alphanumeric).map(|c| c.to_ascii_uppercase()).take(16).collect()
}

impl Store {
    /// Makes a code for a requester (its address), unless it has too many open: then `None`.
    pub async fn device_code(&self, requester: &str) -> Result<Option<DeviceCode>> {
        let requester = requester.to_owned();
        self.db
            .write(move |tx| {
                let now = now_us();
                tx.execute(LONG_OVER, [now - LIFE])?;
                let open: i64 = tx.query_row(
                    "SELECT count(*) FROM device_codes WHERE requester = ?1 AND expires_at > ?2",
                    params![requester, now],
                    |row| row.get(0),
                )?;
                if open >= OPEN {
                    return Ok(None);
                }
                let (code, expires_at) = (fresh()?, now + LIFE);
                tx.execute(
                    "INSERT INTO device_codes (hash, requester, created_at, expires_at) VALUES (?1, ?2, ?3, ?4)",
                    params![hash(&normal(&code)), requester, now, expires_at],
                )?;
                Ok(Some(DeviceCode { code, expires_at }))
            })
            .await
    }

    /// Who asked for a code that is still to be confirmed.
    pub async fn device_pending(&self, code: &str) -> Result<Option<String>> {
        let code = hash(&normal(code));
        self.db
            .read(move |db| {
                let sql =
                    "SELECT requester FROM device_codes WHERE hash = ?1 AND user IS NULL AND expires_at > ?2";
                Ok(db.query_row(sql, params![code, now_us()], |row| row.get(0)).optional()?)
            })
            .await
    }

    /// Confirms a code for a user who has room for one more key. The requester's address is answered, for the person to recognise.
    pub async fn device_confirm(&self, code: &str, user: &UserId, limit: u32) -> Result<String> {
        let (code, user) = (hash(&normal(code)), user.clone());
        self.db
            .write(move |tx| {
                keys::room(tx, &user, limit)?;
                tx.query_row(
                    "UPDATE device_codes SET user = ?2 WHERE hash = ?1 AND user IS NULL AND expires_at > ?3
                     RETURNING requester",
                    params![code, user.as_str(), now_us()],
                    |row| row.get(0),
                )
                .optional()?
                .ok_or(StoreError::NotFound(Kind::ApiKey))
            })
            .await
    }

    /// Polls a code. Only the requester that asked for it is answered; a confirmed one makes its key now.
    ///
    /// # Errors
    /// The account has got as many keys as it may since the person confirmed; the code can be polled again.
    pub async fn device_poll(&self, code: &str, requester: &str, limit: u32) -> Result<DeviceState> {
        let (code, requester) = (hash(&normal(code)), requester.to_owned());
        self.db
            .write(move |tx| {
                let found = tx
                    .query_row(
                        "SELECT user FROM device_codes WHERE hash = ?1 AND requester = ?2 AND expires_at > ?3",
                        params![code, requester, now_us()],
                        |row| {
                            let user: Option<String> = row.get("user")?;
                            user.map(|_| id::<UserId>(row, "user")).transpose()
                        },
                    )
                    .optional()?;
                match found {
                    None => Ok(DeviceState::Expired),
                    Some(None) => Ok(DeviceState::Pending),
                    Some(Some(user)) => {
                        keys::room(tx, &user, limit)?;
                        tx.execute("DELETE FROM device_codes WHERE hash = ?1", params![code])?;
                        Ok(DeviceState::Authorized(keys::issue(tx, &user, "Device login")?.token))
                    }
                }
            })
            .await
    }
}
