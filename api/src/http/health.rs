//! What `/healthz` answers, for a second: whoever asks more often must not stand in the way of who writes.

use std::time::Duration;
use tapgate_store::{Store, StoreError};
use tokio::sync::Mutex;
use tokio::time::Instant;

/// How long an answer holds. A failure holds as long, or asking would be a load just when there is trouble.
const HOLDS: Duration = Duration::from_secs(1);

/// The last answer, and when it was given.
#[derive(Debug, Default)]
pub(crate) struct Health(Mutex<Option<(Instant, Result<(), String>)>>);

impl Health {
    /// Whether the store can be written. Those who ask while it is being asked wait for the same answer.
    pub(crate) async fn ask(&self, store: &Store) -> Result<(), StoreError> {
        let mut last = self.0.lock().await;
        let known =
            last.as_ref().filter(|(when, _)| when.elapsed() < HOLDS).map(|(_, answer)| answer.clone());
        if let Some(answer) = known {
            return answer.map_err(StoreError::Unavailable);
        }
        let answer = store.healthy().await;
        let kept = answer.as_ref().copied().map_err(|error| match error {
            StoreError::Unavailable(why) => why.clone(),
            other => other.to_string(),
        });
        *last = Some((Instant::now(), kept));
        answer
    }
}
