//! The images in a folder: which there are, which are in use, which may go.
//!
//! An image that a VM's disk lies over is never removed: the disk would be lost with it.

use super::manifest::Manifest;
use super::{ImageError, import};
use crate::disk;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// An image's folder.
#[derive(Clone, Debug)]
pub struct Shelved {
    /// Where it is.
    pub dir: PathBuf,
    /// What is in it.
    pub manifest: Manifest,
    /// When it was made.
    pub made: SystemTime,
}

/// All images of the folder, newest first. What is no image is not listed.
pub fn list(folder: &Path) -> Vec<Shelved> {
    let mut found: Vec<Shelved> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let dir = entry.path();
            let hidden = entry.file_name().to_str().is_none_or(|name| name.starts_with('.'));
            let manifest = if hidden { None } else { Manifest::load(&dir).ok() };
            let made = entry.metadata().and_then(|data| data.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
            Some(Shelved { dir, manifest: manifest?, made })
        })
        .collect();
    found.sort_by(|a, b| b.made.cmp(&a.made).then(a.dir.cmp(&b.dir)));
    found
}

/// Which VMs' disks lie over which image, by what is noted in their folders below `data_dir`. What cannot be read is an error:
/// it could be the one that matters.
pub fn users(data_dir: &Path) -> Result<BTreeMap<PathBuf, Vec<String>>, ImageError> {
    let mut users: BTreeMap<PathBuf, Vec<String>> = BTreeMap::new();
    let vms = data_dir.join("vms");
    let entries = match fs::read_dir(&vms) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(users),
        Err(error) => return Err(ImageError::io(&vms)(error)),
    };
    for entry in entries {
        let entry = entry.map_err(ImageError::io(&vms))?;
        let Some(image) = disk::noted_image(&entry.path()).map_err(|e| ImageError::Build(e.to_string()))?
        else {
            continue;
        };
        users.entry(image).or_default().push(entry.file_name().to_string_lossy().into_owned());
    }
    Ok(users)
}

/// Removes an image that no VM needs, by its folder's name or by its own if there is one such image.
pub fn remove(folder: &Path, name: &str, data_dir: &Path) -> Result<PathBuf, ImageError> {
    let refuse = |why: String| Err(ImageError::Build(why));
    let all = list(folder);
    let named = |shelved: &&Shelved| {
        shelved.dir.file_name().is_some_and(|dir| dir == name) || shelved.manifest.name == name
    };
    let chosen: Vec<&Shelved> = all.iter().filter(named).collect();
    let dir = match chosen[..] {
        [] => {
            return refuse(format!(
                "there is no image `{name}` in {}; see `tapgate image list`",
                folder.display()
            ));
        }
        [one] => one.dir.clone(),
        [..] => {
            return refuse(format!(
                "there are {} images `{name}`; say which by its folder's name",
                chosen.len()
            ));
        }
    };
    if let Some(vms) = users(data_dir)?.get(&dir) {
        return refuse(format!("{} VMs need it: {}; destroy them first", vms.len(), vms.join(", ")));
    }
    take_away(folder, &dir)?;
    Ok(dir)
}

/// Removes every image that no VM needs and that is not the newest of its name. `keep` is what the daemon would use.
pub fn prune(folder: &Path, data_dir: &Path, keep: &[PathBuf]) -> Result<Vec<PathBuf>, ImageError> {
    let needed = users(data_dir)?;
    let mut names: Vec<String> = Vec::new();
    let mut removed = Vec::new();
    for shelved in list(folder) {
        let newest = !names.contains(&shelved.manifest.name);
        names.push(shelved.manifest.name.clone());
        if newest || keep.contains(&shelved.dir) || needed.contains_key(&shelved.dir) {
            continue;
        }
        take_away(folder, &shelved.dir)?;
        removed.push(shelved.dir);
    }
    Ok(removed)
}

/// Out of sight at once, then away: nobody finds half an image.
fn take_away(folder: &Path, dir: &Path) -> Result<(), ImageError> {
    let hidden = folder.join(format!(".removed-{}", std::process::id()));
    let _ = fs::remove_dir_all(&hidden);
    fs::rename(dir, &hidden).map_err(ImageError::io(dir))?;
    fs::remove_dir_all(&hidden).map_err(ImageError::io(&hidden))
}

/// Whether this can be an image's name.
pub fn is_name(name: &str) -> bool {
    import::plain(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::FileSeal;

    fn image(folder: &Path, dir: &str, name: &str) -> PathBuf {
        let path = folder.join(dir);
        fs::create_dir(&path).unwrap();
        for file in ["kernel", "initrd", "disk.raw"] {
            fs::write(path.join(file), file).unwrap();
        }
        let seal = |file: &str| FileSeal::of(&path, file).unwrap();
        let manifest = Manifest {
            format: 1,
            name: name.into(),
            recipe: dir.into(),
            kernel: seal("kernel"),
            initrd: seal("initrd"),
            disk: seal("disk.raw"),
            kernel_version: "0".into(),
            cmdline: String::new(),
            packages: Vec::new(),
        };
        fs::write(path.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        path
    }

    #[test]
    fn what_a_vm_needs_stays() {
        let (folder, data) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (folder, data) = (folder.path(), data.path());
        let old = image(folder, "debian-1", "debian");
        let older = image(folder, "debian-0", "debian");
        std::thread::sleep(std::time::Duration::from_millis(20));
        let new = image(folder, "debian-2", "debian");
        fs::create_dir(folder.join("rubbish")).unwrap();
        let vm = data.join("vms/vm_a");
        fs::create_dir_all(&vm).unwrap();
        fs::write(vm.join("image.json"), serde_json::to_vec(&old).unwrap()).unwrap();

        assert_eq!(list(folder).len(), 3);
        assert!(remove(folder, "debian-1", data).unwrap_err().to_string().contains("vm_a"));
        assert!(remove(folder, "debian", data).unwrap_err().to_string().contains("3 images"));
        assert!(remove(folder, "rubbish", data).unwrap_err().to_string().contains("no image"));
        assert_eq!(prune(folder, data, &[]).unwrap(), [older]);
        assert!(old.exists() && new.exists());
        fs::write(vm.join("image.json"), "rubbish").unwrap();
        assert!(prune(folder, data, &[]).is_err() && remove(folder, "debian-2", data).is_err());
        fs::remove_dir_all(&vm).unwrap();
        assert_eq!(remove(folder, "debian-1", data).unwrap(), old);
        assert_eq!(list(folder).len(), 1);
    }
}
