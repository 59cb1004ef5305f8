//! Whether this machine's KVM really runs guests. Opening `/dev/kvm` proves nothing: on some machines it opens, makes
//! virtual CPUs and then never gets a kernel to its first line. So the image's own kernel is run for a moment.

use crate::confine::view::View;
use crate::confine::{self, Confined, Launch, Network, tool};
use crate::image::Image;
use crate::spec::VmmError;
use serde::{Deserialize, Serialize};
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{PipeReader, Read as _};
use std::os::fd::OwnedFd;
use std::path::Path;
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
    let tried = try_kvm(image, qemu, PATIENCE);
    // What kept it from being tried can be mended at any moment, and is looked at again.
    let lasts = tried.is_ok();
    let emulated = |why: &str| (Accel::Tcg, format!("{why}; guests are emulated by TCG, many times slower"));
    let (accel, reason) = match tried {
        Ok(true) => (Accel::Kvm, "KVM runs guests on this machine".to_owned()),
        Ok(false) => emulated("/dev/kvm opens, but a guest kernel started with it never prints a line"),
        Err(why) => emulated(&why),
    };
    match accel {
        Accel::Kvm => tracing::info!("{reason}"),
        Accel::Tcg => tracing::warn!("{reason}"),
    }
    let probe = Probe { accel, reason, key };
    if let (true, Ok(text)) = (lasts, serde_json::to_vec(&probe)) {
        // Only a memory: without it the next start finds out again.
        let _ = fs::write(&cache, text);
    }
    probe
}

/// Opens `/dev/kvm` for a VMM that may not itself.
pub fn open_kvm() -> std::io::Result<OwnedFd> {
    Ok(fs::OpenOptions::new().read(true).write(true).open("/dev/kvm")?.into())
}

/// Whether a guest's kernel got to its first line, or why none could be started.
fn try_kvm(image: &Image, qemu: &Path, patience: Patience) -> Result<bool, String> {
    if let Err(e) = open_kvm() {
        return Err(match e.kind() {
            std::io::ErrorKind::NotFound => {
                "there is no /dev/kvm (load kvm_intel or kvm_amd, or switch virtualisation on in the firmware)".into()
            }
            _ => format!("/dev/kvm cannot be opened ({e})"),
        });
    }
    let (reader, pid) = start(image, qemu).map_err(|e| format!("QEMU cannot be started ({e})"))?;
    let spoke = speaks(reader, pid, patience);
    confine::end_child(pid);
    Ok(spoke)
}

/// QEMU with the image's kernel, confined like any other: the kernel may be a stranger's.
fn start(image: &Image, qemu: &Path) -> Result<(PipeReader, i32), VmmError> {
    const KERNEL: &str = "/vm/kernel";
    confine::present(qemu, "qemu-system-x86")?;
    let view = || -> std::io::Result<View> {
        let mut view = View::new(image.dir(), tool::NOBODY)?;
        view.program(qemu)?;
        for folder in crate::qemu::DATA {
            view.same(Path::new(folder))?;
        }
        view.read_only(&image.kernel(), KERNEL)?;
        view.device("/dev/kvm", 10, 232)?;
        Ok(view)
    };
    let confined = match nix::unistd::geteuid().is_root() {
        true => Some(Confined {
            uid: tool::NOBODY,
            view: view().map_err(VmmError::io("the view of files"))?,
            network: Network::None,
        }),
        false => None,
    };
    let kernel = if confined.is_some() { KERNEL.into() } else { image.kernel().into_os_string() };
    let mut args: Vec<OsString> = [
        "-nodefaults",
        "-no-user-config",
        "-display",
        "none",
        "-no-reboot",
        "-M",
        "microvm,acpi=on",
        "-accel",
        "kvm",
        "-cpu",
        "host",
        "-m",
        "256M",
        "-serial",
        "stdio",
        // Its first line, then the end: without a root the kernel panics.
        "-append",
        "console=ttyS0 earlyprintk=serial,ttyS0 panic=-1",
        "-kernel",
    ]
    .map(OsString::from)
    .to_vec();
    args.push(kernel);
    let (reader, writer) = std::io::pipe().map_err(VmmError::io("a pipe"))?;
    let quiet = File::options().write(true).open("/dev/null").map_err(VmmError::io("/dev/null"))?;
    let launch = Launch {
        program: qemu,
        args,
        stdout: File::from(OwnedFd::from(writer)),
        stderr: quiet,
        confined,
        descriptors: Vec::new(),
        cgroup: None,
        data: None,
        ends_with_us: false,
    };
    Ok((reader, launch.spawn()?))
}

/// Whether the guest's kernel says its name in time.
fn speaks(mut stdout: PipeReader, pid: i32, patience: Patience) -> bool {
    let (sender, receiver) = std::sync::mpsc::channel();
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
    let end = Instant::now() + patience.clock;
    loop {
        let wait = Duration::from_millis(50).min(end.saturating_duration_since(Instant::now()));
        match receiver.recv_timeout(wait) {
            Ok(()) => break true,
            Err(std::sync::mpsc::RecvTimeoutError::Disconnected) => break false,
            Err(std::sync::mpsc::RecvTimeoutError::Timeout)
                if Instant::now() >= end || cpu_time(pid) >= patience.cpu =>
            {
                break false;
            }
            Err(std::sync::mpsc::RecvTimeoutError::Timeout) => {}
        }
    }
}

/// The processor time that a process was given so far; none if it cannot be read. See proc_pid_stat(5): `utime` and `stime`, the
/// 12th and 13th field behind the name, in ticks.
fn cpu_time(pid: i32) -> Duration {
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

    fn script(text: &str, patience: Patience) -> bool {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut child = std::process::Command::new("sh").args(["-c", text]).stdout(writer).spawn().unwrap();
        let spoke = speaks(reader, child.id() as i32, patience);
        let _ = child.kill();
        let _ = child.wait();
        spoke
    }

    #[test]
    fn only_a_kernels_first_line_counts() {
        let line = "printf 'firmware\\n[0.0] Linux ver'; printf 'sion 6.1'; exec sleep 1000";
        assert!(script(line, PATIENCE));
        assert!(!script("echo firmware", PATIENCE), "it ended without a word");
        let soon = Duration::from_millis(200);
        assert!(!script("exec sleep 1000", Patience { clock: soon, ..PATIENCE }), "it hangs");
        assert!(!script("while :; do :; done", Patience { cpu: soon, ..PATIENCE }), "it spins");
    }
}
