//! The request that a task works for, if it came with an `Idempotency-Key`: whatever is stored for it is noted with its key, in
//! the same transaction. Must never leave something stored whose key does not say so.

use crate::error::Result;
use rusqlite::{Transaction, params};
use tapgate_model::UserId;

tokio::task_local! {
    static REQUEST: Keyed;
}

/// An account's key.
#[derive(Clone)]
pub(crate) struct Keyed {
    user: UserId,
    key: String,
}

/// Runs the work for a request with this key.
pub async fn keyed<F: Future>(user: UserId, key: String, work: F) -> F::Output {
    REQUEST.scope(Keyed { user, key }, work).await
}

/// Of the task that asks.
pub(crate) fn current() -> Option<Keyed> {
    REQUEST.try_with(Keyed::clone).ok()
}

impl Keyed {
    /// Notes that something was stored.
    pub(crate) fn note(&self, tx: &Transaction<'_>) -> Result<()> {
        tx.prepare_cached(
            "UPDATE idempotency SET stored = 1 WHERE user = ?1 AND key = ?2 AND status IS NULL AND stored = 0",
        )?
        .execute(params![self.user.as_str(), self.key])?;
        Ok(())
    }
}
