//! The host's channel into the guest: a virtio port or a vsock port that speaks the part of QEMU's guest agent protocol that
//! snapshots and a clean end need: `guest-sync`, `guest-ping`, `guest-fsfreeze-{freeze,status,thaw}`, `guest-set-time`, `guest-shutdown`;
//! `guest-tapgate-sync`, which writes out, and `guest-tapgate-become`, which makes a copied machine another.
//!
//! A frozen guest must never depend on the host to go on: a freeze ends by itself after a while, and then says so.

use nix::errno::Errno;
use serde_json::{Value, json};
use std::collections::HashSet;
use std::fs::{self, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

const PORT: &str = "org.qemu.guest_agent.0";
/// Where the VMM has a vsock device instead; below 1024, so that only root may listen there.
const VSOCK_PORT: u32 = 777;
/// A new identity carries a whole environment.
const MAX_LINE: usize = 16 << 20;
/// The longest freeze; a snapshot needs some milliseconds.
const LONGEST: Duration = Duration::from_secs(20);
/// How often a port that no host is connected to is looked at.
const IDLE: Duration = Duration::from_millis(250);

nix::ioctl_readwrite!(
    /// `FIFREEZE`: holds all writes to a file system.
    fifreeze, b'X', 119, libc::c_int);
nix::ioctl_readwrite!(
    /// `FITHAW`: lets them go on.
    fithaw, b'X', 120, libc::c_int);

/// File systems that are frozen, and until when.
#[derive(Default)]
struct Frozen {
    held: Vec<File>,
    until: Option<Instant>,
}

/// Serves the port, where there is one, on threads of its own.
pub fn listen() {
    let frozen = Arc::new(Mutex::new(Frozen::default()));
    let watched = frozen.clone();
    thread::spawn(move || {
        loop {
            thread::sleep(Duration::from_secs(1));
            let mut frozen = watched.lock().unwrap_or_else(PoisonError::into_inner);
            if frozen.until.is_some_and(|until| Instant::now() > until) {
                thaw(&mut frozen);
            }
        }
    });
    let by_vsock = frozen.clone();
    thread::spawn(move || {
        if let Err(error) = listen_vsock(&by_vsock) {
            eprintln!("vsock: {error}");
        }
    });
    let Some(device) = port() else { return };
    let served =
        OpenOptions::new().read(true).write(true).open(&device).and_then(|port| serve(port, &frozen, true));
    if let Err(error) = served {
        eprintln!("{device}: {error}");
    }
}

/// Serves the host's connections by vsock, one after the other, for as long as the guest lives.
fn listen_vsock(frozen: &Mutex<Frozen>) -> std::io::Result<()> {
    use nix::sys::socket::{
        AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, getpeername, listen, socket,
    };
    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, VSOCK_PORT))?;
    listen(&listener, Backlog::new(4)?)?;
    loop {
        let stream = accepted(accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?);
        // Only the host: another process of this guest could come by the loopback address.
        if getpeername::<VsockAddr>(stream.as_raw_fd()).is_ok_and(|peer| peer.cid() == libc::VMADDR_CID_HOST)
        {
            let _ = serve(stream, frozen, false);
        }
    }
}

#[expect(unsafe_code, reason = "accept answers a number")]
fn accepted(number: std::os::fd::RawFd) -> File {
    // SAFETY: the descriptor is new and nobody else's.
    unsafe { std::os::fd::FromRawFd::from_raw_fd(number) }
}

fn port() -> Option<String> {
    // The module comes from the initramfs, or udev brings it a moment later.
    for _ in 0..40 {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
                return Some(format!("/dev/{}", entry.file_name().to_string_lossy()));
            }
        }
        thread::sleep(IDLE);
    }
    None
}

/// Answers what comes. Where nobody is connected to a `port` it reads as at its end, and somebody may come later.
fn serve(mut stream: File, frozen: &Mutex<Frozen>, port: bool) -> std::io::Result<()> {
    let mut line = Vec::new();
    let mut buffer = [0u8; 4096];
    loop {
        let n = stream.read(&mut buffer)?;
        if n == 0 && !port {
            return Ok(());
        }
        if n == 0 {
            line.clear();
            thread::sleep(IDLE);
            continue;
        }
        for &byte in &buffer[..n] {
            match byte {
                b'\n' => {
                    let answer = answer(&line, frozen);
                    line.clear();
                    stream.write_all(format!("{answer}\n").as_bytes())?;
                }
                // 0xff tells a parser to forget what came before.
                0xff => line.clear(),
                _ if line.len() >= MAX_LINE => line.clear(),
                byte => line.push(byte),
            }
        }
    }
}

fn answer(line: &[u8], frozen: &Mutex<Frozen>) -> Value {
    let refuse = |text: String| json!({"error": {"class": "GenericError", "desc": text}});
    let Ok(request) = serde_json::from_slice::<Value>(line) else { return refuse("not JSON".into()) };
    let mut frozen = frozen.lock().unwrap_or_else(PoisonError::into_inner);
    match request.get("execute").and_then(Value::as_str).unwrap_or_default() {
        "guest-ping" => json!({"return": {}}),
        "guest-sync" => json!({"return": request.pointer("/arguments/id").cloned().unwrap_or(Value::Null)}),
        "guest-tapgate-sync" => {
            nix::unistd::sync();
            json!({"return": 0})
        }
        "guest-fsfreeze-status" => {
            json!({"return": if frozen.held.is_empty() { "thawed" } else { "frozen" }})
        }
        "guest-fsfreeze-freeze" => match freeze(&mut frozen) {
            Ok(count) => json!({"return": count}),
            Err(error) => refuse(error),
        },
        "guest-fsfreeze-thaw" => json!({"return": thaw(&mut frozen)}),
        "guest-set-time" => match set_time(request.pointer("/arguments/time").and_then(Value::as_u64)) {
            Ok(()) => json!({"return": {}}),
            Err(error) => refuse(error),
        },
        "guest-tapgate-become" => match become_another(request.get("arguments")) {
            Ok(()) => json!({"return": {}}),
            Err(error) => refuse(error),
        },
        "guest-shutdown" => {
            crate::power::power_off();
            json!({"return": {}})
        }
        other => refuse(format!("unknown command {}", other.chars().take(64).collect::<String>())),
    }
}

fn become_another(arguments: Option<&Value>) -> Result<(), String> {
    let arguments = arguments.ok_or("no arguments")?;
    set_time(arguments.get("time").and_then(Value::as_u64))?;
    crate::become_another::run(arguments)
}

/// Sets the clock to nanoseconds since the epoch: after a suspension it is as late as that was long.
fn set_time(time: Option<u64>) -> Result<(), String> {
    use nix::sys::time::TimeSpec;
    let time = TimeSpec::from_duration(Duration::from_nanos(time.ok_or("no time")?));
    nix::time::clock_settime(nix::time::ClockId::CLOCK_REALTIME, time).map_err(|e| e.to_string())
}

#[expect(unsafe_code, reason = "the freeze ioctl has no safe form")]
fn freeze(frozen: &mut Frozen) -> Result<usize, String> {
    if !frozen.held.is_empty() {
        return Err("frozen already".into());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").map_err(|e| e.to_string())?;
    // What was mounted last may lie on what was mounted first.
    for target in block_mounts(&mounts).into_iter().rev() {
        let Ok(file) = File::open(&target) else { continue };
        let mut level: libc::c_int = 0;
        // SAFETY: the descriptor is open for the call and the number outlives it.
        match unsafe { fifreeze(file.as_raw_fd(), &mut level) } {
            Ok(_) => frozen.held.push(file),
            // Cannot be frozen, or is by somebody else.
            Err(Errno::EOPNOTSUPP | Errno::EBUSY) => {}
            Err(error) => {
                thaw(frozen);
                return Err(format!("{target}: {error}"));
            }
        }
    }
    frozen.until = Some(Instant::now() + LONGEST);
    Ok(frozen.held.len())
}

/// Lets all go on; answers how many were still frozen, 0 if the time was up before.
#[expect(unsafe_code, reason = "the thaw ioctl has no safe form")]
fn thaw(frozen: &mut Frozen) -> usize {
    frozen.until = None;
    let held = std::mem::take(&mut frozen.held);
    let mut level: libc::c_int = 0;
    // SAFETY: the descriptor is open for the call and the number outlives it.
    held.iter().rev().filter(|file| unsafe { fithaw(file.as_raw_fd(), &mut level) }.is_ok()).count()
}

/// Where writable file systems on block devices are mounted, each device once.
fn block_mounts(mounts: &str) -> Vec<String> {
    let mut seen = HashSet::new();
    mounts
        .lines()
        .filter_map(|line| {
            let mut fields = line.split(' ');
            let (device, target, _kind, options) =
                (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
            let writable = options.split(',').any(|option| option == "rw");
            (device.starts_with("/dev/") && writable && seen.insert(device))
                .then(|| target.replace("\\040", " "))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_writable_block_file_systems_are_frozen_and_once() {
        let mounts = "/dev/vda / ext4 rw,noatime 0 0\nproc /proc proc rw 0 0\n/dev/vdb /seed vfat ro 0 0\n\
                      /dev/vda /srv ext4 rw 0 0\n/dev/vdc /a\\040b xfs rw,relatime 0 0\ntmpfs /run tmpfs rw 0 0\n";
        assert_eq!(block_mounts(mounts), ["/", "/a b"]);
    }

    #[test]
    fn commands_are_answered_and_others_refused() {
        let frozen = Mutex::new(Frozen::default());
        let ask = |text: &str| answer(text.as_bytes(), &frozen);
        assert_eq!(ask(r#"{"execute":"guest-sync","arguments":{"id":7}}"#), json!({"return": 7}));
        assert_eq!(ask(r#"{"execute":"guest-fsfreeze-status"}"#), json!({"return": "thawed"}));
        assert_eq!(ask(r#"{"execute":"guest-fsfreeze-thaw"}"#), json!({"return": 0}));
        for bad in [
            "",
            "rubbish",
            r#"{"execute":"guest-set-time"}"#,
            r#"{"execute":"guest-tapgate-become"}"#,
            r#"{"execute":"guest-exec"}"#,
            r#"{"execute":7}"#,
        ] {
            assert!(ask(bad).get("error").is_some(), "{bad}");
        }
    }
}
