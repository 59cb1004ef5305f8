//! Finds and reads the NoCloud seed: a vfat disk labelled `CIDATA` whose three files are JSON (a subset of YAML).
//!
//! Reads only; understands exactly what the host writes and refuses the rest with a sentence. Bounded.

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use serde_json::Value;
use std::fs::{self, File};
use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::path::Path;

const MOUNT: &str = "/run/tapgate-seed";
const MAX_FILE: u64 = 4 << 20;

/// The seed's files, parsed.
pub struct Seed {
    /// `meta-data`: who this instance is.
    pub meta: Value,
    /// `user-data`: cloud-config.
    pub user: Value,
    /// `network-config`, version 2.
    pub network: Value,
}

impl Seed {
    /// What names this instance; another name means another machine.
    pub fn instance_id(&self) -> Option<&str> {
        self.meta.get("instance-id")?.as_str()
    }
}

/// Reads the seed disk.
pub fn read() -> Result<Seed, String> {
    let device = find().ok_or("no disk is labelled CIDATA")?;
    fs::create_dir_all(MOUNT).map_err(|e| format!("{MOUNT}: {e}"))?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some(device.as_str()), MOUNT, Some("vfat"), flags, None::<&str>)
        .map_err(|e| format!("cannot mount the seed {device}: {e}"))?;
    let seed = read_dir(Path::new(MOUNT));
    let _ = umount2(MOUNT, MntFlags::MNT_DETACH);
    let _ = fs::remove_dir(MOUNT);
    seed
}

fn read_dir(dir: &Path) -> Result<Seed, String> {
    Ok(Seed {
        meta: parse("meta-data", &slurp(&dir.join("meta-data"))?)?,
        user: user_data(&slurp(&dir.join("user-data"))?)?,
        network: parse("network-config", &slurp(&dir.join("network-config"))?)?,
    })
}

/// Parses user-data: `#cloud-config` and then JSON.
pub fn user_data(text: &str) -> Result<Value, String> {
    let body = text.strip_prefix("#cloud-config\n").ok_or("user-data does not begin with #cloud-config")?;
    parse("user-data", body)
}

fn parse(name: &str, text: &str) -> Result<Value, String> {
    serde_json::from_str(text).map_err(|e| format!("{name} is not JSON: {e}"))
}

fn slurp(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE).read_to_string(&mut text))
        .map_err(|e| format!("{}: {e}", path.display()))?;
    Ok(text)
}

fn find() -> Option<String> {
    let mut names: Vec<String> = fs::read_dir("/sys/class/block")
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| !name.starts_with("loop") && !name.starts_with("ram"))
        .collect();
    names.sort();
    names
        .into_iter()
        .map(|name| format!("/dev/{name}"))
        .find(|device| is_seed(Path::new(device)).unwrap_or(false))
}

/// Whether the first sector is a FAT boot sector with the label; 43 is FAT12/16's place of it, 71 FAT32's.
fn is_seed(device: &Path) -> io::Result<bool> {
    let mut sector = [0u8; 512];
    let mut file = File::open(device)?;
    file.seek(SeekFrom::Start(0))?;
    file.read_exact(&mut sector)?;
    Ok(sector.ends_with(&[0x55, 0xaa])
        && [43, 71].iter().any(|&at| sector[at..at + 11].eq_ignore_ascii_case(b"CIDATA     ")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn user_data_is_cloud_config_in_json() {
        assert!(user_data("#cloud-config\n{\"hostname\":\"a\"}").is_ok());
        assert!(user_data("{}").is_err());
        assert!(user_data("#cloud-config\nhostname: a\n").is_err());
        assert!(user_data("#!/bin/sh\nreboot\n").is_err());
    }
}
