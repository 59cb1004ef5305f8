//! An image's manifest: which files it has, their hashes, what is in it. Text written by people and old versions too, so
//! read with distrust: file names stay inside the image's folder.

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::fs::File;
use std::io::Read as _;
use std::path::Path;

/// The manifest's file name.
pub const FILE: &str = "manifest.json";
/// What this version reads and writes.
pub const FORMAT: u32 = 1;
const MAX_MANIFEST: u64 = 4 << 20;

/// What an image consists of.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format's version.
    pub format: u32,
    /// The image's name: `debian-12`.
    pub name: String,
    /// The hash of everything that went into it.
    pub recipe: String,
    /// The kernel (bzImage).
    pub kernel: FileSeal,
    /// The initramfs.
    pub initrd: FileSeal,
    /// The root disk (raw).
    pub disk: FileSeal,
    /// The kernel's version.
    pub kernel_version: String,
    /// What the kernel command line needs for this image.
    pub cmdline: String,
    /// Packages and their versions.
    pub packages: Vec<String>,
}

/// A file, its size and its hash.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSeal {
    /// Its name in the image's folder.
    pub file: String,
    /// Its size in octets.
    pub size: u64,
    /// Its SHA-256 in hexadecimal.
    pub sha256: String,
}

impl Manifest {
    /// Reads a folder's manifest; the error is what is wrong with it.
    pub fn load(dir: &Path) -> Result<Self, String> {
        let mut text = String::new();
        File::open(dir.join(FILE))
            .and_then(|file| file.take(MAX_MANIFEST).read_to_string(&mut text))
            .map_err(|e| format!("{FILE} cannot be read ({e})"))?;
        let manifest: Self =
            serde_json::from_str(&text).map_err(|e| format!("{FILE} does not parse ({e})"))?;
        if manifest.format != FORMAT {
            return Err(format!("its format is {}, this program reads {FORMAT}", manifest.format));
        }
        Ok(manifest)
    }
}

impl FileSeal {
    /// Seals a file that is there.
    pub fn of(dir: &Path, file: &str) -> std::io::Result<Self> {
        let path = dir.join(file);
        Ok(Self { file: file.to_owned(), size: path.metadata()?.len(), sha256: hash_file(&path)? })
    }

    /// Checks the size and, if `full`, the hash.
    pub fn check(&self, dir: &Path, full: bool) -> Result<(), String> {
        if self.file.contains('/') || self.file.starts_with('.') {
            return Err(format!("its manifest names `{}`, which is not a file of the image", self.file));
        }
        let path = dir.join(&self.file);
        let size = path.metadata().map_err(|e| format!("{} cannot be read ({e})", self.file))?.len();
        if size != self.size {
            return Err(format!("{} has {size} bytes instead of {}", self.file, self.size));
        }
        if full && hash_file(&path).map_err(|e| format!("{} cannot be read ({e})", self.file))? != self.sha256
        {
            return Err(format!("{} is not the file that was built", self.file));
        }
        Ok(())
    }
}

/// SHA-256 of a file in hexadecimal.
pub fn hash_file(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer)?;
        if n == 0 {
            return Ok(hex(&hasher.finalize()));
        }
        hasher.update(&buffer[..n]);
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
