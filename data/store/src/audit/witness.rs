//! How far the log had come, written down in the other database: a log that was emptied whole, or put back to what it was before,
//! proves itself like any other.
//!
//! Must never be taken back, nor move on from an event that the log does not hold any more. Who puts both files back to the same
//! moment is not found: that is what restoring a backup does.

use super::chain::{Chain, Hash};
use crate::error::{Result, StoreError};
use crate::store::Store;
use rusqlite::{Connection, OptionalExtension as _, Transaction, params};
use std::fs::File;

/// How far the log had come when it was last looked at.
const SEEN: &str = "audit_seen";
/// The first event that was seen and later was not there.
const LOST: &str = "audit_lost";

/// An event by its number and the chain's hash.
type Place = (i64, Hash);

/// What the other database says.
enum Witness {
    Nothing,
    Seen(Place),
    Lost(Place),
    Changed,
}

impl Store {
    /// Writes down how far the audit log has come, so that it cannot go back unseen. `false` if it has gone back.
    ///
    /// # Errors
    /// One of the databases cannot be read or written, or the disk does not take what was written.
    pub async fn witness_audit(&self) -> Result<bool> {
        let witness = self.witness().await?;
        let Some((head, whole)) = self.audit.compare(&witness).await? else { return Ok(true) };
        let (name, place) = match witness {
            Witness::Seen(seen) if !whole => (LOST, seen),
            Witness::Seen(seen) if head.0 <= seen.0 => return Ok(true),
            Witness::Nothing | Witness::Seen(_) => (SEEN, head),
            Witness::Lost(_) | Witness::Changed => return Ok(false),
        };
        // What a power cut may still take is not written down: only then is it missing for a bad reason.
        self.audit.sync().await?;
        let mark = self.audit.chain.mark(name, place.0, &place.1);
        self.db.write(move |tx| keep(tx, name, &mark)).await?;
        Ok(name == SEEN)
    }

    /// Checks the whole audit log: that no event was changed, and that none is missing that was there when it was last written
    /// down. Answers how many events it holds, or what is wrong.
    ///
    /// # Errors
    /// One of the databases cannot be read.
    pub async fn verify_audit(&self) -> Result<Result<u64, String>> {
        // First: the log only goes on meanwhile.
        let witness = self.witness().await?;
        let found = self.audit.verify().await?;
        let (Ok(count), Some((head, whole))) = (&found, self.audit.compare(&witness).await?) else {
            return Ok(found);
        };
        Ok(match witness {
            Witness::Changed => Err("the record of how far it had come was changed".to_owned()),
            Witness::Lost((seq, _)) => Err(format!("event number {seq} was there once, and later was not")),
            Witness::Seen((seq, _)) if !whole => Err(format!(
                "it was emptied or an older one was put in its place: event number {seq} was there, the last is number {} now",
                head.0
            )),
            Witness::Seen(_) | Witness::Nothing => Ok(*count),
        })
    }

    async fn witness(&self) -> Result<Witness> {
        let chain = self.audit.chain.clone();
        let read = move |db: &Connection| {
            for (name, known) in [(LOST, Witness::Lost as fn(Place) -> Witness), (SEEN, Witness::Seen)] {
                let mark: Option<Vec<u8>> = db
                    .query_row("SELECT value FROM meta WHERE key = ?1", [name], |row| row.get(0))
                    .optional()?;
                if let Some(mark) = mark {
                    return Ok(chain.read_mark(name, &mark).map_or(Witness::Changed, known));
                }
            }
            Ok(Witness::Nothing)
        };
        self.db.read(read).await
    }
}

impl super::AuditLog {
    /// The log's end, and whether it still has what was seen; nothing where the end is none or was changed, which the chain tells.
    async fn compare(&self, witness: &Witness) -> Result<Option<(Place, bool)>> {
        let seen = match witness {
            Witness::Seen(place) | Witness::Lost(place) => Some(*place),
            Witness::Nothing | Witness::Changed => None,
        };
        let chain = self.chain.clone();
        let read = move |db: &Connection| {
            let Some(head) = chain.get_mark(db, "head")? else { return Ok(None) };
            match seen {
                Some(seen) => Ok(Some((head, holds(&chain, db, head, seen)?))),
                None => Ok((head.0 > 0).then_some((head, true))),
            }
        };
        self.db.read(read).await
    }

    /// Has the disk take what was committed.
    async fn sync(&self) -> Result<()> {
        let path = self.db.path().to_owned();
        let sync = move || {
            let wal = path.with_file_name("audit.db-wal");
            for path in [&wal, &path] {
                let io = |source| StoreError::Io { path: path.clone(), source };
                match File::open(path) {
                    Ok(file) => file.sync_data().map_err(io)?,
                    Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                    Err(error) => return Err(io(error)),
                }
            }
            Ok(())
        };
        tokio::task::spawn_blocking(sync).await.map_err(|error| StoreError::Internal(error.to_string()))?
    }
}

/// Whether the log has the event, or retention took it.
fn holds(chain: &Chain, db: &Connection, head: Place, seen: Place) -> Result<bool> {
    let (seq, hash) = seen;
    if head.0 < seq {
        return Ok(false);
    }
    let found: Option<Vec<u8>> =
        db.query_row("SELECT hash FROM events WHERE seq = ?1", [seq], |row| row.get(0)).optional()?;
    if let Some(found) = found {
        return Ok(found == hash);
    }
    let begins = chain.get_mark(db, "anchor")?;
    Ok(begins.is_some_and(|(last, _)| last >= seq) || chain.cut_over(db, seq)?)
}

fn keep(tx: &Transaction<'_>, name: &str, mark: &[u8]) -> Result<()> {
    tx.execute(
        "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        params![name, mark],
    )?;
    Ok(())
}
