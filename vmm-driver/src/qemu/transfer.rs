//! A guest's memory on its way out of QEMU and into it.
//!
//! The VMM is handed one end of a socket pair, never a name or a file (`fd:` to anything but a socket is deprecated in QEMU). A
//! guest is held while its memory is written and until all of it is read. A copy of another VM that runs too has its link down
//! until its agent says that it is someone else.

use super::memory::{self, Machine, Note, Taken};
use super::{QemuRunning, file, snapshot};
use crate::agent::Agent;
use crate::qmp::Qmp;
use crate::spec::{MemorySnapshot, Suspended, VmSpec, VmmError};
use serde_json::{Value, json};
use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

const NAME: &str = "memory";
const POLL: Duration = Duration::from_millis(20);
/// For the memory to be written or read: sixteen GiB at 60 MB a second.
const PATIENCE: Duration = Duration::from_secs(300);
/// For QEMU to give up writing a memory that is not wanted any more.
const CANCEL: Duration = Duration::from_secs(15);
/// For a resumed guest to be told the time: it is asked again, and then left to find out by itself.
const CLOCK: Duration = Duration::from_secs(10);
/// For a clone's agent to answer at all.
const AWAKE: Duration = Duration::from_secs(30);

fn micros(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)
}

/// Holds the guest, writes its memory and ends the VMM. If that fails, the guest goes on.
pub async fn save(vm: &QemuRunning) -> Result<Suspended, VmmError> {
    let _turn = vm.turn.lock().await;
    // A copy of the disk that nobody waits for any more would keep the memory from being written.
    snapshot::clear(vm).await;
    let began = Instant::now();
    hold(vm).await?;
    let dir = vm.spec.dir.clone();
    memory::forget(&dir);
    let written = async {
        let note = write(vm, &dir.join(memory::DATA)).await?;
        let (memory_bytes, stored_bytes) = (note.memory_bytes, note.stored_bytes);
        let commit = tokio::task::spawn_blocking(move || memory::commit(&dir, &note)).await;
        commit.map_err(|e| VmmError::Memory(e.to_string()))?.map_err(VmmError::io("the VM's memory"))?;
        Ok((memory_bytes, stored_bytes))
    };
    let error = match written.await {
        Ok((memory_bytes, stored_bytes)) => {
            vm.end().await?;
            return Ok(Suspended { memory_bytes, stored_bytes, took_us: micros(began) });
        }
        Err(error) => error,
    };
    // The guest may go on only when no memory of it can come back, not even after a power cut.
    let went_on = match memory::forget_for_good(&vm.spec.dir) {
        Ok(()) => go_on(vm).await,
        Err(error) => Err(VmmError::io("the VM's folder")(error)),
    };
    if let Err(held) = went_on {
        tracing::error!(vm = %vm.spec.id, %held, "a VM that could not be suspended does not go on and is ended");
        vm.end().await?;
    }
    Err(error)
}

/// Holds a guest that runs. One that QEMU holds already, as it does for want of disk, may be let go on at any time.
async fn hold(vm: &QemuRunning) -> Result<(), VmmError> {
    vm.command("stop", Value::Null).await?;
    let why = match vm.command("query-status", Value::Null).await {
        Ok(status) if status["status"] == "paused" => return Ok(()),
        Ok(status) => VmmError::Memory(format!("its guest does not run: {}", status["status"])),
        Err(error) => {
            let _ = vm.command("cont", Value::Null).await;
            error
        }
    };
    Err(why)
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

/// Writes the memory and the disk of one moment to new files, and lets the guest go on. What fails leaves neither.
pub async fn snapshot(vm: &QemuRunning, disk: &Path, to: &Path) -> Result<MemorySnapshot, VmmError> {
    if to.exists() || disk.exists() {
        return Err(VmmError::Memory(format!("{} or {} exists already", disk.display(), to.display())));
    }
    let _turn = vm.turn.lock().await;
    snapshot::clear(vm).await;
    let result = both(vm, disk, to).await;
    snapshot::clear(vm).await;
    if result.is_err() {
        for file in [disk, to] {
            let _ = tokio::fs::remove_file(file).await;
        }
    }
    result
}

async fn both(vm: &QemuRunning, disk: &Path, to: &Path) -> Result<MemorySnapshot, VmmError> {
    let target = snapshot::target(vm, disk).await?;
    let channel = vm.spec.dir.join(file::AGENT);
    if let Ok(mut agent) = Agent::connect(&channel).await {
        // What is on the disk need not be read from the memory again after a copy loses its power.
        let _ = agent.write_out().await;
    }
    let held = Instant::now();
    hold(vm).await?;
    let written = async {
        let note = write(vm, to).await?;
        // Having written a memory QEMU lets go of the disk, as for another QEMU to take it; it is needed here still.
        vm.command("blockdev-set-active", json!({"active": true})).await.map_err(|error| {
            VmmError::Memory(format!("{error}; snapshots with memory need QEMU 10.0 or newer"))
        })?;
        snapshot::begin(vm).await?;
        Ok(note)
    };
    let written: Result<Note, VmmError> = written.await;
    if let Err(error) = go_on(vm).await {
        tracing::error!(vm = %vm.spec.id, %error, "a VM does not go on after a snapshot and is ended");
        vm.end().await?;
        return Err(error);
    }
    let held_us = micros(held);
    set_clock(&channel).await;
    let note = written?;
    snapshot::finish(vm).await?;
    let (memory_bytes, stored_bytes) = (note.memory_bytes, note.stored_bytes);
    let note = serde_json::to_string(&note).map_err(|e| VmmError::Memory(e.to_string()))?;
    Ok(MemorySnapshot { disk: target.info(held_us), note, memory_bytes, stored_bytes })
}

/// Writes the memory of a guest that is held, packed, to a new file.
async fn write(vm: &QemuRunning, to: &Path) -> Result<Note, VmmError> {
    let machine = Machine::of(vm.accel, &vm.spec).map_err(VmmError::io("this host's CPU"))?;
    let qemu = vm.command("query-version", Value::Null).await?;
    let (reader, writer) = UnixStream::pair().map_err(VmmError::io("socket pair"))?;
    let limit = (u64::from(vm.spec.memory_mib) << 20) + memory::DEVICES;
    let to = to.to_owned();
    let packing = tokio::task::spawn_blocking(move || memory::pack(reader, &to, limit));
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
    Ok(Note { machine, qemu, sha256, stored_bytes, memory_bytes })
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

/// Fills a VMM that waits for it, and lets the guest go on only when all of it is there.
pub async fn load(qmp: &mut Qmp, memory: Taken, spec: &VmSpec) -> Result<(), VmmError> {
    let (clone, channel) = (memory.clone, spec.dir.join(file::AGENT));
    if clone {
        link(qmp, false).await?;
    }
    fill(qmp, memory).await?;
    if clone {
        // What was read says of the network device that its link is up.
        link(qmp, false).await?;
    }
    qmp.command("cont", Value::Null).await?;
    if clone {
        become_another(&channel, spec).await?;
        return link(qmp, true).await;
    }
    set_clock(&channel).await;
    Ok(())
}

/// Both ends of the way out: while it is down QEMU drops what comes from either.
async fn link(qmp: &mut Qmp, up: bool) -> Result<(), VmmError> {
    qmp.command("set_link", json!({"name": "net", "up": up})).await.map(drop)
}

/// Tells a copy who it is. Without the agent's word that it is someone else it must not go on.
async fn become_another(channel: &Path, spec: &VmSpec) -> Result<(), VmmError> {
    let agent = async {
        loop {
            match Agent::connect(channel).await {
                Ok(agent) => return agent,
                Err(error) => tracing::debug!(%error, "a clone's agent does not answer yet"),
            }
            tokio::time::sleep(POLL).await;
        }
    };
    let agent = tokio::time::timeout(AWAKE, agent).await;
    let mut agent = agent.map_err(|_| {
        VmmError::Memory(
            "a clone needs tapgate's agent in the guest, and none answers; take a snapshot of its disk"
                .into(),
        )
    })?;
    let mut entropy = [0_u8; 32];
    let read = File::open("/dev/urandom").and_then(|mut random| random.read_exact(&mut entropy));
    read.map_err(VmmError::io("this host's randomness"))?;
    let entropy: String = entropy.iter().map(|octet| format!("{octet:02x}")).collect();
    let mac = spec.net.mac.map(|octet| format!("{octet:02x}")).join(":");
    let identity = json!({
        "meta-data": spec.seed.meta_data(),
        "user-data": spec.seed.user_data()?,
        "network-config": spec.seed.network_config(),
        "mac": mac,
        "entropy": entropy,
    });
    agent.become_another(identity).await
}

async fn fill(qmp: &mut Qmp, memory: Taken) -> Result<(), VmmError> {
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
    Ok(())
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
