//! Looks for octets where a secret could have ended up: in a VM's disk as it lies on the host, and in the memory of its
//! VMM, which holds the guest's. Reads only.

use anyhow::{Context as _, Result};
use memchr::memmem;
use std::{
    fs::{self, File},
    io::Read as _,
    os::unix::fs::FileExt as _,
    path::Path,
};

const CHUNK: usize = 4 << 20;

/// Which of the needles stand in the file.
pub fn in_file(path: &Path, needles: &[&[u8]]) -> Result<Vec<bool>> {
    let mut file = File::open(path).with_context(|| format!("{} cannot be read", path.display()))?;
    let mut search = Search::new(needles);
    let mut buffer = vec![0; CHUNK];
    loop {
        let count = file.read(&mut buffer)?;
        if count == 0 {
            return Ok(search.found);
        }
        search.feed(&buffer[..count]);
    }
}

/// Which of the needles stand in the memory of a process: every mapping that can be read.
pub fn in_memory(pid: u32, needles: &[&[u8]]) -> Result<Vec<bool>> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps"))?;
    let memory = File::open(format!("/proc/{pid}/mem"))?;
    let mut search = Search::new(needles);
    let mut buffer = vec![0; CHUNK];
    for line in
        maps.lines().filter(|line| line.split(' ').nth(1).is_some_and(|rights| rights.starts_with('r')))
    {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let (from, to) = range.context("a mapping without a range")?;
        let (mut at, to) = (u64::from_str_radix(from, 16)?, u64::from_str_radix(to, 16)?);
        search.tail.clear();
        while at < to {
            let want = usize::try_from(to - at)?.min(CHUNK);
            // Some mappings (of devices) cannot be read; they hold nothing of the guest.
            let Ok(count @ 1..) = memory.read_at(&mut buffer[..want], at) else { break };
            search.feed(&buffer[..count]);
            at += count as u64;
        }
    }
    Ok(search.found)
}

/// A search through a stream, across its chunks' borders.
struct Search<'a> {
    finders: Vec<memmem::Finder<'a>>,
    found: Vec<bool>,
    overlap: usize,
    tail: Vec<u8>,
}

impl<'a> Search<'a> {
    fn new(needles: &[&'a [u8]]) -> Self {
        let overlap = needles.iter().map(|needle| needle.len()).max().unwrap_or(1) - 1;
        let finders: Vec<_> = needles.iter().map(|needle| memmem::Finder::new(*needle)).collect();
        Self { found: vec![false; finders.len()], finders, overlap, tail: Vec::new() }
    }

    fn feed(&mut self, chunk: &[u8]) {
        let head = &chunk[..chunk.len().min(self.overlap)];
        self.tail.extend_from_slice(head);
        for (finder, found) in self.finders.iter().zip(&mut self.found) {
            *found = *found || finder.find(&self.tail).is_some() || finder.find(chunk).is_some();
        }
        if chunk.len() >= self.overlap {
            self.tail.clear();
            self.tail.extend_from_slice(&chunk[chunk.len() - self.overlap..]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_stands_across_a_border_is_found() {
        let mut search = Search::new(&[b"needle", b"absent"]);
        for chunk in [&b"hay ne"[..], b"e", b"dle hay"] {
            search.feed(chunk);
        }
        assert_eq!(search.found, [true, false]);
        let me = std::process::id();
        let secret = format!("only-{me}-in-memory");
        assert_eq!(in_memory(me, &[secret.as_bytes()]).unwrap(), [true]);
    }
}
