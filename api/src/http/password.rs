//! Passwords: argon2id, off the runtime's threads, and few at a time so that they cannot take the host's memory.

use super::ApiError;
use argon2::Argon2;
use argon2::password_hash::{PasswordHasher as _, PasswordVerifier as _, phc::PasswordHash};
use tokio::sync::Semaphore;
use zeroize::Zeroizing;

/// Hashes at a time; each takes some 19 MiB.
static TURNS: Semaphore = Semaphore::const_new(4);

async fn in_turn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, ApiError> {
    let _turn = TURNS.acquire().await.map_err(|_| ApiError::internal())?;
    tokio::task::spawn_blocking(work).await.map_err(|_| ApiError::internal())
}

/// The hash to keep.
pub(crate) async fn hash_password(password: Zeroizing<String>) -> Result<String, ApiError> {
    in_turn(move || Argon2::default().hash_password(password.as_bytes()).map(|hash| hash.to_string()))
        .await?
        .map_err(|error| {
            tracing::error!(%error, "a password could not be hashed");
            ApiError::internal()
        })
}

/// Whether the password fits. Without a hash it takes the same time, so that nobody learns which accounts exist.
pub(crate) async fn verify_password(
    password: Zeroizing<String>,
    hash: Option<String>,
) -> Result<bool, ApiError> {
    in_turn(move || match hash.as_deref().map(PasswordHash::new) {
        Some(Ok(hash)) => Argon2::default().verify_password(password.as_bytes(), &hash).is_ok(),
        _ => {
            let _ = Argon2::default().hash_password(password.as_bytes());
            false
        }
    })
    .await
}
