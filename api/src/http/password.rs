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

/// Of no password: its output is all zeros. Who has no account is checked against it, so that it costs the same.
const NOBODY: &str =
    "$argon2id$v=19$m=19456,t=2,p=1$AAAAAAAAAAAAAAAAAAAAAA$AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";

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
    in_turn(move || fits(&password, hash.as_deref(), NOBODY)).await
}

fn fits(password: &str, hash: Option<&str>, nobody: &str) -> bool {
    let nobody = || PasswordHash::new(nobody);
    let hash = hash.map_or_else(nobody, PasswordHash::new).or_else(|_| nobody());
    hash.is_ok_and(|hash| Argon2::default().verify_password(password.as_bytes(), &hash).is_ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn who_has_no_account_costs_what_one_who_has_costs() {
        let text = hash_password(Zeroizing::new("correct horse".into())).await.unwrap();
        let (kept, nobody) = (PasswordHash::new(&text).unwrap(), PasswordHash::new(NOBODY).unwrap());
        // All that the work depends on.
        assert_eq!((kept.algorithm, kept.version), (nobody.algorithm, nobody.version));
        assert_eq!(kept.params, nobody.params);
        let lengths =
            |hash: &PasswordHash| (hash.salt.map(|salt| salt.len()), hash.hash.map(|hash| hash.len()));
        assert_eq!(lengths(&kept), lengths(&nobody));
        let right =
            |password: &str, hash: Option<String>| verify_password(Zeroizing::new(password.into()), hash);
        assert!(right("correct horse", Some(text.clone())).await.unwrap());
        for (password, hash) in
            [("wrong", Some(text.clone())), ("", None), ("x", None), ("x", Some("broken".into()))]
        {
            assert!(!right(password, hash).await.unwrap());
        }
        // The work is done, not left out: were it nobody's password, it would be found to fit.
        assert!(fits("correct horse", None, &text) && fits("correct horse", Some("broken"), &text));
    }
}
