//! Keeps the audit log within bounds of age and size, a little at a time beside everything else.

use std::time::Duration;
use tapgate_store::{Keep, Store, now_us};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Between two rounds: short, for a log can grow by tens of MiB a second.
const ROUND: Duration = Duration::from_secs(5);
/// Between two times that it is written down how far the log has come.
const WITNESS: Duration = Duration::from_secs(60);
const DAY_US: i64 = 86_400_000_000;

/// How much of the audit log is kept.
#[derive(Clone, Copy, Debug)]
pub struct Retention {
    /// No longer than so many days.
    pub days: u32,
    /// No more events than this.
    pub events: u64,
    /// No more MiB of file than this.
    pub mib: u64,
}

impl Default for Retention {
    fn default() -> Self {
        Self { days: 90, events: 50_000_000, mib: 16_384 }
    }
}

/// Trims the log now and then, until it is told to stop.
pub async fn run(store: Store, keep: Retention, stop: CancellationToken) {
    let mut witness = Instant::now();
    loop {
        // Before anything is removed: what retention takes it must have taken from the log that was seen.
        if witness <= Instant::now() {
            witness = Instant::now() + WITNESS;
            match store.witness_audit().await {
                Ok(true) => {}
                Ok(false) => tracing::error!("audit.gone_back: run `tapgate audit verify`"),
                Err(error) => tracing::error!(%error, "audit.not_witnessed"),
            }
        }
        let bounds = Keep {
            since_us: now_us().saturating_sub(i64::from(keep.days).saturating_mul(DAY_US)),
            events: keep.events,
            octets: keep.mib.saturating_mul(1 << 20),
        };
        let trimmed = tokio::select! {
            () = stop.cancelled() => return,
            trimmed = store.audit().retain(bounds) => trimmed,
        };
        match trimmed {
            Ok(0) => {}
            Ok(gone) => tracing::info!(gone, "audit.trimmed"),
            Err(error) => tracing::error!(%error, "audit.trim_failed"),
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(ROUND) => {}
        }
    }
}
