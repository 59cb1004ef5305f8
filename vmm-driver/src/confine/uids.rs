//! The user ids that this daemon's VMMs run as: a block of its own for each instance on the host, so that no VMM is the user of
//! another daemon's.
//!
//! A claim is a folder beside the instance's pins: like them it outlives the daemon, as its VMMs do, and not the host. Must never give
//! up a block while one of its VMMs may run.

use crate::spec::VmmError;
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::sync::OnceLock;
use tapgate_ebpf_common::maps::MAX_VMS;

/// First of the ids.
pub(super) const BASE: u32 = 1_730_000_000;
/// More than an instance has slots.
const BLOCK: u32 = 2 * MAX_VMS;
const BLOCKS: u32 = 1000;
const PREFIX: &str = "uids-";

static CLAIMED: OnceLock<u32> = OnceLock::new();

/// The user id of a VM's VMM: one for each slot, so that no VMM may touch another's process.
pub fn uid_of(slot: u32) -> u32 {
    uid_in(CLAIMED.get().copied().unwrap_or_default(), slot)
}

fn uid_in(block: u32, slot: u32) -> u32 {
    BASE + block * BLOCK + slot % BLOCK
}

/// Claims a block for this process's instance, whose folder below `pins` is there: the one that it had, else the first that nobody has.
///
/// # Errors
/// None is free, or the folders cannot be read or written.
pub fn claim(pins: &Path, instance: &str) -> Result<(), VmmError> {
    let block =
        block_of(pins, instance).map_err(VmmError::io(format!("user ids below {}", pins.display())))?;
    // One process is one instance.
    CLAIMED.get_or_init(|| block);
    Ok(())
}

fn block_of(pins: &Path, instance: &str) -> io::Result<u32> {
    // Two daemons that start at once see each other's claim.
    let _lock = Flock::lock(File::open(pins)?, FlockArg::LockExclusive)
        .map_err(|(_, error)| io::Error::from(error))?;
    let own = pins.join(instance);
    if let Some(block) = claims(&own)?.first() {
        return Ok(*block);
    }
    let mut taken = Vec::new();
    for folder in fs::read_dir(pins)? {
        taken.extend(claims(&folder?.path())?);
    }
    let free = (0..BLOCKS).find(|block| !taken.contains(block));
    let block =
        free.ok_or_else(|| io::Error::other("all are other instances'; remove those that are gone"))?;
    fs::create_dir(own.join(format!("{PREFIX}{block}")))?;
    Ok(block)
}

/// What the instance of this folder has claimed.
fn claims(folder: &Path) -> io::Result<Vec<u32>> {
    let entries = match fs::read_dir(folder) {
        // It ended just now, or is no folder.
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        entries => entries?,
    };
    let mut claims = Vec::new();
    for entry in entries {
        let name = entry?.file_name();
        if let Some(number) = name.to_str().and_then(|name| name.strip_prefix(PREFIX)) {
            let block = number.parse().ok().filter(|block| *block < BLOCKS);
            claims.push(block.ok_or_else(|| io::Error::other(format!("{name:?} is no claim")))?);
        }
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_instances_have_an_id_in_common() {
        let dir = tempfile::tempdir().unwrap();
        let instance = |name: &str| {
            let _ = fs::create_dir(dir.path().join(name));
            block_of(dir.path(), name)
        };
        let (first, second) = (instance("a").unwrap(), instance("b").unwrap());
        assert_eq!((first, second), (0, 1));
        assert_eq!(instance("a").unwrap(), first, "a daemon that comes after one has its ids");
        let of = |block| (0..=MAX_VMS).map(move |slot| uid_in(block, slot)).collect::<Vec<_>>();
        assert!(of(first).last() < of(second).first() && of(first).is_sorted_by(|a, b| a < b));
        assert!(uid_in(BLOCKS - 1, BLOCK - 1) < BASE + 17_000_000);

        fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert_eq!(instance("c").unwrap(), 0, "what is gone claims nothing");
        assert_eq!(instance("a").unwrap(), 2);
        fs::create_dir(dir.path().join("b/uids-x")).unwrap();
        assert!(instance("d").is_err(), "what cannot be read may be anyone's");
    }

    #[test]
    fn daemons_that_start_at_once_do_not_share() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let other = Flock::lock(File::open(dir.path()).unwrap(), FlockArg::LockExclusive).unwrap();
        let block = std::thread::scope(|scope| {
            let claiming = scope.spawn(|| block_of(dir.path(), "b").unwrap());
            // Time to do it wrongly: it has looked, as the other one has, and nothing was there yet.
            std::thread::sleep(std::time::Duration::from_millis(200));
            fs::create_dir(dir.path().join("a/uids-0")).unwrap();
            drop(other);
            claiming.join().unwrap()
        });
        assert_eq!(block, 1);
    }
}
