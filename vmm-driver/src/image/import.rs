//! Makes an image of a stock cloud image: a qcow2 or raw disk that somebody else built, whose guest reads our NoCloud seed with
//! cloud-init.
//!
//! The disk is a stranger's: its format is looked at before any tool is, a file that would depend on another is refused, the
//! converter runs confined, and the guest's file system is read by a memory-safe reader and never mounted.

use super::build::{Work, private_dir};
use super::manifest::{self, FileSeal, Manifest, hash_file};
use super::partition::{Part, parts};
use super::{Image, ImageError, open};
use crate::confine::tool;
use crate::disk::copy_raw;
use crate::durable;
use crate::turn::Wanted;
use ext4_view::{Ext4, Ext4Read};
use std::error::Error;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt as _, PermissionsExt as _};
use std::path::Path;

/// The largest disk that is taken.
const MAX_DISK: u64 = 1 << 40;
/// The largest kernel or initramfs.
const MAX_BOOT: u64 = 512 << 20;

/// What is imported.
#[derive(Clone, Debug)]
pub struct Import<'a> {
    /// What the image will be called.
    pub name: &'a str,
    /// The disk.
    pub disk: &'a Path,
    /// The kernel, if it is not to be taken from the disk; then the initramfs too.
    pub kernel: Option<(&'a Path, &'a Path)>,
    /// The kernel command line, if it is not to be found out.
    pub cmdline: Option<&'a str>,
}

/// Makes the image, or answers the one that was made of the same files before.
pub fn import(cache: &Path, import: &Import<'_>) -> Result<Image, ImageError> {
    if !nix::unistd::geteuid().is_root() {
        return Err(ImageError::Build("it needs root, to read the disk as a user without rights".into()));
    }
    if !plain(import.name) {
        return Err(ImageError::Build(format!(
            "`{}` is not a name; use up to 64 lower-case letters, digits, `-`, `.` and `_`",
            import.name.escape_default()
        )));
    }
    private_dir(cache)?;
    let work = Work::new(cache)?;
    let new = work.path().join("image");
    fs::create_dir(&new).map_err(ImageError::io(&new))?;
    // A copy first: what is checked is what is converted, whatever happens to the original meanwhile.
    let copy = work.path().join("source");
    copy_raw(import.disk, &copy, &Wanted::default()).map_err(|e| ImageError::Build(e.to_string()))?;
    let source = hash_file(&copy).map_err(ImageError::io(import.disk))?;
    let disk = new.join("disk.raw");
    to_raw(&copy, &disk)?;
    let boot = boot_files(import, &disk, &new)?;
    for name in ["kernel", "initrd", "disk.raw"] {
        let path = new.join(name);
        fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).map_err(ImageError::io(&path))?;
        std::os::unix::fs::chown(&path, Some(0), Some(0)).map_err(ImageError::io(&path))?;
    }
    let seal = |file: &str| FileSeal::of(&new, file).map_err(ImageError::io(&new.join(file)));
    let (kernel, initrd) = (seal("kernel")?, seal("initrd")?);
    let recipe = manifest::hex(&<sha2::Sha256 as sha2::Digest>::digest(
        format!("import {source} {} {} {}", kernel.sha256, initrd.sha256, boot.cmdline).as_bytes(),
    ));
    let manifest = Manifest {
        format: manifest::FORMAT,
        name: import.name.into(),
        recipe: recipe.clone(),
        kernel,
        initrd,
        disk: seal("disk.raw")?,
        kernel_version: boot.version,
        cmdline: boot.cmdline,
        packages: Vec::new(),
    };
    let text = serde_json::to_vec_pretty(&manifest).map_err(|e| ImageError::Build(e.to_string()))?;
    let file = new.join(manifest::FILE);
    fs::write(&file, text).map_err(ImageError::io(&file))?;
    let dir = cache.join(format!("{}-{}", import.name, &recipe[..16]));
    if let Ok(image) = open(&dir) {
        return Ok(image);
    }
    durable::name_folder(&new, &dir).map_err(ImageError::io(&dir))?;
    tracing::info!(image = %dir.display(), "imported");
    open(&dir)
}

/// A name that can be a folder's and a configuration's.
pub fn plain(name: &str) -> bool {
    let ok = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b);
    (1..=64).contains(&name.len()) && name.bytes().all(ok) && !name.starts_with(['.', '-'])
}

fn to_raw(source: &Path, disk: &Path) -> Result<(), ImageError> {
    let refused = |why: &str| ImageError::Build(format!("the disk is refused: {why}"));
    let file = File::open(source).map_err(ImageError::io(source))?;
    let mut header = [0u8; 104];
    file.read_exact_at(&mut header, 0).map_err(|_| refused("it is shorter than any disk"))?;
    let kind = Kind::of(&header).map_err(refused)?;
    let size = match kind {
        Kind::Qcow2(size) => size,
        Kind::Raw => file.metadata().map_err(ImageError::io(source))?.len(),
    };
    if size > MAX_DISK || !size.is_multiple_of(512) || size == 0 {
        return Err(refused("a disk has at most 1 TiB and whole sectors"));
    }
    match kind {
        Kind::Raw => fs::rename(source, disk).map_err(ImageError::io(disk)),
        Kind::Qcow2(_) => {
            File::create(disk).and_then(|file| file.set_len(size)).map_err(ImageError::io(disk))?;
            let work = tool::Work { uid: tool::NOBODY, wanted: &Wanted::default() };
            tool::convert(source, "qcow2", disk, work).map_err(|e| ImageError::Build(e.to_string()))
        }
    }
}

/// The formats that are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Qcow2(u64),
}

impl Kind {
    /// By the header's first octets. A qcow2 file that names any other file is refused: a tool would open it.
    fn of(header: &[u8; 104]) -> Result<Self, &'static str> {
        const EXTERNAL_DATA: u64 = 1 << 2;
        let word =
            |at: usize| u32::from_be_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let long = |at: usize| (u64::from(word(at)) << 32) | u64::from(word(at + 4));
        if !header.starts_with(b"QFI\xfb") {
            let foreign: [(&[u8], &str); 4] = [
                (b"KDMV", "it is a VMDK file; convert it to qcow2 first"),
                (b"vhdxfile", "it is a VHDX file; convert it to qcow2 first"),
                (b"conectix", "it is a VHD file; convert it to qcow2 first"),
                (b"\xfd7zXZ", "it is packed by xz; unpack it first"),
            ];
            let known = foreign.iter().find(|(magic, _)| header.starts_with(magic));
            return known.map_or(Ok(Self::Raw), |(_, why)| Err(why));
        }
        if !matches!(word(4), 2 | 3) {
            return Err("it is a qcow2 file of an unknown version");
        }
        if long(8) != 0 {
            return Err(
                "it has a backing file, and would show the guest whatever file of this host that names",
            );
        }
        if word(32) != 0 {
            return Err("it is encrypted");
        }
        if word(4) == 3 && long(72) & EXTERNAL_DATA != 0 {
            return Err("its data lies in another file");
        }
        Ok(Self::Qcow2(long(24)))
    }
}

/// What boots the disk.
struct Boot {
    version: String,
    cmdline: String,
}

fn boot_files(import: &Import<'_>, disk: &Path, to: &Path) -> Result<Boot, ImageError> {
    let found = look(disk);
    let cmdline = match (import.cmdline, &found) {
        (Some(cmdline), _) => cmdline.to_owned(),
        (None, Ok(found)) => format!("root=UUID={} ro", found.root),
        (None, Err(why)) => {
            return Err(ImageError::Build(format!(
                "{why}; say where its root is with --cmdline 'root=… ro'"
            )));
        }
    };
    if cmdline.len() > 1024 || cmdline.contains(|c: char| c.is_control()) {
        return Err(ImageError::Build("the kernel command line is one line of at most 1024 octets".into()));
    }
    let put = |name: &str, bytes: &[u8]| {
        let path = to.join(name);
        fs::write(&path, bytes).map_err(ImageError::io(&path))
    };
    let version = match (import.kernel, found) {
        (Some((kernel, initrd)), _) => {
            for (from, name) in [(kernel, "kernel"), (initrd, "initrd")] {
                fs::copy(from, to.join(name)).map_err(ImageError::io(from))?;
            }
            "given".to_owned()
        }
        (None, Ok(found)) => {
            put("kernel", &found.kernel)?;
            put("initrd", &found.initrd)?;
            found.version
        }
        (None, Err(why)) => {
            return Err(ImageError::Build(format!(
                "{why}; give its kernel and initramfs with --kernel and --initrd"
            )));
        }
    };
    Ok(Boot { version, cmdline })
}

/// What was found on a disk.
struct Found {
    root: String,
    version: String,
    kernel: Vec<u8>,
    initrd: Vec<u8>,
}

/// Looks for the root file system and the newest kernel with its initramfs: in its `/boot`, or on a partition of its own.
fn look(disk: &Path) -> Result<Found, String> {
    let file = File::open(disk).map_err(|e| e.to_string())?;
    let mut root = None;
    let mut kernel = None;
    for part in parts(&file).map_err(|e| e.to_string())? {
        let Some(fs) = ext4(&file, part) else { continue };
        if root.is_none()
            && ["/etc/os-release", "/usr/lib/os-release"].iter().any(|path| fs.exists(*path).unwrap_or(false))
        {
            root = Some(fs.uuid().to_string());
        }
        for folder in ["/boot", "/"] {
            kernel = kernel.or_else(|| newest(&fs, folder));
        }
    }
    let root = root.ok_or("no ext4 file system on the disk is a system's root")?;
    let (version, kernel, initrd) = kernel.ok_or("there is no kernel with an initramfs in its /boot")?;
    Ok(Found { root, version, kernel, initrd })
}

fn ext4(disk: &File, part: Part) -> Option<Ext4> {
    let disk = disk.try_clone().ok()?;
    Ext4::load(Box::new(Region { disk, start: part.start })).ok()
}

/// A part of a disk as the reader sees it.
struct Region {
    disk: File,
    start: u64,
}

impl Ext4Read for Region {
    fn read(&mut self, at: u64, bytes: &mut [u8]) -> Result<(), Box<dyn Error + Send + Sync>> {
        let at = self.start.checked_add(at).ok_or("behind every disk's end")?;
        Ok(self.disk.read_exact_at(bytes, at)?)
    }
}

/// The newest kernel of a folder that has an initramfs: version, kernel, initramfs.
fn newest(fs: &Ext4, folder: &str) -> Option<(String, Vec<u8>, Vec<u8>)> {
    let mut versions: Vec<String> = fs
        .read_dir(folder)
        .ok()?
        .filter_map(|entry| {
            entry.ok()?.file_name().as_str().ok()?.strip_prefix("vmlinuz-").map(str::to_owned)
        })
        .collect();
    versions.sort_by_key(|version| std::cmp::Reverse(numbers(version)));
    let folder = folder.trim_end_matches('/');
    versions.into_iter().find_map(|version| {
        let kernel = read(fs, &format!("{folder}/vmlinuz-{version}"))?;
        let names = [format!("{folder}/initrd.img-{version}"), format!("{folder}/initramfs-{version}.img")];
        let initrd = names.iter().find_map(|name| read(fs, name))?;
        Some((version, kernel, initrd))
    })
}

fn read(fs: &Ext4, path: &str) -> Option<Vec<u8>> {
    let size = fs.metadata(path).ok()?.len();
    if size == 0 || size > MAX_BOOT {
        return None;
    }
    fs.read(path).ok()
}

/// A version's numbers, so that 6.10 comes after 6.9.
fn numbers(version: &str) -> Vec<u64> {
    version.split(|c: char| !c.is_ascii_digit()).filter_map(|part| part.parse().ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(version: u32) -> [u8; 104] {
        let mut header = [0u8; 104];
        header[..4].copy_from_slice(b"QFI\xfb");
        header[4..8].copy_from_slice(&version.to_be_bytes());
        header[24..32].copy_from_slice(&(1u64 << 30).to_be_bytes());
        header
    }

    #[test]
    fn a_disk_that_leads_to_another_file_is_refused() {
        for version in [2, 3] {
            assert_eq!(Kind::of(&header(version)), Ok(Kind::Qcow2(1 << 30)));
            let mut backed = header(version);
            backed[15] = 1;
            assert!(Kind::of(&backed).unwrap_err().contains("backing file"));
            let mut encrypted = header(version);
            encrypted[35] = 1;
            assert!(Kind::of(&encrypted).unwrap_err().contains("encrypted"));
        }
        let mut external = header(3);
        external[79] = 4;
        assert!(Kind::of(&external).unwrap_err().contains("another file"));
        assert!(Kind::of(&header(4)).is_err());
        let mut vmdk = [0u8; 104];
        vmdk[..4].copy_from_slice(b"KDMV");
        assert!(Kind::of(&vmdk).unwrap_err().contains("VMDK"));
        assert_eq!(Kind::of(&[0; 104]), Ok(Kind::Raw));
    }

    #[test]
    fn names_and_versions() {
        for bad in ["", "../x", ".x", "A", "a b", "-x", &"x".repeat(65)] {
            assert!(!plain(bad), "{bad}");
        }
        assert!(plain("debian-13.1_cloud"));
        assert!(numbers("6.10.0-1-amd64") > numbers("6.9.12-3-amd64"));
    }
}
