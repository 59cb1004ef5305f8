//! What requests under way hold besides their content: their heads, and what is made to find their credentials in the answers. Bounded
//! for all of a VM's together, for it may have some 260,000 at a time. One over is refused: to wait it would have to be held too.

use http::request::Parts;
use std::sync::Arc;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use zeroize::Zeroizing;

/// Of one VM, in octets.
const MOST: usize = 64 * 1024 * 1024;
/// A request of no length.
const LEAST: usize = 2 * 1024;
/// What each octet of credentials takes in what looks for them.
const FOR_EACH: usize = 24;

/// Why a request is refused.
#[derive(Debug, thiserror::Error)]
#[error("the requests under way have heads of more than 64 MiB together; let some end first")]
pub(super) struct TooMany;

/// How much of it a VM has left.
pub(crate) struct Burden(Arc<Semaphore>);

impl Default for Burden {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST)))
    }
}

impl Burden {
    /// Takes what the request needs until it has ended.
    pub(super) fn take(
        &self,
        head: &Parts,
        credentials: &[(Zeroizing<Vec<u8>>, Vec<u8>)],
    ) -> Result<OwnedSemaphorePermit, TooMany> {
        let path = head.uri.path_and_query().map_or(0, |path| path.as_str().len());
        let fields: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
        let credentials: usize = credentials.iter().map(|(value, sent)| value.len() + sent.len()).sum();
        let octets = LEAST.saturating_add(path + fields).saturating_add(credentials.saturating_mul(FOR_EACH));
        let octets = u32::try_from(octets).map_err(|_| TooMany)?;
        self.0.clone().try_acquire_many_owned(octets).map_err(|_| TooMany)
    }
}
