//! How much of the host's disk a copy of a VM's disk can take. Looks at where files have data and never at what it is: a guest may
//! have written all of it, headers included.

use crate::disk::{self, Format};
use crate::image::{Image, Manifest};
use crate::spec::VmmError;
use nix::errno::Errno;
use nix::unistd::{Whence, lseek};
use std::fs::File;
use std::io;
use std::path::Path;

/// What qcow2 gives out at a time: one octet of data takes all of it.
const CLUSTER: i64 = 64 << 10;
/// What a guest may still hold unwritten when its disk is looked at, and writes before the copy's moment.
const UNWRITTEN: u64 = 64 << 20;

/// Octets that a qcow2 file with all of the VM's disk can take; 0 for a VM without one.
pub fn of_copy(dir: &Path) -> Result<u64, VmmError> {
    let Some(disk) = disk::find(dir) else { return Ok(0) };
    let own = of_file(&disk.path)?;
    let image = match disk.format {
        // The copy has the image's blocks too; those that the layer hides are counted twice rather than looked up in it.
        Format::Qcow2 => match disk::noted_image(dir)? {
            Some(from) => {
                let manifest = Manifest::load(&from).map_err(VmmError::Disk)?;
                of_file(&from.join(&manifest.disk.file))?
            }
            None => return Err(VmmError::Disk("it is not noted which image it was made from".into())),
        },
        Format::Raw | Format::Standalone => 0,
    };
    Ok(own.saturating_add(image).saturating_add(UNWRITTEN))
}

/// Octets that a copy of the image's disk can take.
pub fn of_image(image: &Image) -> Result<u64, VmmError> {
    of_file(&image.disk())
}

fn of_file(path: &Path) -> Result<u64, VmmError> {
    clusters(path).map_err(VmmError::io(path.display().to_string()))
}

/// The clusters that have data, and the tables that find them.
fn clusters(path: &Path) -> io::Result<u64> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let end = i64::try_from(length).map_err(io::Error::other)?;
    let (mut at, mut octets) = (0, 0);
    while at < end {
        let data = match lseek(&file, at, Whence::SeekData) {
            Ok(data) => data,
            Err(Errno::ENXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let hole = lseek(&file, data, Whence::SeekHole)?;
        let next = hole.saturating_add(CLUSTER - 1) & !(CLUSTER - 1);
        // A file that shrinks meanwhile is no reason to look for ever.
        let next = next.max(at.saturating_add(CLUSTER));
        octets += next - (data & !(CLUSTER - 1));
        at = next;
    }
    // Eight octets for each cluster and two for its count, by clusters.
    Ok(octets.unsigned_abs() + length / 4096 + 4 * CLUSTER.unsigned_abs())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt as _;

    #[test]
    fn an_octet_in_each_cluster_counts_as_all_of_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        assert_eq!(of_copy(dir.path()).unwrap(), 0, "there is none");
        let file = OpenOptions::new().write(true).create_new(true).open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        let empty = clusters(&path).unwrap();
        assert!(empty < 1 << 20, "{empty}");
        for at in 0..512 {
            file.write_all_at(&[7], at * 2 * CLUSTER.unsigned_abs() + 5000).unwrap();
        }
        let full = clusters(&path).unwrap();
        assert_eq!(full - empty, 32 << 20, "half of the clusters have an octet");
        assert_eq!(of_copy(dir.path()).unwrap(), full + UNWRITTEN);
    }
}
