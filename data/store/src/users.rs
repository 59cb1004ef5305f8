//! Accounts. Password hashes come in and go out as PHC strings; the hashing itself is the caller's.

use crate::error::{Conflict, Kind, Result, StoreError};
use crate::keys::{self, IssuedKey};
use crate::store::{Store, next_generation};
use crate::time::now_us;
use rusqlite::{OptionalExtension as _, Row, params};
use tapgate_model::UserId;

/// A sign-up that was checked.
#[derive(Clone)]
pub struct NewUser {
    /// First name.
    pub first_name: String,
    /// Last name.
    pub last_name: String,
    /// Address, as written.
    pub email: String,
    /// Argon2id hash in PHC form.
    pub password: String,
}

/// An account.
#[derive(Clone, Debug)]
pub struct UserRecord {
    /// Id.
    pub id: UserId,
    /// First name.
    pub first_name: String,
    /// Last name.
    pub last_name: String,
    /// Address, as written at sign-up.
    pub email: String,
    /// Whether the address was confirmed.
    pub email_verified: bool,
    /// Whether the operator closed the account.
    pub disabled: bool,
    /// Microseconds since the epoch.
    pub created_at: i64,
}

const SELECT: &str =
    "SELECT seq, id, first_name, last_name, email, email_verified, disabled, created_at FROM users";

fn read(row: &Row<'_>) -> rusqlite::Result<UserRecord> {
    Ok(UserRecord {
        id: id(row, "id")?,
        first_name: row.get("first_name")?,
        last_name: row.get("last_name")?,
        email: row.get("email")?,
        email_verified: row.get("email_verified")?,
        disabled: row.get("disabled")?,
        created_at: row.get("created_at")?,
    })
}

/// An id column; what we wrote always parses.
pub(crate) fn id<T: std::str::FromStr>(row: &Row<'_>, column: &str) -> rusqlite::Result<T> {
    let text: String = row.get(column)?;
    text.parse().map_err(|_| rusqlite::Error::InvalidColumnName(column.to_owned()))
}

/// Addresses are compared without case.
pub(crate) fn email_key(email: &str) -> String {
    email.trim().to_lowercase()
}

impl Store {
    /// Makes an account with its first API key, whose token is returned this once.
    pub async fn user_create(&self, new: NewUser, key_name: &str) -> Result<(UserRecord, IssuedKey)> {
        let key_name = key_name.to_owned();
        self.db
            .write(move |tx| {
                let user = UserRecord {
                    id: UserId::generate(),
                    first_name: new.first_name,
                    last_name: new.last_name,
                    email: new.email,
                    email_verified: false,
                    disabled: false,
                    created_at: now_us(),
                };
                let inserted = tx.execute(
                    "INSERT INTO users (id, first_name, last_name, email, email_key, password, generation, created_at)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8) ON CONFLICT (email_key) DO NOTHING",
                    params![
                        user.id.as_str(),
                        user.first_name,
                        user.last_name,
                        user.email,
                        email_key(&user.email),
                        new.password,
                        next_generation(tx)?,
                        user.created_at
                    ],
                )?;
                if inserted == 0 {
                    return Err(Conflict::Email.into());
                }
                let key = keys::issue(tx, &user.id, &key_name)?;
                Ok((user, key))
            })
            .await
    }

    /// One account.
    pub async fn user(&self, user: &UserId) -> Result<UserRecord> {
        let user = user.clone();
        self.db
            .read(move |db| {
                db.prepare_cached(&format!("{SELECT} WHERE id = ?1"))?
                    .query_row([user.as_str()], read)
                    .optional()?
                    .ok_or(StoreError::NotFound(Kind::User))
            })
            .await
    }

    /// The account with this address and its password hash, for logging in.
    pub async fn user_by_email(&self, email: &str) -> Result<Option<(UserRecord, String)>> {
        let email = email_key(email);
        self.db
            .read(move |db| {
                let sql = SELECT.replace("created_at FROM", "created_at, password FROM");
                Ok(db
                    .prepare_cached(&format!("{sql} WHERE email_key = ?1"))?
                    .query_row([email], |row| Ok((read(row)?, row.get("password")?)))
                    .optional()?)
            })
            .await
    }

    /// Every account, oldest first: for the operator.
    pub async fn users(&self) -> Result<Vec<UserRecord>> {
        self.db
            .read(|db| {
                let mut statement = db.prepare_cached(&format!("{SELECT} ORDER BY seq"))?;
                let users = statement.query_map([], read)?.collect::<rusqlite::Result<_>>()?;
                Ok(users)
            })
            .await
    }

    /// Opens or closes an account. A closed one's keys are refused; its VMs stay as they are.
    pub async fn user_disable(&self, user: &UserId, disabled: bool) -> Result<()> {
        self.user_set(user, "UPDATE users SET disabled = ?2 WHERE id = ?1", i64::from(disabled).into()).await
    }

    /// Notes that the address was confirmed.
    pub async fn user_verified(&self, user: &UserId) -> Result<()> {
        self.user_set(user, "UPDATE users SET email_verified = ?2 WHERE id = ?1", 1.into()).await
    }

    /// Replaces the password hash, if it is still the one that the caller was checked against: of several at once one wins, and the
    /// others are told that they did not.
    pub async fn user_set_password(&self, user: &UserId, before: &str, password: String) -> Result<bool> {
        let (user, before) = (user.clone(), before.to_owned());
        self.db
            .write(move |tx| {
                let sql = "UPDATE users SET password = ?3 WHERE id = ?1 AND password = ?2";
                Ok(tx.execute(sql, params![user.as_str(), before, password])? > 0)
            })
            .await
    }

    /// The same for who came by a mail to the account's address, which confirms it. Whatever keys there are of an address that nobody
    /// had confirmed were made by somebody who never showed that it was theirs, and go. Answers whether they did; `None` as above.
    pub async fn user_reset_password(
        &self,
        user: &UserId,
        before: &str,
        password: String,
    ) -> Result<Option<bool>> {
        let (user, before) = (user.clone(), before.to_owned());
        self.db
            .write(move |tx| {
                let sql = "SELECT email_verified FROM users WHERE id = ?1 AND password = ?2";
                let verified: Option<bool> =
                    tx.query_row(sql, params![user.as_str(), before], |row| row.get(0)).optional()?;
                let Some(verified) = verified else { return Ok(None) };
                let sql = "UPDATE users SET password = ?2, email_verified = 1 WHERE id = ?1";
                tx.execute(sql, params![user.as_str(), password])?;
                if !verified {
                    tx.execute("DELETE FROM api_keys WHERE user = ?1", [user.as_str()])?;
                }
                Ok(Some(!verified))
            })
            .await
    }

    async fn user_set(&self, user: &UserId, sql: &'static str, value: rusqlite::types::Value) -> Result<()> {
        let user = user.clone();
        self.db
            .write(move |tx| match tx.execute(sql, params![user.as_str(), value])? {
                0 => Err(StoreError::NotFound(Kind::User)),
                _ => Ok(()),
            })
            .await
    }
}
