//! A suspended VM: its memory and devices in its folder, beside its disk, until it is started again.
//!
//! ```text
//! running ── stop, migrate into a socket pair ──▶ memory.zst written ── memory.json named ──▶ suspended, VMM ended
//! suspended ── memory.json and memory.zst removed, checked ──▶ read by a new VMM, held until all is there ──▶ running
//! ```
//!
//! `memory.json` is what makes the state count: without it there is none, and the VM boots from its disk as after a power cut.
//! It is gone before a VMM reads the memory: used twice with one disk, it would destroy the disk's file systems. A clone comes with
//! a memory of its parent's and a disk of the same moment: to the folder that is a suspended VM. What moves the octets in and out
//! of QEMU is in `transfer`.

use super::QemuDriver;
use crate::accel::Accel;
use crate::disk;
use crate::spec::{Resume, VmSpec, VmmError};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;

/// The packed memory in a VM's folder.
pub const DATA: &str = "memory.zst";
const NOTE: &str = "memory.json";
/// Packs about as fast as a disk writes.
const LEVEL: i32 = 1;
/// What devices may add to the guest's memory.
pub(super) const DEVICES: u64 = 256 << 20;

/// What the machine must be, to go on with a memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    accel: String,
    vcpus: u32,
    memory_mib: u32,
    disk_bytes: u64,
    mac: [u8; 6],
    /// Of the host, where the guest sees it.
    cpu: Option<String>,
}

impl Machine {
    /// This host's, for the VM.
    pub fn of(accel: Accel, spec: &VmSpec) -> io::Result<Self> {
        let cpu = match accel {
            Accel::Kvm => Some(host_cpu(&fs::read_to_string("/proc/cpuinfo")?)),
            Accel::Tcg => None,
        };
        let accel = format!("{accel:?}").to_lowercase();
        let VmSpec { vcpus, memory_mib, disk_bytes, .. } = *spec;
        Ok(Self { accel, vcpus, memory_mib, disk_bytes, mac: spec.net.mac, cpu })
    }
}

/// Model and features of the first processor.
fn host_cpu(info: &str) -> String {
    let wanted = ["vendor_id", "cpu family", "model", "stepping", "flags"];
    let field = |line: &&str| line.split(':').next().is_some_and(|name| wanted.contains(&name.trim()));
    let lines: Vec<&str> = info.lines().take_while(|line| !line.is_empty()).filter(field).collect();
    hex(Sha256::digest(lines.join("\n")).as_slice())
}

/// What is noted of a memory that is whole.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Note {
    /// What it is a memory of.
    pub machine: Machine,
    /// QEMU's version: its `microvm` machine is not versioned, so the next one's may differ.
    pub qemu: Value,
    /// Of the packed file.
    pub sha256: String,
    /// Size of the packed file.
    pub stored_bytes: u64,
    /// Size of what is in it.
    pub memory_bytes: u64,
}

/// A memory that was checked and taken: nobody else will find it.
pub struct Taken {
    /// The packed file, which has no name any more.
    pub file: File,
    /// QEMU's version.
    pub qemu: Value,
    /// Size of what is in it.
    pub memory_bytes: u64,
    /// Whether it is another VM's, which runs too.
    pub clone: bool,
}

/// Packs what comes until its end; answers the packed file's hash, and both sizes.
pub fn pack(from: UnixStream, to: &Path, limit: u64) -> io::Result<(String, u64, u64)> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    let mut encoder =
        zstd::stream::write::Encoder::new(Hashing { file, hash: Sha256::new(), written: 0 }, LEVEL)?;
    let memory_bytes = io::copy(&mut from.take(limit + 1), &mut encoder)?;
    let done = encoder.finish()?;
    if memory_bytes > limit {
        return Err(io::Error::other("it is larger than the machine"));
    }
    done.file.sync_all()?;
    Ok((hex(done.hash.finalize().as_slice()), memory_bytes, done.written))
}

struct Hashing {
    file: File,
    hash: Sha256,
    written: u64,
}

impl Write for Hashing {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let n = self.file.write(buffer)?;
        self.hash.update(&buffer[..n]);
        self.written += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Makes the memory count, after the disk that belongs to it is on its medium.
pub fn commit(dir: &Path, note: &Note) -> io::Result<()> {
    if let Some(disk) = disk::find(dir) {
        File::open(disk.path)?.sync_all()?;
    }
    name(dir, note)
}

fn name(dir: &Path, note: &Note) -> io::Result<()> {
    let new = dir.join("memory.new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(note)?)?;
    file.sync_all()?;
    fs::rename(&new, dir.join(NOTE))?;
    File::open(dir)?.sync_all()
}

/// Makes a memory count that was brought into the folder of a VM that is to go on with it, beside the disk that belongs to it.
pub fn place_memory(dir: &Path, note: &str) -> Result<(), VmmError> {
    let wrong = |error: serde_json::Error| VmmError::Memory(format!("what is noted of it is wrong: {error}"));
    let note: Note = serde_json::from_str(note).map_err(wrong)?;
    File::open(dir.join(DATA))
        .and_then(|file| file.sync_all())
        .and_then(|()| name(dir, &note))
        .map_err(VmmError::io("the VM's memory"))
}

/// Whether a VM's folder holds a memory that counts.
pub fn keeps_memory(dir: &Path) -> bool {
    dir.join(NOTE).exists()
}

/// Removes a memory, whole or not.
pub fn forget(dir: &Path) {
    for name in [NOTE, DATA] {
        let _ = fs::remove_file(dir.join(name));
    }
}

/// The same, so that not even a power cut brings it back.
pub fn forget_for_good(dir: &Path) -> io::Result<()> {
    forget(dir);
    if keeps_memory(dir) {
        return Err(io::Error::other("a VM's memory cannot be removed"));
    }
    File::open(dir)?.sync_all()
}

/// Takes the folder's memory out of it, so that it is used once at most. `None` if there is none; an error if it is not
/// what was stored or not of this machine: it is gone then too, and the disk is what is left.
pub fn take(dir: &Path, driver: &QemuDriver, spec: &VmSpec) -> Result<Option<Taken>, VmmError> {
    let gone = VmmError::io("the VM's folder");
    if !keeps_memory(dir) {
        // What a suspension that was cut off left.
        forget(dir);
        return Ok(None);
    }
    if spec.resume == Resume::Never {
        tracing::warn!(vm = %spec.id, "a memory that is not asked for is removed");
        forget_for_good(dir).map_err(gone)?;
        return Ok(None);
    }
    let read = || -> io::Result<(Note, File)> {
        let note = serde_json::from_slice(&fs::read(dir.join(NOTE))?)?;
        Ok((note, File::open(dir.join(DATA))?))
    };
    let read = read();
    forget_for_good(dir).map_err(gone)?;
    let (note, mut file) = read.map_err(VmmError::io("the VM's memory"))?;
    let here = Machine::of(driver.accel, spec).map_err(VmmError::io("this host's CPU"))?;
    let clone = spec.resume == Resume::Another;
    let mut was = note.machine;
    if clone {
        // It is given its own.
        was.mac = here.mac;
    }
    if was != here {
        let why = format!("it is of another machine: {was:?}, and this is {here:?}");
        return Err(VmmError::Memory(why));
    }
    let limit = note.stored_bytes;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    loop {
        let n = file.read(&mut buffer).map_err(VmmError::io("the VM's memory"))?;
        total += n as u64;
        if n == 0 || total > limit {
            break;
        }
        hash.update(&buffer[..n]);
    }
    if total != limit || hex(hash.finalize().as_slice()) != note.sha256 {
        return Err(VmmError::Memory("its file is not what was stored".into()));
    }
    file.rewind().map_err(VmmError::io("the VM's memory"))?;
    Ok(Some(Taken { file, qemu: note.qemu, memory_bytes: note.memory_bytes, clone }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Seed;
    use serde_json::json;
    use std::net::Ipv4Addr;
    use tapgate_model::GuestNet;

    const LIMIT: u64 = 1 << 20;

    fn spec(dir: &Path) -> VmSpec {
        let net = GuestNet::new(6, Ipv4Addr::new(192, 0, 2, 0), None);
        let seed = Seed {
            instance_id: "vm_abc".into(),
            hostname: "vm-abc".into(),
            ssh_keys: Vec::new(),
            net,
            ca_pem: String::new(),
            env: Vec::new(),
        };
        VmSpec {
            id: "vm_abc".parse().unwrap(),
            dir: dir.to_owned(),
            image: None,
            vcpus: 1,
            memory_mib: 512,
            disk_bytes: 1 << 30,
            net,
            seed,
            snapshot: None,
            resume: Resume::Own,
            guest_ns: None,
        }
    }

    fn packed(content: &'static [u8], to: &Path, limit: u64) -> io::Result<(String, u64, u64)> {
        let (reader, mut writer) = UnixStream::pair().unwrap();
        let writing = std::thread::spawn(move || {
            let _ = writer.write_all(content);
        });
        let packed = pack(reader, to, limit);
        writing.join().unwrap();
        packed
    }

    fn suspended(dir: &Path) {
        let (sha256, memory_bytes, stored_bytes) = packed(&[7; 50_000], &dir.join(DATA), LIMIT).unwrap();
        let machine = Machine::of(Accel::Tcg, &spec(dir)).unwrap();
        let qemu = json!("10");
        commit(dir, &Note { machine, qemu, sha256, stored_bytes, memory_bytes }).unwrap();
    }

    fn taken(dir: &Path) -> Result<Option<Taken>, VmmError> {
        take(dir, &QemuDriver::new(Accel::Tcg), &spec(dir))
    }

    #[test]
    fn a_memory_is_taken_once() {
        let dir = tempfile::tempdir().unwrap();
        suspended(dir.path());
        let memory = taken(dir.path()).unwrap().unwrap();
        let mut text = Vec::new();
        zstd::stream::read::Decoder::new(memory.file).unwrap().read_to_end(&mut text).unwrap();
        assert_eq!(text, [7; 50_000]);
        assert!(taken(dir.path()).unwrap().is_none());
    }

    #[test]
    fn a_memory_that_is_not_asked_for_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        suspended(dir.path());
        let other = VmSpec { resume: Resume::Never, ..spec(dir.path()) };
        assert!(take(dir.path(), &QemuDriver::new(Accel::Tcg), &other).unwrap().is_none());
        assert!(!dir.path().join(DATA).exists() && taken(dir.path()).unwrap().is_none());
    }

    #[test]
    fn what_is_half_written_is_none_and_goes() {
        let dir = tempfile::tempdir().unwrap();
        packed(&[7; 50_000], &dir.path().join(DATA), LIMIT).unwrap();
        assert!(taken(dir.path()).unwrap().is_none());
        assert!(!dir.path().join(DATA).exists());
    }

    #[test]
    fn what_was_cut_changed_or_lengthened_is_refused_and_goes() {
        let changes: [fn(&mut Vec<u8>); 3] = [|b| b.truncate(b.len() - 1), |b| b[10] ^= 1, |b| b.push(0)];
        for change in changes {
            let dir = tempfile::tempdir().unwrap();
            suspended(dir.path());
            let mut bytes = fs::read(dir.path().join(DATA)).unwrap();
            change(&mut bytes);
            fs::write(dir.path().join(DATA), bytes).unwrap();
            let Err(error) = taken(dir.path()) else { panic!("it was taken") };
            assert!(error.to_string().contains("not what was stored"), "{error}");
            assert!(taken(dir.path()).unwrap().is_none(), "the disk is what is left");
        }
    }

    #[test]
    fn another_machine_is_refused_with_both() {
        let dir = tempfile::tempdir().unwrap();
        suspended(dir.path());
        let other = VmSpec { vcpus: 2, ..spec(dir.path()) };
        let Err(error) = take(dir.path(), &QemuDriver::new(Accel::Tcg), &other) else { panic!("taken") };
        assert!(error.to_string().contains("vcpus: 1") && error.to_string().contains("vcpus: 2"), "{error}");
    }

    #[test]
    fn a_clone_has_its_own_address_and_else_the_same_machine() {
        let dir = tempfile::tempdir().unwrap();
        suspended(dir.path());
        let net = GuestNet::new(7, Ipv4Addr::new(192, 0, 2, 0), None);
        let other = VmSpec { net, ..spec(dir.path()) };
        assert!(
            take(dir.path(), &QemuDriver::new(Accel::Tcg), &other).is_err(),
            "a VM's own keeps its address"
        );
        suspended(dir.path());
        let clone = VmSpec { resume: Resume::Another, ..other };
        let larger = VmSpec { disk_bytes: 2 << 30, ..clone.clone() };
        let taken = take(dir.path(), &QemuDriver::new(Accel::Tcg), &clone).unwrap().unwrap();
        assert!(taken.clone);
        suspended(dir.path());
        assert!(take(dir.path(), &QemuDriver::new(Accel::Tcg), &larger).is_err());
    }

    #[test]
    fn a_stream_that_does_not_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let error = packed(&[7; 50_000], &dir.path().join(DATA), 40_000).unwrap_err();
        assert!(error.to_string().contains("larger than the machine"), "{error}");
    }
}
