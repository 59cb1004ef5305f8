//! The schemas and how a file gets to the newest: forward only, with a copy of the file made before.

use crate::error::{Result, StoreError};
use crate::pool::{Durability, connect};
use rusqlite::Connection;
use rusqlite_migration::{M, Migrations};
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

const TAPGATE: &[&str] = &[
    include_str!("migrations/tapgate-1.sql"),
    include_str!("migrations/tapgate-2.sql"),
    include_str!("migrations/tapgate-3.sql"),
    include_str!("migrations/tapgate-4.sql"),
    include_str!("migrations/tapgate-5.sql"),
    include_str!("migrations/tapgate-6.sql"),
    include_str!("migrations/tapgate-7.sql"),
];
const AUDIT: &[&str] = &[
    include_str!("migrations/audit-1.sql"),
    include_str!("migrations/audit-2.sql"),
    include_str!("migrations/audit-3.sql"),
    include_str!("migrations/audit-4.sql"),
];

/// How SQLite names a file whose empty pages can be given back a few at a time.
const INCREMENTAL: i64 = 2;
/// Octets of the audit log's pages: a question reads lists of tens of KiB, and each page costs a call.
const PAGE: i64 = 16_384;

/// Brings `tapgate.db` up to date.
pub(crate) fn prepare_main(path: &Path) -> Result<()> {
    prepare(path, TAPGATE, Durability::Full, true)
}

/// Brings `audit.db` up to date. It may be large, so its pages are not all checked.
pub(crate) fn prepare_audit(path: &Path) -> Result<()> {
    create(path)?;
    let anew = Connection::open(path)?;
    let is = |name: &str| anew.pragma_query_value(None, name, |row| row.get::<_, i64>(0));
    if (is("page_size")?, is("auto_vacuum")?) != (PAGE, INCREMENTAL) {
        // Takes hold when the file is written anew; a new one is empty. Without it the log is kept as well, in a file that
        // never gets smaller and whose pages take longer to read.
        let shape = format!(
            "PRAGMA journal_mode = delete; PRAGMA page_size = {PAGE}; PRAGMA auto_vacuum = {INCREMENTAL}; VACUUM"
        );
        if let Err(error) = anew.execute_batch(&shape) {
            tracing::warn!(%error, "the audit log's file keeps its old form: it will not get smaller");
        }
    }
    drop(anew);
    prepare(path, AUDIT, Durability::Normal, false)
}

/// Whether the files of a store are in the newest form, or not there: opening them then changes nothing that another process
/// which has them open would stumble over.
pub(crate) fn is_current(main: &Path, audit: &Path) -> Result<bool> {
    for (path, steps) in [(main, TAPGATE.len()), (audit, AUDIT.len())] {
        if !path.exists() {
            continue;
        }
        let connection = connect(path, Durability::Normal, false)?;
        let version: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if usize::try_from(version).is_ok_and(|version| version < steps) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// SQLite would make it readable to all; its -wal and -shm take the mode of the file itself.
fn create(path: &Path) -> Result<()> {
    let made = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
    made.map(drop).map_err(|source| StoreError::Io { path: path.into(), source })
}

fn prepare(path: &Path, steps: &[&'static str], durability: Durability, check: bool) -> Result<()> {
    create(path)?;
    let mut connection = connect(path, durability, true)?;
    if check {
        let verdict: String = connection.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
        if verdict != "ok" {
            return Err(StoreError::Corrupt(format!("{}: {verdict}", path.display())));
        }
    }
    let version: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let version = usize::try_from(version).unwrap_or(usize::MAX);
    if version > steps.len() {
        return Err(StoreError::Corrupt(format!(
            "{} was written by a newer tapgate (schema {version}, this one knows {}); install that one",
            path.display(),
            steps.len()
        )));
    }
    if version > 0 && version < steps.len() {
        back_up(&connection, &path.with_extension(format!("db.before-{}", steps.len())))?;
    }
    let migrations = Migrations::new(steps.iter().map(|sql| M::up(sql)).collect());
    migrations.to_latest(&mut connection).map_err(|error| match error {
        rusqlite_migration::Error::RusqliteError { err, .. } => err.into(),
        other => StoreError::Internal(other.to_string()),
    })
}

/// A copy of the file, private as the file itself is, and in its place only once it is whole.
fn back_up(connection: &Connection, to: &Path) -> Result<()> {
    if to.exists() {
        return Ok(());
    }
    let io = |source| StoreError::Io { path: to.into(), source };
    let beside = to.with_extension("unfinished");
    // What a start that was cut off left, if it did.
    let _ = std::fs::remove_file(&beside);
    // SQLite fills an empty file as it is, and would make another readable to all.
    OpenOptions::new().create_new(true).write(true).mode(0o600).open(&beside).map_err(io)?;
    connection.execute("VACUUM INTO ?1", [beside.to_string_lossy()])?;
    std::fs::rename(&beside, to).map_err(io)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;

    #[test]
    fn files_are_private_and_ours_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tapgate.db");
        prepare_main(&path).unwrap();
        prepare_main(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);

        connect(&path, Durability::Full, true).unwrap().pragma_update(None, "user_version", 99).unwrap();
        assert!(prepare_main(&path).unwrap_err().to_string().contains("newer tapgate"));

        let other = folder.path().join("other.db");
        std::fs::write(
            &other,
            "not a database, but long enough to be mistaken for the header of one".repeat(30),
        )
        .unwrap();
        assert!(matches!(prepare_main(&other), Err(StoreError::Corrupt(_))));
    }

    #[test]
    fn each_migration_leaves_a_whole_private_copy_of_what_was() {
        for (name, steps) in [("tapgate.db", TAPGATE), ("audit.db", AUDIT)] {
            for from in 1..steps.len() {
                let folder = tempfile::tempdir().unwrap();
                let path = folder.path().join(name);
                prepare(&path, &steps[..from], Durability::Full, true).unwrap();
                let old = connect(&path, Durability::Full, true).unwrap();
                old.execute("INSERT INTO meta (key, value) VALUES ('mine', 7)", []).unwrap();
                drop(old);
                let copy = path.with_extension(format!("db.before-{}", steps.len()));
                // What a start that was cut off left.
                std::fs::write(copy.with_extension("unfinished"), "half").unwrap();
                prepare(&path, steps, Durability::Full, true).unwrap();
                assert_eq!(std::fs::metadata(&copy).unwrap().mode() & 0o777, 0o600);
                for (file, version) in [(&path, steps.len()), (&copy, from)] {
                    let db = connect(file, Durability::Full, true).unwrap();
                    let of = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
                    assert_eq!(of("SELECT value FROM meta WHERE key = 'mine'"), 7);
                    assert_eq!(usize::try_from(of("PRAGMA user_version")).unwrap(), version);
                }
            }
        }
    }

    /// However much was there once: what is destroyed stays for good, and codes come from anywhere.
    #[test]
    fn no_statement_goes_through_all_that_ever_was() {
        use crate::{collection, device, vms};
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tapgate.db");
        prepare_main(&path).unwrap();
        let db = connect(&path, Durability::Full, true).unwrap();
        for sql in [
            vms::MEMORY_TAKEN,
            vms::DISK_TAKEN,
            vms::LIVING,
            vms::HELD,
            vms::LIVING_STATES,
            collection::RESTING,
            collection::UNUSED,
            device::LONG_OVER,
        ] {
            let mut plan = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let none: Vec<Option<i64>> = vec![None; plan.parameter_count()];
            let rows = plan.query_map(rusqlite::params_from_iter(none), |row| row.get(3)).unwrap();
            let lines: Vec<String> = rows.map(std::result::Result::unwrap).collect();
            // Of these indexes all rows are what there is now.
            let now = ["vms_port", "vms_slot", "vms_living", "snapshots_uncollected"];
            let bad = |line: &&String| {
                line.starts_with("SCAN") && !now.iter().any(|index| line.contains(&format!("INDEX {index}")))
                    || line.contains("INDEX vms_detail")
                    || line.contains("INDEX vms_created")
            };
            assert!(!lines.iter().any(|line| bad(&line)), "{lines:?}: {sql}");
        }
    }

    #[test]
    fn a_damaged_page_is_found_at_start() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tapgate.db");
        prepare_main(&path).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        assert!(bytes.len() > 3 * 4096, "the schema takes several pages");
        bytes[2 * 4096..2 * 4096 + 64].fill(0xff);
        std::fs::write(&path, bytes).unwrap();
        assert!(matches!(prepare_main(&path), Err(StoreError::Corrupt(_))));
    }
}
