//! PID 1 of the initramfs: from an empty root to systemd in as few steps as there are.
//!
//! Loads the modules listed in `/modules/order`, mounts the root disk, applies the seed in it (as a child process, so
//! that nothing in a seed can stop the boot), moves there and becomes `/sbin/init`. Never runs anything else.

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, chdir, chroot, execve, fork};
use std::ffi::CString;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

const ROOT: &str = "/sysroot";
const ROOT_WAIT: Duration = Duration::from_secs(20);
const API_MOUNTS: [(&str, &str, &str, MsFlags, &str); 4] = [
    ("proc", "/proc", "proc", MsFlags::from_bits_truncate(0xe), ""),
    ("sysfs", "/sys", "sysfs", MsFlags::from_bits_truncate(0xe), ""),
    ("devtmpfs", "/dev", "devtmpfs", MsFlags::MS_NOSUID, "mode=755"),
    ("tmpfs", "/run", "tmpfs", MsFlags::from_bits_truncate(0x6), "mode=755"),
];

/// Runs the whole way; comes back only when the guest cannot boot.
pub fn run() -> ExitCode {
    if let Err(error) = boot() {
        say(&format!("cannot boot: {error}"));
    }
    // PID 1 ends: the kernel panics and, by `panic=-1`, restarts; the host sees that the guest gave up.
    ExitCode::FAILURE
}

fn boot() -> Result<(), String> {
    for (source, target, kind, flags, data) in API_MOUNTS {
        fs::create_dir_all(target).map_err(|e| format!("{target}: {e}"))?;
        match mount(Some(source), target, Some(kind), flags, Some(data)) {
            Ok(()) | Err(nix::errno::Errno::EBUSY) => {}
            Err(e) => return Err(format!("cannot mount {target}: {e}")),
        }
    }
    load_modules();
    let device = root_device(&fs::read_to_string("/proc/cmdline").unwrap_or_default());
    await_device(&device)?;
    fs::create_dir_all(ROOT).map_err(|e| format!("{ROOT}: {e}"))?;
    mount(Some(device.as_str()), ROOT, Some("ext4"), MsFlags::MS_NOATIME, None::<&str>)
        .map_err(|e| format!("cannot mount {device}: {e}"))?;
    for (_, target, ..) in API_MOUNTS {
        let inside = format!("{ROOT}{target}");
        mount(Some(target), inside.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .map_err(|e| format!("cannot move {target}: {e}"))?;
    }
    // What the initramfs held is memory until it is removed.
    let _ = fs::remove_dir_all("/modules");
    let _ = fs::remove_file("/init");
    chdir(ROOT).map_err(|e| format!("{ROOT}: {e}"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(|e| format!("cannot move the root: {e}"))?;
    chroot(".").and_then(|()| chdir("/")).map_err(|e| format!("cannot enter the root: {e}"))?;
    apply_in_child();
    let init = CString::new("/sbin/init").map_err(|e| e.to_string())?;
    let environment = [c"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", c"TERM=linux"];
    Err(match execve(&init, &[&init], &environment) {
        Ok(never) => match never {},
        Err(e) => format!("/sbin/init: {e}"),
    })
}

fn load_modules() {
    let order = fs::read_to_string("/modules/order").unwrap_or_default();
    for name in order.lines().filter(|line| !line.is_empty()) {
        let loaded =
            File::open(Path::new("/modules").join(name)).map_err(|e| e.to_string()).and_then(|file| {
                match finit_module(&file, c"", ModuleInitFlags::empty()) {
                    Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
                    Err(e) => Err(e.to_string()),
                }
            });
        if let Err(error) = loaded {
            say(&format!("module {name}: {error}"));
        }
    }
}

/// The device of `root=`, if it is a plain path under `/dev`; else the first virtio disk.
fn root_device(cmdline: &str) -> String {
    cmdline
        .split_ascii_whitespace()
        .filter_map(|word| word.strip_prefix("root="))
        .rfind(|device| device.starts_with("/dev/"))
        .unwrap_or("/dev/vda")
        .to_owned()
}

fn await_device(device: &str) -> Result<(), String> {
    let end = Instant::now() + ROOT_WAIT;
    while !Path::new(device).exists() {
        if Instant::now() > end {
            return Err(format!("there is no {device}"));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

#[expect(unsafe_code, reason = "fork has no safe form")]
fn apply_in_child() {
    // SAFETY: this process has one thread, so the child may do anything.
    match unsafe { fork() } {
        Ok(ForkResult::Child) => {
            let code = match crate::apply::run() {
                Ok(()) => 0,
                Err(error) => {
                    say(&format!("seed: {error}"));
                    1
                }
            };
            std::process::exit(code);
        }
        Ok(ForkResult::Parent { child }) => {
            let _ = waitpid(child, None);
        }
        Err(e) => say(&format!("cannot fork: {e}")),
    }
}

/// Writes a line to the kernel's log, which the serial console shows.
pub fn say(text: &str) {
    let line = format!("tapgate-guest-agent: {text}\n");
    let written =
        fs::OpenOptions::new().write(true).open("/dev/kmsg").and_then(|mut f| f.write_all(line.as_bytes()));
    if written.is_err() {
        eprint!("{line}");
    }
}

#[cfg(test)]
mod tests {
    use super::root_device;

    #[test]
    fn the_root_device_is_a_path_or_the_first_disk() {
        assert_eq!(root_device("console=ttyS0 root=/dev/vdb rw"), "/dev/vdb");
        assert_eq!(root_device("root=LABEL=x"), "/dev/vda");
        assert_eq!(root_device(""), "/dev/vda");
    }
}
