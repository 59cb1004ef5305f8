//! Whether this machine's KVM really runs guests. Opening `/dev/kvm` proves nothing: on some machines it opens, makes
//! virtual CPUs and then never gets a kernel to its first line. So the image's own kernel is run for a moment.

use crate::image::Image;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Read as _;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// How a guest's CPU is provided.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Accel {
    /// The host's own CPU, through KVM.
    Kvm,
    /// QEMU's emulation: works everywhere, many times slower.
    Tcg,
}

/// What was found, and why.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Probe {
    /// What guests will run on.
    pub accel: Accel,
    /// One sentence for people.
    pub reason: String,
    /// The boot and the kernel that it was found out for.
    key: String,
}

/// What a kernel may take to its first line under KVM; it takes about 0.1 s. A busy host, as any is while it boots, gives it
/// little of its time: only what it was given counts against it, and the clock bounds it all.
const PATIENCE: Patience = Patience { cpu: Duration::from_secs(8), clock: Duration::from_secs(60) };

#[derive(Clone, Copy)]
struct Patience {
    /// Processor time of the VMM and its guest.
    cpu: Duration,
    /// Time on the clock.
    clock: Duration,
}
const CACHE: &str = "accel.json";

/// Finds out, or remembers from `data_dir` what was found in this boot for this kernel. Blocks for seconds at most.
pub fn probe(image: &Image, qemu: &Path, data_dir: &Path) -> Probe {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let key = format!("{} {}", boot.trim(), image.manifest().kernel.sha256);
    let cache = data_dir.join(CACHE);
    let known = fs::read(&cache).ok().and_then(|bytes| serde_json::from_slice::<Probe>(&bytes).ok());
    if let Some(known) = known.filter(|probe| probe.key == key) {
        return known;
    }
    let (accel, reason) = match try_kvm(image, qemu, PATIENCE) {
        Ok(()) => (Accel::Kvm, "KVM runs guests on this machine".to_owned()),
        Err(why) => (Accel::Tcg, format!("{why}; guests are emulated by TCG, many times slower")),
    };
    match accel {
        Accel::Kvm => tracing::info!("{reason}"),
        Accel::Tcg => tracing::warn!("{reason}"),
    }
    let probe = Probe { accel, reason, key };
    if let Ok(text) = serde_json::to_vec(&probe) {
        // Only a memory: without it the next start finds out again.
        let _ = fs::write(&cache, text);
    }
    probe
}

/// Opens `/dev/kvm` for a VMM that may not itself.
pub fn open_kvm() -> std::io::Result<OwnedFd> {
    Ok(fs::OpenOptions::new().read(true).write(true).open("/dev/kvm")?.into())
}

fn try_kvm(image: &Image, qemu: &Path, patience: Patience) -> Result<(), String> {
    if let Err(e) = open_kvm() {
        return Err(match e.kind() {
            std::io::ErrorKind::NotFound => {
                "there is no /dev/kvm (load kvm_intel or kvm_amd, or switch virtualisation on in the firmware)".into()
            }
            _ => format!("/dev/kvm cannot be opened ({e})"),
        });
    }
    let child = Command::new(qemu)
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-M", "microvm,acpi=on", "-accel", "kvm", "-cpu", "host", "-m", "256M", "-serial", "stdio"])
        .arg("-kernel")
        .arg(image.kernel())
        // Its first line, then the end: without a root the kernel panics.
        .args(["-append", "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("QEMU cannot be started ({e})"))?;
    if speaks(child, patience) {
        Ok(())
    } else {
        Err("/dev/kvm opens, but a guest kernel started with it never prints a line".into())
    }
}

/// Whether the guest's kernel says its name in time. The process is gone afterwards in any case.
fn speaks(mut child: Child, patience: Patience) -> bool {
    let (sender, receiver) = std::sync::mpsc::channel();
    if let Some(mut stdout) = child.stdout.take() {
        std::thread::spawn(move || {
            let mut seen = Vec::new();
            let mut buffer = [0u8; 4096];
            while let Ok(n @ 1..) = stdout.read(&mut buffer) {
                seen.extend_from_slice(&buffer[..n]);
                if seen.windows(13).any(|window| window == b"Linux version") {
                    let _ = sender.send(());
                    return;
                }
                // Only the kernel's own words are looked for; a firmware that babbles is not remembered.
                let keep = seen.len().saturating_sub(64);
                seen.drain(..keep);
            }
        });
    }
    let end = Instant::now() + patience.clock;
    let spoke = loop {
        let wait = Duration::from_millis(50).min(end.saturating_duration_since(Instant::now()));
        match receiver.recv_timeout(wait) {
            Ok(()) => break true,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break false,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                if Instant::now() >= end || cpu_time(child.id()) >= patience.cpu =>
            {
                break false;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
    };
    let _ = child.kill();
    let _ = child.wait();
    spoke
}

/// The processor time that a process was given so far; none if it cannot be read. See proc_pid_stat(5): `utime` and `stime`, the
/// 12th and 13th field behind the name, in ticks.
fn cpu_time(pid: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: u64 =
        fields.split_whitespace().skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
    let a_second = nix::unistd::sysconf(nix::unistd::SysconfVar::CLK_TCK).ok().flatten().unwrap_or(100);
    Duration::from_millis(ticks.saturating_mul(1000) / u64::try_from(a_second).unwrap_or(100).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str) -> Child {
        Command::new("sh").args(["-c", text]).stdout(Stdio::piped()).spawn().unwrap()
    }

    #[test]
    fn only_a_kernels_first_line_counts() {
        assert!(speaks(
            script("printf 'firmware\\n[0.0] Linux ver'; printf 'sion 6.1'; exec sleep 1000"),
            PATIENCE
        ));
        assert!(!speaks(script("echo firmware"), PATIENCE), "it ended without a word");
        let soon = Duration::from_millis(200);
        assert!(!speaks(script("exec sleep 1000"), Patience { clock: soon, ..PATIENCE }), "it hangs");
        assert!(!speaks(script("while :; do :; done"), Patience { cpu: soon, ..PATIENCE }), "it spins");
    }
}
