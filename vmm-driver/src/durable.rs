//! Files that are whole or not there, whatever happens to the machine: written beside, synced, named, and the name synced.
//!
//! For what is read again after a power cut and cannot be made again by whoever reads it.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

/// Writes a small file whole.
pub(crate) fn write(path: &Path, octets: &[u8]) -> io::Result<()> {
    let new = path.with_extension("new");
    fs::write(&new, octets)?;
    name(&new, path)
}

/// Gives a file that is written its name.
pub(crate) fn name(new: &Path, path: &Path) -> io::Result<()> {
    File::open(new)?.sync_all()?;
    fs::rename(new, path)?;
    folder(path)
}

/// The same for a folder of files.
pub(crate) fn name_folder(new: &Path, path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(new)? {
        File::open(entry?.path())?.sync_all()?;
    }
    name(new, path)
}

/// Syncs the names beside a path.
fn folder(path: &Path) -> io::Result<()> {
    path.parent().map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}
