//! The folders on the BPF file system that keep an instance's programs and maps alive.
//!
//! `<root>/<instance>/maps-<version>` holds the maps, `<root>/<instance>/links` the programs' attachments, which a newer
//! version takes over.

use crate::DatapathError;
use nix::{
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{BPF_FS_MAGIC, statfs},
};
use std::{
    fs::{self, OpenOptions},
    io,
    path::{Path, PathBuf},
};
use tapgate_ebpf_common::maps::VERSION;

const STANDARD: &str = "/sys/fs/bpf";
const LOCK: &str = "/run/tapgate-bpffs.lock";

/// The instance's folder, with those of this version in it; mounts the file system if need be.
pub(crate) fn prepare(root: &Path, instance: &str) -> Result<PathBuf, DatapathError> {
    let point = if root.starts_with(STANDARD) { Path::new(STANDARD) } else { root };
    mounted(point).map_err(|source| DatapathError::Pins {
        what: "mount the BPF file system on",
        path: point.into(),
        source,
    })?;
    let pins = root.join(instance);
    for folder in [maps(&pins), links(&pins)] {
        fs::create_dir_all(&folder).map_err(|source| DatapathError::Pins {
            what: "make the folder",
            path: folder.clone(),
            source,
        })?;
    }
    Ok(pins)
}

/// Where this version's maps are.
pub(crate) fn maps(pins: &Path) -> PathBuf {
    pins.join(format!("maps-{VERSION}"))
}

/// Where the attachments are.
pub(crate) fn links(pins: &Path) -> PathBuf {
    pins.join("links")
}

/// Removes everything of the instance.
pub(crate) fn remove(root: &Path, instance: &str) -> Result<(), DatapathError> {
    remove_if_there(&root.join(instance), |path| fs::remove_dir_all(path))?;
    // The root goes too if this was the last instance, unless it is a mount point.
    let _ = fs::remove_dir(root);
    Ok(())
}

/// Removes the maps of other versions, when no program uses them any more.
pub(crate) fn remove_other_versions(pins: &Path) -> Result<(), DatapathError> {
    let entries = fs::read_dir(pins).map_err(|source| DatapathError::Pins {
        what: "list",
        path: pins.into(),
        source,
    })?;
    let own = maps(pins);
    let other = |path: &PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        *path != own && name.is_some_and(|name| name.starts_with("maps-"))
    };
    for path in entries.filter_map(|entry| Some(entry.ok()?.path())).filter(other) {
        remove_if_there(&path, |path| fs::remove_dir_all(path))?;
    }
    Ok(())
}

/// Gives a pin another name.
pub(crate) fn rename(from: &Path, to: &Path) -> Result<(), DatapathError> {
    fs::rename(from, to).map_err(|source| DatapathError::Pins { what: "rename", path: from.into(), source })
}

/// Removes one pin, if it is there.
pub(crate) fn unpin(path: &Path) -> Result<(), DatapathError> {
    remove_if_there(path, |path| fs::remove_file(path))
}

fn remove_if_there(path: &Path, remove: impl FnOnce(&Path) -> io::Result<()>) -> Result<(), DatapathError> {
    match remove(path) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(DatapathError::Pins { what: "remove", path: path.into(), source })
        }
        _ => Ok(()),
    }
}

fn mounted(point: &Path) -> io::Result<()> {
    // One at a time: a second mount on top would hide the first one's pins.
    let file = OpenOptions::new().create(true).truncate(false).write(true).open(LOCK)?;
    let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| errno)?;
    fs::create_dir_all(point)?;
    if statfs(point)?.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), point, Some("bpf"), flags, Some("mode=0700"))?;
    Ok(())
}
