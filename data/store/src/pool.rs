//! The threads that own the connections of one database file: one writer, a few readers.
//!
//! A job is a closure; its caller waits without blocking the runtime. A writing job is one transaction that commits
//! before the caller hears of it. A job that panics is rolled back and takes nothing down with it.

use crate::error::{Result, StoreError};
use crate::idempotency::request;
use rusqlite::{Connection, OpenFlags, Transaction, TransactionBehavior};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;
use tokio::sync::oneshot;

type Job = Box<dyn FnOnce(&mut Connection) + Send>;

/// Jobs that may wait for the writer or the readers before callers are told to come back later.
const WAITING: usize = 4096;
const READERS: usize = 3;

/// Of a file, in octets, by readers; SQLite's own most. What lies beyond is read.
const MAPPED: i64 = 0x7fff_0000;

/// How hard a commit is pushed to the disk.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Durability {
    /// Synced before it is acknowledged: survives a power cut.
    Full,
    /// Synced at checkpoints: survives a killed process; a power cut may take the last commits, never the file.
    Normal,
}

/// How many jobs wait for one kind of thread of one database.
#[derive(Clone, Copy, Debug)]
pub struct QueueLoad {
    /// `store` or `audit`.
    pub database: &'static str,
    /// `read` or `write`.
    pub kind: &'static str,
    /// Jobs that no thread has begun.
    pub waiting: usize,
}

/// Where jobs for one kind of thread wait.
#[derive(Clone)]
struct Line {
    jobs: SyncSender<Job>,
    waiting: Arc<AtomicUsize>,
}

/// One database file's threads.
#[derive(Clone)]
pub(crate) struct Pool {
    name: &'static str,
    /// Holds what requests store.
    keyed: bool,
    writer: Line,
    readers: Line,
    path: Arc<PathBuf>,
}

/// Opens a connection with the settings that all of ours have.
pub(crate) fn connect(path: &Path, durability: Durability, write: bool) -> Result<Connection> {
    let mode = if write { OpenFlags::SQLITE_OPEN_READ_WRITE } else { OpenFlags::SQLITE_OPEN_READ_ONLY };
    let connection = Connection::open_with_flags(path, mode | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.set_prepared_statement_cache_capacity(128);
    connection.pragma_update(None, "foreign_keys", true)?;
    connection.pragma_update(None, "trusted_schema", false)?;
    let mapped = !write && durability == Durability::Normal;
    // A mapped page counts as new each time that it is asked for: looking at all of its cells would be half of a question's
    // time. The writer looks, before damage spreads; a reader finds what is out of bounds where it meets it.
    connection.pragma_update(None, "cell_size_check", !mapped)?;
    connection.pragma_update(None, "secure_delete", true)?;
    if write {
        connection.pragma_update(None, "journal_mode", "wal")?;
        // What a long reader or a burst made it grow to is given back.
        connection.pragma_update(None, "journal_size_limit", 64 << 20)?;
        connection.pragma_update(
            None,
            "synchronous",
            match durability {
                Durability::Full => "full",
                Durability::Normal => "normal",
            },
        )?;
    } else {
        connection.pragma_update(None, "query_only", true)?;
        if mapped {
            // A question goes through a little of very many pages: copying each would be most of its time. The log alone is
            // so long. A disk that cannot be read then ends the daemon, as it does for the shared memory of the WAL.
            connection.pragma_update(None, "mmap_size", MAPPED)?;
        }
    }
    Ok(connection)
}

impl Pool {
    /// Starts the threads for a file that exists and has its schema.
    pub(crate) fn start(path: &Path, name: &'static str, durability: Durability) -> Result<Self> {
        let spawn = |name: String, connection: Connection, jobs: Arc<Mutex<Receiver<Job>>>| {
            thread::Builder::new()
                .name(name)
                .spawn(move || run(connection, &jobs))
                .map_err(|error| StoreError::Internal(error.to_string()))
        };
        let (writer, jobs) = sync_channel::<Job>(WAITING);
        spawn(format!("{name}-write"), connect(path, durability, true)?, Arc::new(Mutex::new(jobs)))?;
        let (readers, jobs) = sync_channel::<Job>(WAITING);
        let jobs = Arc::new(Mutex::new(jobs));
        for i in 0..READERS {
            spawn(format!("{name}-read-{i}"), connect(path, durability, false)?, jobs.clone())?;
        }
        let line = |jobs| Line { jobs, waiting: Arc::default() };
        Ok(Self {
            name,
            keyed: durability == Durability::Full,
            writer: line(writer),
            readers: line(readers),
            path: Arc::new(path.into()),
        })
    }

    /// The file.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// How many jobs wait.
    pub(crate) fn load(&self) -> [QueueLoad; 2] {
        [("write", &self.writer), ("read", &self.readers)].map(|(kind, line)| QueueLoad {
            database: self.name,
            kind,
            waiting: line.waiting.load(Ordering::Relaxed),
        })
    }

    /// Runs a job on a reader.
    pub(crate) async fn read<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        submit(&self.readers, move |connection| {
            // One snapshot for all statements of the job.
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Deferred)?;
            job(&transaction)
        })
        .await
    }

    /// Runs a job on the writer, in a transaction that is committed if it answers `Ok`.
    pub(crate) async fn write<T: Send + 'static>(
        &self,
        job: impl FnOnce(&Transaction<'_>) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let request = request::current().filter(|_| self.keyed);
        submit(&self.writer, move |connection| {
            let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let value = job(&transaction)?;
            if let Some(request) = request {
                request.note(&transaction)?;
            }
            transaction.commit()?;
            Ok(value)
        })
        .await
    }

    /// Moves what was committed into the file itself, as far as no reader needs it as it was: only then does a file that has
    /// become shorter give its end back (sqlite.org/wal.html, "Checkpointing"). Nobody is waited for.
    pub(crate) async fn checkpoint(&self) -> Result<()> {
        submit(&self.writer, |connection| {
            connection.query_row("PRAGMA wal_checkpoint(PASSIVE)", [], |_| Ok(()))?;
            Ok(())
        })
        .await
    }

    /// Copies the database, as it is at one moment, into an empty file. Writing goes on meanwhile.
    pub(crate) async fn copy_to(&self, to: PathBuf) -> Result<()> {
        let from = self.path.clone();
        let copy = move || {
            connect(from.as_path(), Durability::Normal, true)?
                .execute("VACUUM INTO ?1", [to.to_string_lossy()])?;
            Ok(())
        };
        tokio::task::spawn_blocking(copy).await.map_err(|error| StoreError::Internal(error.to_string()))?
    }
}

async fn submit<T: Send + 'static>(
    to: &Line,
    job: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static,
) -> Result<T> {
    let (answer, answered) = oneshot::channel();
    let waiting = to.waiting.clone();
    let job: Job = Box::new(move |connection| {
        waiting.fetch_sub(1, Ordering::Relaxed);
        // A caller that went away before its turn asked for nothing.
        if !answer.is_closed() {
            let _ = answer.send(job(connection));
        }
    });
    to.waiting.fetch_add(1, Ordering::Relaxed);
    to.jobs.try_send(job).map_err(|error| {
        to.waiting.fetch_sub(1, Ordering::Relaxed);
        match error {
            TrySendError::Full(_) => StoreError::Unavailable("too many requests are waiting".into()),
            TrySendError::Disconnected(_) => StoreError::Internal("a database thread has ended".into()),
        }
    })?;
    answered.await.map_err(|_| StoreError::Internal("a database job panicked".into()))?
}

fn run(mut connection: Connection, jobs: &Mutex<Receiver<Job>>) {
    loop {
        let next = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(job) = next else { return };
        if catch_unwind(AssertUnwindSafe(|| job(&mut connection))).is_err() {
            tracing::error!("a database job panicked; its transaction was rolled back");
        }
    }
}
