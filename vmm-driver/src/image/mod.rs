//! Images: a kernel, an initramfs and a root disk in a folder, described and sealed by a manifest.
//!
//! An [`Image`] exists only after its manifest and files were found to be whole. Images are read-only: VMs write to
//! layers of their own.

mod build;
mod cpio;
mod import;
mod manifest;
mod modules;
mod partition;
mod rootfs;
mod shelf;
mod vmlinux;

pub use build::{build_debian12, recipe_hash, sources as apt_sources};
pub use import::{Import, import};
pub use manifest::{FileSeal, Manifest};
pub use shelf::{Shelved, is_name, list, prune, remove, users};
pub(crate) use vmlinux::unpacked;

use std::path::{Path, PathBuf};

/// The guest agent, built for this machine's architecture.
pub(crate) static GUEST_AGENT: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/guest-agent.bin"));

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// The folder is no image, or a file of it is missing or changed.
    #[error("{} is not a usable image: {reason}; build it again with `tapgate image build`", dir.display())]
    Broken {
        /// The image's folder.
        dir: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// A program that is needed is missing or failed.
    #[error("building the image failed: {0}")]
    Build(String),
    /// A file could not be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
}

impl ImageError {
    pub(crate) fn io(path: &Path) -> impl FnOnce(std::io::Error) -> Self + '_ {
        move |source| Self::Io { path: path.to_owned(), source }
    }
}

/// An image that is whole.
#[derive(Clone, Debug)]
pub struct Image {
    dir: PathBuf,
    manifest: Manifest,
}

impl Image {
    /// The image's name.
    pub fn name(&self) -> &str {
        &self.manifest.name
    }

    /// Where it lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is known about it.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The kernel (bzImage).
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(&self.manifest.kernel.file)
    }

    /// The initramfs.
    pub fn initrd(&self) -> PathBuf {
        self.dir.join(&self.manifest.initrd.file)
    }

    /// The root disk: raw, sparse, never written.
    pub fn disk(&self) -> PathBuf {
        self.dir.join(&self.manifest.disk.file)
    }
}

/// Opens an image: its manifest parses, its files are there with their sizes, and those that are executed (kernel and
/// initramfs) have their hashes. The disk's hash is what [`verify`] checks: reading it costs seconds.
pub fn open(dir: &Path) -> Result<Image, ImageError> {
    let broken = |reason: String| ImageError::Broken { dir: dir.to_owned(), reason };
    let manifest = Manifest::load(dir).map_err(broken)?;
    for (seal, full) in [(&manifest.kernel, true), (&manifest.initrd, true), (&manifest.disk, false)] {
        seal.check(dir, full).map_err(broken)?;
    }
    Ok(Image { dir: dir.to_owned(), manifest })
}

/// Opens an image and checks every file's hash.
pub fn verify(dir: &Path) -> Result<Image, ImageError> {
    let image = open(dir)?;
    image
        .manifest
        .disk
        .check(dir, true)
        .map_err(|reason| ImageError::Broken { dir: dir.to_owned(), reason })?;
    Ok(image)
}

/// Where images are kept: `TAPGATE_CACHE`, else the system's cache.
pub fn default_cache() -> PathBuf {
    std::env::var_os("TAPGATE_CACHE")
        .map_or_else(|| PathBuf::from("/var/cache/tapgate"), PathBuf::from)
        .join("images")
}
