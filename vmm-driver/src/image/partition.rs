//! Where the file systems of a disk begin: GPT, MBR, or none at all. Reads what a stranger wrote: bounded, and never trusted
//! beyond "look here".

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

const SECTOR: u64 = 512;
/// More than any cloud image has.
const MOST: u32 = 128;

/// A part of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Its number, as in `/dev/vda1`; 0 for a disk without partitions.
    pub number: u32,
    /// Where it begins, in octets.
    pub start: u64,
}

/// The parts of a disk, in the order of their numbers.
pub fn parts(disk: &File) -> io::Result<Vec<Part>> {
    let size = disk.metadata()?.len();
    let mut found = match gpt(disk)? {
        Some(parts) => parts,
        None => mbr(disk)?,
    };
    found.retain(|part| part.start < size);
    if found.is_empty() {
        found.push(Part { number: 0, start: 0 });
    }
    Ok(found)
}

fn gpt(disk: &File) -> io::Result<Option<Vec<Part>>> {
    let mut header = [0u8; 92];
    if disk.read_exact_at(&mut header, SECTOR).is_err() || !header.starts_with(b"EFI PART") {
        return Ok(None);
    }
    let (table, count, size) = (long(&header, 72), word(&header, 80).min(MOST), u64::from(word(&header, 84)));
    if !(128..=4096).contains(&size) {
        return Err(io::Error::other("its partition table is broken"));
    }
    let mut parts = Vec::new();
    for n in 0..count {
        let mut entry = [0u8; 48];
        let at = table.saturating_mul(SECTOR).saturating_add(u64::from(n) * size);
        disk.read_exact_at(&mut entry, at)?;
        if entry[..16] != [0; 16] {
            parts.push(Part { number: n + 1, start: long(&entry, 32).saturating_mul(SECTOR) });
        }
    }
    Ok(Some(parts))
}

/// The four primary partitions; no cloud image has logical ones.
fn mbr(disk: &File) -> io::Result<Vec<Part>> {
    let mut sector = [0u8; 512];
    disk.read_exact_at(&mut sector, 0)?;
    if !sector.ends_with(&[0x55, 0xaa]) {
        return Ok(Vec::new());
    }
    let entries = (0..4u32).map(|n| (n + 1, 446 + 16 * n as usize));
    Ok(entries
        .filter(|(_, at)| sector[at + 4] != 0)
        .map(|(number, at)| Part { number, start: u64::from(word(&sector, at + 8)) * SECTOR })
        .filter(|part| part.start > 0)
        .collect())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn long(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(size: u64, writes: &[(u64, &[u8])]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        for (at, bytes) in writes {
            file.write_all_at(bytes, *at).unwrap();
        }
        file
    }

    #[test]
    fn every_kind_of_table_is_read() {
        let bare = disk(1 << 20, &[]);
        assert_eq!(parts(&bare).unwrap(), [Part { number: 0, start: 0 }]);
        let mbr =
            disk(4 << 20, &[(446 + 4, &[0x83]), (446 + 8, &2048u32.to_le_bytes()), (510, &[0x55, 0xaa])]);
        assert_eq!(parts(&mbr).unwrap(), [Part { number: 1, start: 1 << 20 }]);
        let entry = |start: u64| [&[9u8; 32][..], &start.to_le_bytes(), &[0; 8]].concat();
        let gpt = disk(
            8 << 20,
            &[
                (512, b"EFI PART"),
                (512 + 72, &2u64.to_le_bytes()),
                (512 + 80, &128u32.to_le_bytes()),
                (512 + 84, &128u32.to_le_bytes()),
                (1024, &entry(4096)),
                (1024 + 14 * 128, &entry(2048)),
                (1024 + 15 * 128, &entry(u64::MAX / 2)),
            ],
        );
        let expected = [Part { number: 1, start: 2 << 20 }, Part { number: 15, start: 1 << 20 }];
        assert_eq!(parts(&gpt).unwrap(), expected, "what lies behind the disk's end is not there");
        let broken = disk(1 << 20, &[(512, b"EFI PART"), (512 + 84, &7u32.to_le_bytes())]);
        assert!(parts(&broken).is_err());
    }
}
