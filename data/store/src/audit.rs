//! The audit log: a sink that never blocks, one thread that writes batches, and queries that stay fast.
//!
//! Events wait in a bounded queue of which no VM can take more than its share; what does not fit is counted for the
//! VM that made it. Must never hold a caller up, and never lose an event uncounted.

mod chain;
mod cuts;
mod follow;
mod index;
mod left;
mod lookup;
mod query;
mod queue;
mod record;
mod retain;
mod rows;
mod shares;
mod witness;
mod writer;

pub use left::Recovered;
pub use query::AuditFilter;
pub use queue::AuditLoad;
pub use record::AuditRecord;
pub use retain::Keep;

use crate::error::{Result, StoreError};
use crate::page::{Cursors, Page};
use crate::pool::{Durability, Pool, QueueLoad};
use crate::schema;
use crate::seal::SealKey;
use crate::users::id;
use queue::Queue;
use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Instant;
use tapgate_journal::FileJournal;
use tapgate_model::{AuditEvent, AuditSink, Note, Stage, UserId, VmId};

/// Empty pages that stay in the file: 4 MiB.
const SPARE_PAGES: u64 = 256;
/// Pages given back in one step.
const SHRINK: &str = "PRAGMA incremental_vacuum(128)";

/// The audit log. Clones share everything.
#[derive(Clone)]
pub struct AuditLog {
    db: Pool,
    queue: Arc<Queue>,
    cursors: Cursors,
    chain: chain::Chain,
    /// Where what is under way is noted, once this process is known to be the one that makes events.
    journal: Arc<OnceLock<Arc<FileJournal>>>,
    /// Closes when the writing thread ends.
    alive: tokio::sync::watch::Receiver<()>,
}

impl std::fmt::Debug for AuditLog {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("AuditLog(..)")
    }
}

impl AuditSink for AuditLog {
    fn record(&self, mut event: AuditEvent) {
        if event.note.is_none() {
            event.note = self.note();
        }
        event.note_down(Stage::Ended);
        self.queue.push(event);
    }

    fn note(&self) -> Note {
        self.journal.get().map(FileJournal::note).unwrap_or_default()
    }
}

impl AuditLog {
    pub(crate) fn open(path: &Path, key: &SealKey, cursors: Cursors) -> Result<Self> {
        schema::prepare_audit(path)?;
        let queue = Arc::new(Queue::new());
        let chain = chain::Chain::new(key);
        let connection = crate::pool::connect(path, Durability::Normal, true)?;
        // The ends of the indexes that are written to stay in memory, and go to the file in large steps.
        connection.pragma_update(None, "cache_size", -32_768)?;
        connection.pragma_update(None, "wal_autocheckpoint", 2048)?;
        connection.pragma_update(None, "secure_delete", false)?;
        let writer = writer::Writer::new(connection, chain.clone())?;
        let theirs = queue.clone();
        let (living, alive) = tokio::sync::watch::channel(());
        std::thread::Builder::new()
            .name("audit-write".into())
            .spawn(move || {
                let _living = living;
                writer.run(&theirs);
            })
            .map_err(|error| StoreError::Internal(error.to_string()))?;
        let db = Pool::start(path, "audit", Durability::Normal)?;
        Ok(Self { db, queue, cursors, chain, journal: Arc::default(), alive })
    }

    /// Comes back when the thread that writes is gone: it never goes unless it panics.
    pub async fn writer_ended(&self) {
        let mut alive = self.alive.clone();
        while alive.changed().await.is_ok() {}
    }

    /// Waits until every event recorded before the call can be read.
    pub async fn flush(&self) {
        let goal = self.queue.pushed();
        let mut written = self.queue.written();
        // The queue outlives every waiter: an error cannot happen, and would mean that nothing comes any more.
        let _ = written.wait_for(|done| *done >= goal).await;
    }

    /// Tells when events were written: the count so far.
    pub fn watch(&self) -> tokio::sync::watch::Receiver<u64> {
        self.queue.written()
    }

    /// How many events of a VM were not kept.
    pub async fn dropped(&self, vm: &VmId) -> Result<u64> {
        let (vm, pending) = (vm.clone(), self.queue.dropped(vm));
        let written: i64 = self
            .db
            .read(move |db| {
                Ok(db.query_row(
                    "SELECT ifnull(sum(count), 0) FROM dropped WHERE vm = ?1",
                    [vm.as_str()],
                    |row| row.get(0),
                )?)
            })
            .await?;
        Ok(u64::try_from(written).unwrap_or(0) + pending)
    }

    /// How many events of each VM were not kept.
    pub async fn dropped_all(&self) -> Result<HashMap<VmId, u64>> {
        let mut all = self.queue.dropped_all();
        let written = self
            .db
            .read(|db| {
                let mut statement = db.prepare_cached("SELECT vm, count FROM dropped")?;
                let rows = statement.query_map([], |row| Ok((id::<VmId>(row, "vm")?, row.get("count")?)))?;
                Ok(rows.collect::<rusqlite::Result<Vec<(_, i64)>>>()?)
            })
            .await?;
        for (vm, count) in written {
            *all.entry(vm).or_default() += u64::try_from(count).unwrap_or(0);
        }
        Ok(all)
    }

    /// What came in since the start.
    pub fn load(&self) -> AuditLoad {
        self.queue.load()
    }

    pub(crate) fn queues(&self) -> [QueueLoad; 2] {
        self.db.load()
    }

    /// A user's events.
    pub async fn list(&self, user: &UserId, filter: AuditFilter) -> Result<Page<AuditRecord>> {
        let (user, cursors) = (user.clone(), self.cursors.clone());
        self.db.read(move |db| query::list(db, &cursors, &user, &filter)).await
    }

    /// Where following begins: at the end, or at the first event after a time.
    pub async fn follow_from(&self, user: &UserId, since_us: Option<i64>) -> Result<i64> {
        let user = user.clone();
        self.db.read(move |db| follow::begin(db, &user, since_us)).await
    }

    /// Events written after a place, in the order of writing, and the next place. The same place means that there are
    /// no more for now.
    pub async fn follow(
        &self,
        user: &UserId,
        filter: &AuditFilter,
        after: i64,
    ) -> Result<(Vec<AuditRecord>, i64)> {
        let (user, filter) = (user.clone(), filter.clone());
        self.db.read(move |db| follow::step(db, &user, &filter, after)).await
    }

    /// Checks the chain of hashes over the whole log. Answers how many events it holds, or the first that was changed.
    pub async fn verify(&self) -> Result<Result<u64, String>> {
        let chain = self.chain.clone();
        self.db.read(move |db| chain.verify(db)).await
    }

    pub(crate) async fn copy_to(&self, path: std::path::PathBuf) -> Result<()> {
        self.db.copy_to(path).await
    }

    /// Removes events that are too old, then, while there are too many or they are too large together, the oldest of who holds
    /// most: a few thousand at a time so that writing goes on between. Then gives pages that were left empty back to the file
    /// system. Answers how many events went.
    pub async fn retain(&self, keep: Keep) -> Result<u64> {
        let mut gone = 0;
        loop {
            let (chain, began) = (self.chain.clone(), Instant::now());
            let step = self.db.write(move |tx| retain::too_old(tx, &chain, keep.since_us)).await?;
            gone += step;
            if step == 0 {
                break;
            }
            pause(began).await;
        }
        while let Some(mut plan) = self.db.read(move |db| retain::Plan::new(db, &keep)).await? {
            let before = gone;
            while !plan.is_done() {
                let (chain, began) = (self.chain.clone(), Instant::now());
                let step;
                (plan, step) = self
                    .db
                    .write(move |tx| {
                        let step = plan.step(tx, &chain)?;
                        Ok((plan, step))
                    })
                    .await?;
                gone += step;
                pause(began).await;
            }
            if gone == before {
                break;
            }
        }
        loop {
            let began = Instant::now();
            if !self.db.write(shrink).await? {
                break;
            }
            pause(began).await;
        }
        // Each time: a reader may have stood in the way of the last one, and a log that nobody writes to has no other.
        self.db.checkpoint().await?;
        Ok(gone)
    }
}

/// Leaves the file to the thread that writes events for twice as long as it was kept from it: SQLite has no queue for it.
async fn pause(began: Instant) {
    tokio::time::sleep(began.elapsed() * 2).await;
}

/// Gives some empty pages at the end of the file back, if there are many. Answers whether there are more.
fn shrink(tx: &rusqlite::Transaction<'_>) -> Result<bool> {
    let (empty, all) = (retain::number(tx, "freelist_count")?, retain::number(tx, "page_count")?);
    // Some are left for what is written next.
    if empty <= SPARE_PAGES.max(all / 8) {
        return Ok(false);
    }
    let mut step = tx.prepare_cached(SHRINK)?;
    let mut rows = step.query([])?;
    while rows.next()?.is_some() {}
    drop(rows);
    Ok(retain::number(tx, "freelist_count")? < empty)
}
