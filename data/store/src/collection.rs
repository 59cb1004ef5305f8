//! Deleted snapshots whose bytes are still there: which of them may go, and that they went. Never removes a record.

use crate::error::Result;
use crate::store::Store;
use crate::time::now_us;
use crate::users::id;
use rusqlite::params;
use std::collections::HashSet;
use tapgate_model::{SnapshotId, VmId};

/// How many deleted snapshots are answered at a time.
const COLLECTED: usize = 1000;

// VMs that are destroyed stay for good: neither goes through them.
pub(crate) const RESTING: &str = "SELECT v.id, v.snapshot FROM vms v JOIN snapshots s ON s.id = v.snapshot
     WHERE s.deleted_at IS NOT NULL AND s.collected_at IS NULL
       AND v.detail <> 'destroyed' AND v.detail IN ('stopping', 'stopped', 'failed')";
pub(crate) const UNUSED: &str =
    "SELECT id FROM snapshots WHERE deleted_at IS NOT NULL AND collected_at IS NULL
       AND status NOT IN ('pending', 'uploading') AND id NOT IN (
           SELECT snapshot FROM vms WHERE snapshot IS NOT NULL
              AND detail <> 'destroyed' AND detail IN ('queued', 'creating', 'starting'))
     ORDER BY seq";

impl Store {
    /// Deleted snapshots whose bytes may go: no VM is being made from them, and none that rests would be at its next start,
    /// as far as `has_disk` knows. The oldest first, without those that are put off.
    pub async fn snapshots_to_collect(
        &self,
        has_disk: impl Fn(&VmId) -> bool + Send + 'static,
        put_off: HashSet<SnapshotId>,
    ) -> Result<Vec<SnapshotId>> {
        self.db
            .read(move |db| {
                let mut resting = db.prepare_cached(RESTING)?;
                let resting =
                    resting.query_map([], |row| Ok((id::<VmId>(row, "id")?, id(row, "snapshot")?)))?;
                let mut held = put_off;
                for row in resting {
                    let (vm, snapshot) = row?;
                    if !has_disk(&vm) {
                        held.insert(snapshot);
                    }
                }
                let mut statement = db.prepare_cached(UNUSED)?;
                let found = statement.query_map([], |row| id(row, "id"))?;
                let free = found.filter(|row| row.as_ref().map_or(true, |snapshot| !held.contains(snapshot)));
                Ok(free.take(COLLECTED).collect::<rusqlite::Result<_>>()?)
            })
            .await
    }

    /// The bytes of a deleted snapshot are gone.
    pub async fn snapshot_collected(&self, snapshot: &SnapshotId) -> Result<()> {
        let snapshot = snapshot.clone();
        self.db
            .write(move |tx| {
                tx.execute(
                    "UPDATE snapshots SET collected_at = ?2 WHERE id = ?1",
                    params![snapshot.as_str(), now_us()],
                )?;
                Ok(())
            })
            .await
    }
}
