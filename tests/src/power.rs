//! A disk that loses its power: an ext4 file system on a loop device, of which what was never written out is gone after a cut.
//!
//! What the kernel holds back is in the file system's own pages; the file behind the device has what "reached the disk".

use crate::sh;
use anyhow::{Context as _, Result};
use std::{
    fs,
    path::{Path, PathBuf},
};

/// The file system, mounted. It goes with the value, and so does its device.
#[derive(Debug)]
pub struct Disk {
    file: PathBuf,
    mounted: PathBuf,
}

impl Disk {
    /// Makes one in this folder, of so many MiB.
    pub fn new(folder: &Path, mib: u64) -> Result<Self> {
        let disk = Self { file: folder.join("disk.img"), mounted: folder.join("disk") };
        fs::create_dir(&disk.mounted)?;
        fs::File::create(&disk.file)?.set_len(mib << 20)?;
        sh::run("mkfs.ext4", ["-q".as_ref(), disk.file.as_os_str()])?;
        disk.mount()?;
        Ok(disk)
    }

    /// Where it is mounted, before and after.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.mounted
    }

    /// Cuts the power, and mounts what is left.
    pub fn cut(&self) -> Result<()> {
        let left = self.file.with_extension("left");
        sh::run("cp", ["--sparse=always".as_ref(), self.file.as_os_str(), left.as_os_str()])?;
        sh::run("umount", [&self.mounted]).context("something is still open")?;
        fs::rename(&left, &self.file)?;
        self.mount()
    }

    /// Nothing is written out by the file system's own timer while a test runs.
    fn mount(&self) -> Result<()> {
        let (file, at) = (self.file.as_os_str(), self.mounted.as_os_str());
        sh::run("mount", ["-o".as_ref(), "loop,commit=3000".as_ref(), file, at]).map(drop)
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = sh::run("umount", ["--lazy".as_ref(), self.mounted.as_os_str()]);
    }
}
