//! The operator's work on a store that no daemon has open: another sealing key, a backup put back.

use crate::error::{Result, StoreError};
use crate::idempotency;
use crate::pool::{Durability, connect};
use crate::seal::SealKey;
use crate::store::Store;
use rusqlite::params;
use std::fs::Permissions;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

/// What is sealed, answers kept for retries aside: table, id column, sealed column, and the name that it is sealed under.
const SEALED: &[(&str, &str, &str, &str)] = &[
    ("secrets", "id", "value", "secrets"),
    ("env", "id", "value", "env"),
    ("vms", "id", "ca_key", "vms.ca_key"),
    ("meta", "key", "value", "meta"),
];

/// The files of a store.
const FILES: [&str; 2] = ["tapgate.db", "audit.db"];

/// What the names of folders begin with in which a backup is made ready.
const RESTORING: &str = "restoring-";

/// The same folder's once all in it is whole and on the disk. From then on it takes the store's place, however often that is begun.
const DECIDED: &str = "restored-";

/// Where what was there before goes.
const BEFORE: &str = "before-restore-";

impl Store {
    /// Makes a new sealing key and seals everything anew. Interrupted at any point, everything still opens, and doing it
    /// again completes it. Answers how many values were sealed.
    pub fn rotate_key(folder: &Path, key_file: &Path) -> Result<usize> {
        let path = folder.join("tapgate.db");
        let key = SealKey::load(key_file)?;
        // Refuses a key file of another store before anything is changed.
        drop(Self::open(folder, key)?);
        let key = SealKey::add_fresh(key_file)?;
        let mut connection = connect(&path, Durability::Full, true)?;
        let tx = connection.transaction()?;
        let mut count = 0;
        for (table, id, column, name) in SEALED {
            let only = if *table == "meta" { " WHERE key = 'seal_check'" } else { "" };
            let mut select = tx.prepare(&format!("SELECT {id}, {column} FROM {table}{only}"))?;
            let rows: Vec<(String, Vec<u8>)> = select
                .query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?
                .collect::<rusqlite::Result<_>>()?;
            for (row, blob) in rows.iter().filter(|(_, blob)| !blob.is_empty()) {
                let plain = key.open(name, row, blob)?;
                let sealed = key.seal(name, row, &plain)?;
                tx.execute(
                    &format!("UPDATE {table} SET {column} = ?2 WHERE {id} = ?1"),
                    params![row, sealed],
                )?;
                count += 1;
            }
        }
        count += idempotency::seal_anew(&tx, &key)?;
        tx.commit()?;
        // The old values are gone from the file too, not just from its tables.
        connection.execute_batch("VACUUM; PRAGMA wal_checkpoint(TRUNCATE)")?;
        SealKey::drop_old(key_file)?;
        Ok(count)
    }

    /// Puts a backup in the place of a store. The backup is opened and checked first; what was there before is moved
    /// aside, into a folder whose name is answered.
    pub fn restore(folder: &Path, backup: &Path, key: SealKey) -> Result<PathBuf> {
        finish_restore(folder)?;
        let beside = folder.join(format!("{RESTORING}{}", std::process::id()));
        private(&beside).map_err(io(&beside))?;
        let checked = take(backup, &beside).and_then(|()| Self::open(&beside, key));
        if let Err(error) = checked.map(drop) {
            let _ = std::fs::remove_dir_all(&beside);
            return Err(error);
        }
        for name in FILES {
            let connection = connect(&beside.join(name), Durability::Full, true)?;
            connection.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)")?;
            sync(&beside.join(name))?;
        }
        sync(&beside)?;
        let mut now = jiff::Timestamp::now().as_second();
        while folder.join(format!("{BEFORE}{now}")).exists() {
            now += 1;
        }
        let decided = folder.join(format!("{DECIDED}{now}"));
        std::fs::rename(&beside, &decided).map_err(io(&beside))?;
        sync(folder)?;
        finish_restore(folder)?;
        for left in named(folder, RESTORING) {
            let _ = std::fs::remove_dir_all(left.0);
        }
        Ok(folder.join(format!("{BEFORE}{now}")))
    }
}

/// Puts in place what a restore decided on: both files or, if it is cut off, both at the next start. A file that is not in the
/// decided folder any more is in its place already.
pub(crate) fn finish_restore(folder: &Path) -> Result<()> {
    for (decided, moment) in named(folder, DECIDED) {
        let aside = folder.join(format!("{BEFORE}{moment}"));
        if !aside.exists() {
            private(&aside).map_err(io(&aside))?;
        }
        for name in FILES {
            let new = decided.join(name);
            if !new.exists() {
                continue;
            }
            for suffix in ["", "-wal", "-shm"] {
                let old = folder.join(format!("{name}{suffix}"));
                if old.exists() {
                    std::fs::rename(&old, aside.join(format!("{name}{suffix}"))).map_err(io(&old))?;
                }
            }
            std::fs::rename(&new, folder.join(name)).map_err(io(&new))?;
        }
        sync(folder)?;
        std::fs::remove_dir_all(&decided).map_err(io(&decided))?;
    }
    Ok(())
}

/// Others may look into the store's folder itself, for guests' programs pass through it.
fn private(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().mode(0o700).create(path)
}

fn sync(path: &Path) -> Result<()> {
    std::fs::File::open(path).and_then(|file| file.sync_all()).map_err(io(path))
}

/// Copies a backup's files.
fn take(backup: &Path, to: &Path) -> Result<()> {
    for name in FILES {
        let (from, to) = (backup.join(name), to.join(name));
        std::fs::copy(&from, &to).map_err(io(&from))?;
        // Not as the backup's file is, which may have come from anywhere.
        std::fs::set_permissions(&to, Permissions::from_mode(0o600)).map_err(io(&to))?;
    }
    Ok(())
}

fn io(path: &Path) -> impl FnOnce(std::io::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Io { path, source }
}

/// Folders of restores that go on, or were cut off, and what follows in their names.
fn named(folder: &Path, start: &'static str) -> impl Iterator<Item = (PathBuf, String)> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(move |entry| {
        let name = entry.file_name().into_string().ok()?;
        Some((entry.path(), name.strip_prefix(start)?.to_owned()))
    })
}

/// Refuses a store of which a restore that was cut off left a part: an empty file would be made in the place of what is missing, and
/// be taken for the whole.
pub(crate) fn check_whole(folder: &Path) -> Result<()> {
    let missing = FILES.iter().any(|name| !folder.join(name).exists());
    match missing.then(|| named(folder, RESTORING).next()).flatten() {
        Some((left, _)) => Err(StoreError::Corrupt(format!("a restore was cut off ({})", left.display()))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Expected, NewUser};

    /// Killed after the new key was written, and after everything was sealed but before the old key went: both open.
    #[tokio::test]
    async fn a_rotation_that_was_cut_off_opens_and_can_be_done_again() {
        let folder = tempfile::tempdir().unwrap();
        let (db, file) = (folder.path().join("db"), folder.path().join("seal.key"));
        let store = Store::open(&db, SealKey::load_or_create(&file).unwrap()).unwrap();
        let new = NewUser {
            email: "a@example.com".into(),
            first_name: "A".into(),
            last_name: "L".into(),
            password: "$argon2id$".into(),
        };
        let user = store.user_create(new, "key").await.unwrap().0.id;
        store.env_set(&user, "E", "value", 10, Expected::any()).await.unwrap();
        drop(store);
        let opens = async || {
            let store = Store::open(&db, SealKey::load(&file).unwrap()).unwrap();
            store.env(&user, "E").await.unwrap().value == "value"
        };
        let first = std::fs::read_to_string(&file).unwrap();
        SealKey::add_fresh(&file).unwrap();
        assert!(opens().await);
        let both = std::fs::read_to_string(&file).unwrap();
        assert_eq!(both.lines().count(), first.lines().count() + 1);
        Store::rotate_key(&db, &file).unwrap();
        assert!(opens().await);
        // What was sealed by the newest key opens with the older ones still beside it.
        let newest = std::fs::read_to_string(&file).unwrap();
        assert_eq!(newest.lines().count(), 2, "a key that seals, and the one that authenticates");
        std::fs::write(&file, format!("{}\n{both}", newest.lines().next().unwrap())).unwrap();
        assert!(opens().await);
        Store::rotate_key(&db, &file).unwrap();
        assert!(opens().await);
    }
}
