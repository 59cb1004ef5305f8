//! The open store: both files, the sealing key and the cursors' key behind one cheap handle.

use crate::audit::AuditLog;
use crate::error::{Result, StoreError};
use crate::page::Cursors;
use crate::pool::{Durability, Pool, QueueLoad};
use crate::schema;
use crate::seal::{SealError, SealKey};
use crate::tickets::Tickets;
use rusqlite::{Connection, OptionalExtension as _, Transaction};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;

/// The store. Clones share everything.
#[derive(Clone)]
pub struct Store {
    pub(crate) db: Pool,
    pub(crate) key: SealKey,
    pub(crate) cursors: Cursors,
    pub(crate) tickets: Tickets,
    pub(crate) audit: AuditLog,
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Store(..)")
    }
}

impl Store {
    /// Opens the store in a folder, making what is not there. Blocks while it checks and migrates.
    pub fn open(folder: &Path, key: SealKey) -> Result<Self> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|source| StoreError::Io { path: folder.into(), source })?;
        crate::admin::finish_restore(folder)?;
        crate::admin::check_whole(folder)?;
        let main = folder.join("tapgate.db");
        schema::prepare_main(&main).map_err(|error| error.of_file(&main))?;
        check_key(&main, &key).map_err(|error| error.of_file(&main))?;
        let cursors = Cursors::new(&key);
        let tickets = Tickets::new(&key);
        let audit = folder.join("audit.db");
        let audit = AuditLog::open(&audit, &key, cursors.clone()).map_err(|error| error.of_file(&audit))?;
        Ok(Self { db: Pool::start(&main, "store", Durability::Full)?, key, cursors, tickets, audit })
    }

    /// Whether [`Self::open`] would leave the files' form as it is. What has an older form may be opened by one process alone.
    pub fn is_current(folder: &Path) -> Result<bool> {
        schema::is_current(&folder.join("tapgate.db"), &folder.join("audit.db"))
    }

    /// The audit log.
    pub fn audit(&self) -> &AuditLog {
        &self.audit
    }

    /// Copies both databases, as they are at this moment, into a folder that must not hold them yet. The key file is
    /// not copied: keep it elsewhere. Work goes on meanwhile.
    pub async fn backup(&self, folder: &Path) -> Result<()> {
        std::fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(|source| StoreError::Io { path: folder.into(), source })?;
        let (main, audit) = (folder.join("tapgate.db"), folder.join("audit.db"));
        for path in [&main, &audit] {
            // Made private first: SQLite fills an empty file as it is.
            std::fs::OpenOptions::new()
                .write(true)
                .create_new(true)
                .mode(0o600)
                .open(path)
                .map_err(|source| StoreError::Io { path: path.clone(), source })?;
        }
        self.db.copy_to(main).await?;
        self.audit.copy_to(audit).await
    }

    /// How many jobs wait for the threads of both databases.
    pub fn load(&self) -> Vec<QueueLoad> {
        [self.db.load(), self.audit.queues()].concat()
    }

    /// Whether the database answers and can be written: what a health check asks.
    pub async fn healthy(&self) -> Result<()> {
        self.db.write(|_| Ok(())).await
    }
}

/// Remembers the key in the database at first, and refuses another one later: better at start than at the first secret.
fn check_key(path: &Path, key: &SealKey) -> Result<()> {
    let connection = crate::pool::connect(path, Durability::Full, true)?;
    let known: Option<Vec<u8>> = connection
        .query_row("SELECT value FROM meta WHERE key = 'seal_check'", [], |row| row.get(0))
        .optional()?;
    match known {
        Some(blob) => match key.open("meta", "seal_check", &blob) {
            Ok(_) => Ok(()),
            Err(_) => Err(SealError::WrongKey.into()),
        },
        None => {
            let blob = key.seal("meta", "seal_check", b"tapgate")?;
            connection.execute("INSERT INTO meta (key, value) VALUES ('seal_check', ?1)", [blob])?;
            Ok(())
        }
    }
}

/// The next policy generation.
pub(crate) fn next_generation(transaction: &Transaction<'_>) -> Result<i64> {
    Ok(transaction.query_row(
        "UPDATE meta SET value = value + 1 WHERE key = 'generation' RETURNING value",
        [],
        |row| row.get(0),
    )?)
}

/// Refuses one more row where the account has as many as it may.
pub(crate) fn quota(
    connection: &Connection,
    what: &'static str,
    count: &str,
    user: &str,
    limit: u32,
) -> Result<()> {
    let have: i64 = connection.query_row(count, [user], |row| row.get(0))?;
    if have >= i64::from(limit) {
        return Err(crate::Conflict::Quota { what, limit }.into());
    }
    Ok(())
}
