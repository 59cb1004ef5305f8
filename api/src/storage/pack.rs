//! Files as they are stored: one zstd frame, cut into parts of one size (as some S3-compatible stores want them). Packing
//! and hashing run on a thread of their own, a bounded number of parts ahead of whoever takes them.

use super::Stored;
use sha2::{Digest as _, Sha256};
use std::{
    fs::{File, OpenOptions},
    io::{self, BufReader, Read as _, Seek as _, SeekFrom, Write},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
    thread::JoinHandle,
};
use tapgate_vmm::turn::Wanted;
use tokio::sync::mpsc;

/// The least and usual part.
const PART: u64 = 8 << 20;
/// S3 takes ten thousand parts of an object.
const MOST_PARTS: u64 = 9000;
/// Fast: disks are mostly what compresses well or not at all.
const LEVEL: i32 = 1;
/// What is looked at for being all zero, when a file is written sparsely.
const BLOCK: usize = 64 << 10;

/// SHA-256 in hexadecimal.
#[derive(Default)]
pub struct Hasher(Sha256);

impl Hasher {
    /// More octets.
    pub fn update(&mut self, octets: &[u8]) {
        self.0.update(octets);
    }

    /// The hash.
    pub fn end(self) -> String {
        self.0.finalize().iter().map(|octet| format!("{octet:02x}")).collect()
    }
}

/// A file's parts, packed.
pub struct Parts {
    parts: mpsc::Receiver<io::Result<Vec<u8>>>,
    packer: Option<JoinHandle<io::Result<Stored>>>,
}

impl Parts {
    /// Begins packing.
    pub fn of(path: &Path) -> io::Result<Self> {
        let file = File::open(path)?;
        let size = file.metadata()?.len();
        let part = (size / MOST_PARTS).next_multiple_of(1 << 20).max(PART);
        let (sender, parts) = mpsc::channel(1);
        let packer = std::thread::Builder::new()
            .name("snapshot-pack".into())
            .spawn(move || pack(file, usize::try_from(part).unwrap_or(usize::MAX), &sender))?;
        Ok(Self { parts, packer: Some(packer) })
    }

    /// The next part; `None` after the last.
    pub async fn next(&mut self) -> Option<io::Result<Vec<u8>>> {
        self.parts.recv().await
    }

    /// What was packed, once all parts were taken.
    pub async fn end(mut self) -> io::Result<Stored> {
        self.parts.close();
        let packer = self.packer.take();
        let ended = tokio::task::spawn_blocking(move || packer.map(JoinHandle::join)).await;
        match ended {
            Ok(Some(Ok(result))) => result,
            _ => Err(io::Error::other("the packing thread ended")),
        }
    }
}

fn pack(file: File, part: usize, to: &mpsc::Sender<io::Result<Vec<u8>>>) -> io::Result<Stored> {
    let result = pack_all(file, part, to);
    if let Err(error) = &result {
        let _ = to.blocking_send(Err(io::Error::new(error.kind(), error.to_string())));
    }
    result
}

fn pack_all(file: File, part: usize, to: &mpsc::Sender<io::Result<Vec<u8>>>) -> io::Result<Stored> {
    let cutter = Cutter { part, buffer: Vec::with_capacity(part), hasher: Hasher::default(), bytes: 0, to };
    let mut encoder = zstd::stream::write::Encoder::new(cutter, LEVEL)?;
    encoder.include_checksum(true)?;
    let file_bytes = io::copy(&mut BufReader::with_capacity(1 << 20, file), &mut encoder)?;
    let mut cutter = encoder.finish()?;
    cutter.cut()?;
    Ok(Stored { sha256: cutter.hasher.end(), stored_bytes: cutter.bytes, file_bytes })
}

/// Collects octets into parts and hands them on.
struct Cutter<'a> {
    part: usize,
    buffer: Vec<u8>,
    hasher: Hasher,
    bytes: u64,
    to: &'a mpsc::Sender<io::Result<Vec<u8>>>,
}

impl Cutter<'_> {
    fn cut(&mut self) -> io::Result<()> {
        if self.buffer.is_empty() {
            return Ok(());
        }
        let part = std::mem::replace(&mut self.buffer, Vec::with_capacity(self.part));
        self.to.blocking_send(Ok(part)).map_err(|_| io::Error::other("nobody takes the parts any more"))
    }
}

impl Write for Cutter<'_> {
    fn write(&mut self, octets: &[u8]) -> io::Result<usize> {
        let taken = octets.len().min(self.part - self.buffer.len());
        self.hasher.update(&octets[..taken]);
        self.bytes += taken as u64;
        self.buffer.extend_from_slice(&octets[..taken]);
        if self.buffer.len() == self.part {
            self.cut()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Unpacks a file whose octets were verified, sparsely, as long as it is wanted. More than was packed is not written.
pub fn unpack(packed: &Path, to: &Path, bytes: u64, wanted: &Wanted) -> io::Result<()> {
    let new = to.with_extension("unpacked");
    let result = unpack_to(packed, &new, bytes, wanted).and_then(|()| std::fs::rename(&new, to));
    if result.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    result
}

fn unpack_to(packed: &Path, to: &Path, bytes: u64, wanted: &Wanted) -> io::Result<()> {
    let _ = std::fs::remove_file(to);
    let mut out = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let decoder = zstd::stream::read::Decoder::new(File::open(packed)?)?;
    let mut limited = decoder.take(bytes + 1);
    let mut block = vec![0; BLOCK];
    let mut total = 0u64;
    loop {
        wanted.check()?;
        let mut filled = 0;
        while filled < BLOCK {
            match limited.read(&mut block[filled..])? {
                0 => break,
                n => filled += n,
            }
        }
        if filled == 0 {
            break;
        }
        total += filled as u64;
        if block[..filled].iter().all(|octet| *octet == 0) {
            out.seek(SeekFrom::Current(i64::try_from(filled).unwrap_or(0)))?;
        } else {
            out.write_all(&block[..filled])?;
        }
    }
    if total != bytes {
        return Err(io::Error::other(format!("{total} octets instead of {bytes}")));
    }
    out.set_len(total)?;
    out.sync_all()
}
