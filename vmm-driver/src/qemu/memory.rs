//! A suspended VM: its memory and devices in its folder, beside its disk, until it is started again.
//!
//! ```text
//! running ── stop, migrate into a socket pair ──▶ memory.zst written ── memory.json named ──▶ suspended, VMM ended
//! suspended ── memory.json and memory.zst removed, checked ──▶ read by a new VMM, held until all is there ──▶ running
//! ```
//!
//! `memory.json` is what makes the state count: without it there is none, and the VM boots from its disk as after a power cut.
//! It is gone before a VMM reads the memory: used twice with one disk, it would destroy the disk's file systems. The VMM is
//! handed one end of a socket pair, never a name or a file (`fd:` to anything but a socket is deprecated in QEMU).

use super::{QemuDriver, QemuRunning, snapshot};
use crate::accel::Accel;
use crate::agent::Agent;
use crate::disk;
use crate::qmp::Qmp;
use crate::spec::{Suspended, VmSpec, VmmError};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const DATA: &str = "memory.zst";
const NOTE: &str = "memory.json";
/// Packs about as fast as a disk writes.
const LEVEL: i32 = 1;
/// What devices may add to the guest's memory.
const DEVICES: u64 = 256 << 20;
const NAME: &str = "memory";
const POLL: Duration = Duration::from_millis(20);
/// For the memory to be written or read: sixteen GiB at 60 MB a second.
const PATIENCE: Duration = Duration::from_secs(300);
/// For QEMU to give up writing a memory that is not wanted any more.
const CANCEL: Duration = Duration::from_secs(15);
/// For a resumed guest to be told the time: it is asked again, and then left to find out by itself.
const CLOCK: Duration = Duration::from_secs(10);

/// What the machine must be, to go on with a memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Machine {
    accel: String,
    vcpus: u32,
    memory_mib: u32,
    disk_bytes: u64,
    mac: [u8; 6],
    /// Of the host, where the guest sees it.
    cpu: Option<String>,
}

impl Machine {
    fn of(accel: Accel, spec: &VmSpec) -> io::Result<Self> {
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
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    machine: Machine,
    /// QEMU's version: its `microvm` machine is not versioned, so the next one's may differ.
    qemu: Value,
    /// Of the packed file.
    sha256: String,
    stored_bytes: u64,
    memory_bytes: u64,
}

/// A memory that was checked and taken: nobody else will find it.
pub struct Taken {
    file: File,
    qemu: Value,
    memory_bytes: u64,
}

/// Holds the guest, writes its memory and ends the VMM. If that fails, the guest goes on.
pub async fn save(vm: &QemuRunning) -> Result<Suspended, VmmError> {
    let _turn = vm.turn.lock().await;
    // A copy of the disk that nobody waits for any more would keep the memory from being written.
    snapshot::clear(vm).await;
    let began = Instant::now();
    vm.command("stop", Value::Null).await?;
    let error = match write(vm).await {
        Ok((memory_bytes, stored_bytes)) => {
            vm.end().await?;
            let took_us = u64::try_from(began.elapsed().as_micros()).unwrap_or(u64::MAX);
            return Ok(Suspended { memory_bytes, stored_bytes, took_us });
        }
        Err(error) => error,
    };
    // The guest may go on only when no memory of it can come back, not even after a power cut.
    let went_on = match forget_for_good(&vm.spec.dir) {
        Ok(()) => go_on(vm).await,
        Err(error) => Err(VmmError::io("the VM's folder")(error)),
    };
    if let Err(held) = went_on {
        tracing::error!(vm = %vm.spec.id, %held, "a VM that could not be suspended does not go on and is ended");
        vm.end().await?;
    }
    Err(error)
}

/// What takes commands for QEMU.
pub trait Commands {
    /// Carries one out.
    async fn run(&mut self, name: &'static str, arguments: Value) -> Result<Value, VmmError>;
}

impl Commands for &mut Qmp {
    async fn run(&mut self, name: &'static str, arguments: Value) -> Result<Value, VmmError> {
        self.command(name, arguments).await
    }
}

impl Commands for &QemuRunning {
    async fn run(&mut self, name: &'static str, arguments: Value) -> Result<Value, VmmError> {
        self.command(name, arguments).await
    }
}

/// Lets a guest go on that was held while its memory was written, whatever became of that.
pub async fn go_on(mut qemu: impl Commands) -> Result<(), VmmError> {
    let _ = qemu.run("migrate_cancel", Value::Null).await;
    let ended = async {
        loop {
            let state = qemu.run("query-migrate", Value::Null).await?;
            // None, or one that has ended some way: QEMU refuses to go on before.
            let ended = ["", "none", "completed", "failed", "cancelled"];
            if ended.contains(&state["status"].as_str().unwrap_or_default()) {
                return Ok::<(), VmmError>(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    tokio::time::timeout(CANCEL, ended).await.map_err(|_| late("given up", CANCEL))??;
    let _ = qemu.run("closefd", json!({"fdname": NAME})).await;
    qemu.run("cont", Value::Null).await.map(drop)
}

async fn write(vm: &QemuRunning) -> Result<(u64, u64), VmmError> {
    let dir = vm.spec.dir.clone();
    forget(&dir);
    let machine = Machine::of(vm.accel, &vm.spec).map_err(VmmError::io("this host's CPU"))?;
    let qemu = vm.command("query-version", Value::Null).await?;
    let (reader, writer) = UnixStream::pair().map_err(VmmError::io("socket pair"))?;
    let limit = (u64::from(vm.spec.memory_mib) << 20) + DEVICES;
    let to = dir.join(DATA);
    let packing = tokio::task::spawn_blocking(move || pack(reader, &to, limit));
    vm.command_with("getfd", json!({"fdname": NAME}), Some(writer.into())).await?;
    // The guest is held: there is no other work that a slower pace would spare.
    vm.command("migrate-set-parameters", json!({"max-bandwidth": 1_u64 << 40})).await?;
    vm.command("migrate", json!({"uri": format!("fd:{NAME}")})).await?;
    let migrated = async {
        loop {
            let state = vm.command("query-migrate", Value::Null).await?;
            if over(&state)? {
                return Ok::<(), VmmError>(());
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let both = async { tokio::join!(packing, migrated) };
    let (packed, migrated) =
        tokio::time::timeout(PATIENCE, both).await.map_err(|_| late("written", PATIENCE))?;
    // A full disk ends both: what the packing says of it is the reason.
    let packed = packed.map_err(|e| VmmError::Memory(e.to_string()))?;
    let (sha256, memory_bytes, stored_bytes) = packed.map_err(VmmError::io("the VM's memory"))?;
    migrated?;
    let note = Note { machine, qemu, sha256, stored_bytes, memory_bytes };
    let commit = move || commit(&dir, &note);
    let committed = tokio::task::spawn_blocking(commit).await.map_err(|e| VmmError::Memory(e.to_string()))?;
    committed.map_err(VmmError::io("the VM's memory"))?;
    Ok((memory_bytes, stored_bytes))
}

fn late(what: &str, limit: Duration) -> VmmError {
    VmmError::Memory(format!("it was not {what} within {} s", limit.as_secs()))
}

/// Whether the transfer is done; its failure is an error.
fn over(state: &Value) -> Result<bool, VmmError> {
    match state["status"].as_str().unwrap_or_default() {
        "completed" => Ok(true),
        "failed" | "cancelled" | "cancelling" => {
            let why = state["error-desc"].as_str().unwrap_or("QEMU gives no reason");
            Err(VmmError::Memory(why.chars().filter(|c| !c.is_control()).take(200).collect()))
        }
        _ => Ok(false),
    }
}

/// Packs what comes until its end; answers the packed file's hash, and both sizes.
fn pack(from: UnixStream, to: &Path, limit: u64) -> io::Result<(String, u64, u64)> {
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
fn commit(dir: &Path, note: &Note) -> io::Result<()> {
    if let Some(disk) = disk::find(dir) {
        File::open(disk.path)?.sync_all()?;
    }
    let new = dir.join("memory.new");
    let _ = fs::remove_file(&new);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&new)?;
    file.write_all(&serde_json::to_vec(note)?)?;
    file.sync_all()?;
    fs::rename(&new, dir.join(NOTE))?;
    File::open(dir)?.sync_all()
}

/// Whether a VM's folder holds a memory that counts.
pub fn keeps_memory(dir: &Path) -> bool {
    dir.join(NOTE).exists()
}

/// Removes a memory, whole or not.
fn forget(dir: &Path) {
    for name in [NOTE, DATA] {
        let _ = fs::remove_file(dir.join(name));
    }
}

/// The same, so that not even a power cut brings it back.
fn forget_for_good(dir: &Path) -> io::Result<()> {
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
    if !spec.resume {
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
    if note.machine != here {
        let why = format!("it is of another machine: {:?}, and this is {here:?}", note.machine);
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
    Ok(Some(Taken { file, qemu: note.qemu, memory_bytes: note.memory_bytes }))
}

/// Fills a VMM that waits for it, and lets the guest go on only when all of it is there.
pub async fn load(qmp: &mut Qmp, memory: Taken) -> Result<(), VmmError> {
    let qemu = qmp.command("query-version", Value::Null).await?;
    if qemu != memory.qemu {
        return Err(VmmError::Memory(format!("it is of QEMU {}, and this is {qemu}", memory.qemu)));
    }
    let (reader, mut writer) = UnixStream::pair().map_err(VmmError::io("socket pair"))?;
    let unpacking = tokio::task::spawn_blocking(move || {
        let decoder = zstd::stream::read::Decoder::new(memory.file)?;
        io::copy(&mut decoder.take(memory.memory_bytes), &mut writer)
    });
    qmp.command_with("getfd", json!({"fdname": NAME}), Some(reader.into())).await?;
    qmp.command("migrate-incoming", json!({"uri": format!("fd:{NAME}")})).await?;
    let loaded = async {
        while !over(&qmp.command("query-migrate", Value::Null).await?)? {
            tokio::time::sleep(POLL).await;
        }
        Ok::<(), VmmError>(())
    };
    tokio::time::timeout(PATIENCE, loaded).await.map_err(|_| late("read", PATIENCE))??;
    drop(unpacking);
    qmp.command("cont", Value::Null).await.map(drop)
}

/// Tells the guest what time it is; one without the agent finds out by itself.
pub async fn set_clock(channel: &Path) {
    let set = async {
        loop {
            let set = async { Agent::connect(channel).await?.set_time().await };
            match set.await {
                Ok(()) => return,
                Err(error) => tracing::debug!(%error, "the resumed guest's clock is not set yet"),
            }
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(CLOCK, set).await.is_err() {
        tracing::warn!(channel = %channel.display(), "no agent sets the resumed guest's clock");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::seed::Seed;
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
            resume: true,
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
        let other = VmSpec { resume: false, ..spec(dir.path()) };
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
    fn a_stream_that_does_not_end_is_cut() {
        let dir = tempfile::tempdir().unwrap();
        let error = packed(&[7; 50_000], &dir.path().join(DATA), 40_000).unwrap_err();
        assert!(error.to_string().contains("larger than the machine"), "{error}");
    }
}
