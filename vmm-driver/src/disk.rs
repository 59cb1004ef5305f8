//! A VM's own disk: a copy-on-write layer over the image's. The image itself is never written.
//!
//! Where the file system can share blocks the layer is a reflinked raw file; elsewhere a qcow2 overlay. Which one is
//! read from the file's name, never guessed from its content: a guest writes that.

use crate::confine::tool::{self, Work};
use crate::durable;
use crate::image::Image;
use crate::spec::VmmError;
use crate::turn::Wanted;
use std::fs::{self, File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

const RAW: &str = "disk.raw";
const QCOW2: &str = "disk.qcow2";
const STANDALONE: &str = "disk.standalone.qcow2";

/// What is copied between two looks at whether it is still wanted.
const PIECE: i64 = 64 << 20;

nix::ioctl_write_int!(
    /// `FICLONE`: shares all blocks of another file.
    ficlone, 0x94, 9);

/// How a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The guest's blocks as they are.
    Raw,
    /// A qcow2 layer over the image's raw disk.
    Qcow2,
    /// A qcow2 file that holds all of the disk: from a snapshot.
    Standalone,
}

/// A VM's disk.
#[derive(Clone, Debug)]
pub struct Disk {
    /// Where it is.
    pub path: PathBuf,
    /// How it is stored.
    pub format: Format,
}

/// Which image a VM's disk was made from; the name of the file in its folder that says so.
const ORIGIN: &str = "image.json";

/// The image that the VM's disk is a layer over: the one that it was made from, whatever is the newest today. A VM
/// without a disk gets the given one, and it is noted before the disk is made.
pub fn origin(dir: &Path, newest: &Image) -> Result<Image, VmmError> {
    let note = dir.join(ORIGIN);
    match noted_image(dir)? {
        Some(from) => {
            if from == newest.dir() {
                return Ok(newest.clone());
            }
            crate::image::open(&from)
                .map_err(|e| VmmError::Disk(format!("the image that it was made from cannot be used: {e}")))
        }
        None => {
            let text = serde_json::to_vec(newest.dir()).map_err(|e| VmmError::Disk(e.to_string()))?;
            // The disk is synced after it, and would be there without it.
            durable::write(&note, &text).map_err(VmmError::io("noting the image"))?;
            Ok(newest.clone())
        }
    }
}

/// The folder of the image that a VM's disk was made from, if it is noted.
pub(crate) fn noted_image(dir: &Path) -> Result<Option<PathBuf>, VmmError> {
    let note = dir.join(ORIGIN);
    match fs::read(&note) {
        Ok(bytes) => serde_json::from_slice(&bytes)
            .map(Some)
            .map_err(|e| VmmError::Disk(format!("{}: {e}", note.display()))),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(VmmError::io(note.display().to_string())(e)),
    }
}

/// Finds the VM's disk in its folder.
pub fn find(dir: &Path) -> Option<Disk> {
    [(RAW, Format::Raw), (QCOW2, Format::Qcow2), (STANDALONE, Format::Standalone)]
        .into_iter()
        .map(|(name, format)| Disk { path: dir.join(name), format })
        .find(|disk| disk.path.exists())
}

/// The VM's disk: as it is, or made from the snapshot, or from the image if none is named; grown to `bytes` if it is smaller.
/// The format's reader works for the VM's user: what is in the file was written by a VMM that a guest may have taken over.
pub fn prepare(
    dir: &Path,
    image: &Image,
    snapshot: Option<&Path>,
    bytes: u64,
    work: Work<'_>,
) -> Result<Disk, VmmError> {
    let bytes = bytes.max(image.manifest().disk.size).next_multiple_of(1 << 20);
    let disk = match (find(dir), snapshot) {
        (Some(disk), _) => disk,
        (None, Some(snapshot)) => copy_snapshot(dir, snapshot)?,
        (None, None) => create(dir, image, bytes, work)?,
    };
    check_header(&disk, image)?;
    grow(&disk, bytes, work)?;
    Ok(disk)
}

/// The same as a raw file, whatever the file system can, for VMMs that are given nothing else: no format's parser is between
/// them and what a guest writes. It belongs to the VMM's user.
pub(crate) fn prepare_raw(
    dir: &Path,
    image: &Image,
    snapshot: Option<&Path>,
    bytes: u64,
    work: Work<'_>,
) -> Result<PathBuf, VmmError> {
    let bytes = bytes.max(image.manifest().disk.size).next_multiple_of(1 << 20);
    let path = dir.join(RAW);
    match (find(dir), snapshot) {
        (Some(Disk { format: Format::Raw, .. }), _) => {}
        (Some(_), _) => {
            return Err(VmmError::Disk(
                "it is stored as qcow2, which this driver cannot use; take a snapshot with the qemu driver and create the VM \
                 anew from it"
                    .into(),
            ));
        }
        (None, Some(snapshot)) => {
            unpack(snapshot, &path, work)?;
            if snapshot.parent() == Some(dir) {
                // Brought here for this VM alone.
                fs::remove_file(snapshot).map_err(VmmError::io("removing the snapshot's copy"))?;
            }
        }
        (None, None) => copy_raw(&image.disk(), &path, work.wanted)?,
    }
    grow(&Disk { path: path.clone(), format: Format::Raw }, bytes, work)?;
    Ok(path)
}

/// A copy of a raw disk: sharing its blocks where the file system can, else without its holes.
pub fn copy_raw(from: &Path, to: &Path, wanted: &Wanted) -> Result<(), VmmError> {
    if reflink(from, to)? {
        return Ok(());
    }
    let new = to.with_extension("new");
    let copied = sparse_copy(from, &new, wanted);
    copied
        .inspect_err(|_| drop(fs::remove_file(&new)))
        .map_err(VmmError::io(format!("copying {}", from.display())))?;
    fs::rename(&new, to).map_err(VmmError::io("naming the disk"))
}

fn sparse_copy(from: &Path, to: &Path, wanted: &Wanted) -> std::io::Result<()> {
    use nix::errno::Errno;
    use nix::unistd::{Whence, lseek};
    use std::io::{Seek as _, SeekFrom};
    let mut source = File::open(from)?;
    let _ = fs::remove_file(to);
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let length = i64::try_from(source.metadata()?.len()).map_err(std::io::Error::other)?;
    let mut at = 0;
    while at < length {
        let start = match lseek(&source, at, Whence::SeekData) {
            Ok(start) => start,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = lseek(&source, start, Whence::SeekHole)?;
        let end = end.min(start.saturating_add(PIECE));
        let (from, size) = (start.unsigned_abs(), (end - start).unsigned_abs());
        source.seek(SeekFrom::Start(from))?;
        target.seek(SeekFrom::Start(from))?;
        std::io::copy(&mut std::io::Read::take(&mut source, size), &mut target)?;
        wanted.check()?;
        at = end;
    }
    target.set_len(length.unsigned_abs())?;
    target.sync_data()
}

/// A snapshot's qcow2 file from a raw disk. Compact, and depending on no other file.
pub fn pack(raw: &Path, to: &Path, work: Work<'_>) -> Result<(), VmmError> {
    tool::pack(raw, to, work)
}

/// A raw disk from a snapshot. The reader of the format runs as the VM's user, in a view with nothing but the two files: what
/// is in the snapshot was written by a VMM that a guest may have taken over.
fn unpack(snapshot: &Path, to: &Path, work: Work<'_>) -> Result<(), VmmError> {
    check_snapshot(snapshot)?;
    let new = to.with_extension("new");
    let bytes = qcow2_size(snapshot)?;
    // A file of its own: what a daemon that was lost had begun with may still be written to.
    let _ = fs::remove_file(&new);
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new);
    file.and_then(|file| file.set_len(bytes)).map_err(VmmError::io("making the disk"))?;
    let converted = tool::convert(snapshot, "qcow2", &new, work);
    converted.inspect_err(|_| drop(fs::remove_file(&new)))?;
    File::open(&new)
        .and_then(|file| file.sync_data())
        .and_then(|()| fs::rename(&new, to))
        .map_err(VmmError::io("naming the disk"))
}

fn create(dir: &Path, image: &Image, bytes: u64, work: Work<'_>) -> Result<Disk, VmmError> {
    let raw = Disk { path: dir.join(RAW), format: Format::Raw };
    if reflink(&image.disk(), &raw.path)? {
        return Ok(raw);
    }
    let disk = Disk { path: dir.join(QCOW2), format: Format::Qcow2 };
    let new = dir.join("disk.new");
    let _ = fs::remove_file(&new);
    let empty = empty_layer(&new, image, bytes, work)?;
    // In its place only once it is whole on the medium.
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
        file.write_all(&empty)?;
        file.sync_data()?;
        fs::rename(&new, &disk.path)
    };
    write().map_err(VmmError::io("making the disk"))?;
    Ok(disk)
}

/// Empty layers that were made, each of an image's disk and a size: the same every time, and making one takes a process.
type Layers = Vec<((PathBuf, u64), Arc<[u8]>)>;
static LAYERS: Mutex<Layers> = Mutex::new(Vec::new());
const KEPT: usize = 8;

/// What an empty qcow2 file over the image's disk holds, made in `scratch` if it is not known yet.
fn empty_layer(scratch: &Path, image: &Image, bytes: u64, work: Work<'_>) -> Result<Arc<[u8]>, VmmError> {
    let key = (image.disk(), bytes);
    let known = || LAYERS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((_, layer)) = known().iter().find(|(of, _)| *of == key) {
        return Ok(layer.clone());
    }
    tool::create(scratch, bytes, Some(&image.disk()), work)?;
    let layer: Arc<[u8]> = fs::read(scratch).map_err(VmmError::io("an empty layer"))?.into();
    fs::remove_file(scratch).map_err(VmmError::io("an empty layer"))?;
    let mut layers = known();
    if layers.len() == KEPT {
        layers.remove(0);
    }
    layers.push((key, layer.clone()));
    Ok(layer)
}

/// A disk of its own from a snapshot: nothing ties it to the snapshot's file afterwards.
fn copy_snapshot(dir: &Path, snapshot: &Path) -> Result<Disk, VmmError> {
    let disk = Disk { path: dir.join(STANDALONE), format: Format::Standalone };
    check_snapshot(snapshot)?;
    if snapshot.parent() == Some(dir) {
        // Brought here for this VM alone: it becomes the disk as it is.
        private(snapshot)?;
        fs::rename(snapshot, &disk.path).map_err(VmmError::io("naming the disk"))?;
    } else if !reflink(snapshot, &disk.path)? {
        let new = dir.join("disk.new");
        fs::copy(snapshot, &new).map_err(VmmError::io(snapshot.display().to_string()))?;
        private(&new)?;
        durable::name(&new, &disk.path).map_err(VmmError::io("naming the disk"))?;
    }
    Ok(disk)
}

/// Refuses what is no snapshot, or is not there: nothing else stands in for it.
fn check_snapshot(file: &Path) -> Result<(), VmmError> {
    let refused = |why: &str| Err(VmmError::Disk(format!("the snapshot {} {why}", file.display())));
    if !file.exists() {
        return refused("is not there");
    }
    // It may come from far: it must not name a file of this host as its backing.
    if depends_on_another(file)? {
        return refused("is refused: it depends on another file");
    }
    Ok(())
}

/// An empty qcow2 file of a disk's size, for a snapshot to be written to.
pub fn create_snapshot(path: &Path, bytes: u64, work: Work<'_>) -> Result<(), VmmError> {
    tool::create(path, bytes, None, work)
}

/// Shares the image's blocks; `false` where the file system cannot.
#[expect(unsafe_code, reason = "the clone ioctl has no safe form")]
fn reflink(from: &Path, to: &Path) -> Result<bool, VmmError> {
    let source = File::open(from).map_err(VmmError::io(from.display().to_string()))?;
    let new = to.with_extension("new");
    let _ = fs::remove_file(&new);
    let target = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&new)
        .map_err(VmmError::io(new.display().to_string()))?;
    // SAFETY: both descriptors are open for the call, which takes a descriptor as its number.
    match unsafe { ficlone(target.as_raw_fd(), source.as_raw_fd() as u64) } {
        Ok(_) => {
            fs::rename(&new, to).map_err(VmmError::io("naming the disk"))?;
            Ok(true)
        }
        Err(_) => {
            let _ = fs::remove_file(&new);
            Ok(false)
        }
    }
}

fn grow(disk: &Disk, bytes: u64, work: Work<'_>) -> Result<(), VmmError> {
    match disk.format {
        Format::Raw => {
            let file = OpenOptions::new()
                .write(true)
                .open(&disk.path)
                .map_err(VmmError::io(disk.path.display().to_string()))?;
            let size = file.metadata().map_err(VmmError::io("disk"))?.len();
            if size < bytes { file.set_len(bytes).map_err(VmmError::io("growing the disk")) } else { Ok(()) }
        }
        Format::Qcow2 | Format::Standalone => {
            if qcow2_size(&disk.path)? >= bytes {
                Ok(())
            } else {
                tool::grow(&disk.path, bytes, work)
            }
        }
    }
}

/// The virtual size of a disk.
pub fn size(disk: &Disk) -> Result<u64, VmmError> {
    match disk.format {
        Format::Raw => {
            Ok(fs::metadata(&disk.path).map_err(VmmError::io(disk.path.display().to_string()))?.len())
        }
        Format::Qcow2 | Format::Standalone => qcow2_size(&disk.path),
    }
}

fn qcow2_size(path: &Path) -> Result<u64, VmmError> {
    header_field(path, 24)
}

/// Whether a qcow2 file depends on another: a backing file, or an external data file (a bit in its features).
fn depends_on_another(path: &Path) -> Result<bool, VmmError> {
    Ok(header_field(path, 8)? != 0 || has_external_data(path)?)
}

fn has_external_data(path: &Path) -> Result<bool, VmmError> {
    const EXTERNAL_DATA: u64 = 1 << 2;
    Ok(header_field(path, 72)? & EXTERNAL_DATA != 0)
}

/// Makes sure that the file still depends on what it was made to depend on. The VMM may write the whole file, header
/// included; one that a guest has taken over could name any file of the host there, which the daemon opens for it.
fn check_header(disk: &Disk, image: &Image) -> Result<(), VmmError> {
    use std::os::unix::ffi::OsStrExt as _;
    use std::os::unix::fs::FileExt as _;
    let changed = || VmmError::Disk(format!("the header of {} was tampered with", disk.path.display()));
    let depends = match disk.format {
        Format::Raw => return Ok(()),
        Format::Standalone if depends_on_another(&disk.path)? => return Err(changed()),
        Format::Standalone => return Ok(()),
        Format::Qcow2 => header_field(&disk.path, 8)?,
    };
    let expected = image.disk();
    let length = header_field(&disk.path, 16)? >> 32;
    let external = has_external_data(&disk.path)?;
    if external || usize::try_from(length).ok() != Some(expected.as_os_str().len()) {
        return Err(changed());
    }
    let mut name = vec![0u8; expected.as_os_str().len()];
    File::open(&disk.path).and_then(|file| file.read_exact_at(&mut name, depends)).map_err(|_| changed())?;
    if name == expected.as_os_str().as_bytes() { Ok(()) } else { Err(changed()) }
}

/// Eight octets of a qcow2 file's header (version 3: at least 104 octets).
fn header_field(path: &Path, at: usize) -> Result<u64, VmmError> {
    use std::os::unix::fs::FileExt as _;
    let mut header = [0u8; 104];
    File::open(path)
        .and_then(|file| file.read_exact_at(&mut header, 0))
        .map_err(VmmError::io(path.display().to_string()))?;
    if !header.starts_with(b"QFI\xfb\0\0\0\x03") {
        return Err(VmmError::Disk(format!("{} is not a qcow2 file of version 3", path.display())));
    }
    let mut field = [0u8; 8];
    field.copy_from_slice(&header[at..at + 8]);
    Ok(u64::from_be_bytes(field))
}

fn private(path: &Path) -> Result<(), VmmError> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::set_permissions(path, fs::Permissions::from_mode(0o600))
        .map_err(VmmError::io(path.display().to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::turn;

    #[tokio::test]
    async fn a_copy_that_nobody_wants_any_more_ends_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::write(&from, vec![7; 1 << 20]).unwrap();
        let over = turn::run(dir.path(), |wanted| Ok(wanted.clone())).await.unwrap();
        let error = sparse_copy(&from, &dir.path().join("half"), &over).unwrap_err().to_string();
        assert!(error.contains("not wanted any more"), "{error}");
        if !reflink(&from, &to).unwrap() {
            copy_raw(&from, &to, &over).unwrap_err();
            assert!(!to.exists() && !to.with_extension("new").exists());
        }
        copy_raw(&from, &to, &Wanted::default()).unwrap();
        assert_eq!(fs::read(&to).unwrap(), vec![7; 1 << 20]);
    }
}
