//! Who the machine is: machine-id, host keys, host name, authorised keys; and a root file system as big as its disk.

use crate::files;
use nix::sys::statvfs::fstatvfs;
use serde_json::Value;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};

const INSTANCE: &str = "/var/lib/tapgate/instance-id";
const HOST_KEY: &str = "/etc/ssh/ssh_host_ed25519_key";

/// On a new instance id (first boot, or a disk that came from another machine) nothing of the old identity stays.
pub fn apply(instance: Option<&str>) -> Result<(), String> {
    let instance = instance.ok_or("meta-data has no instance-id")?;
    if fs::read_to_string(INSTANCE).is_ok_and(|known| known == instance) {
        return Ok(());
    }
    for entry in fs::read_dir("/etc/ssh").map_err(|e| format!("/etc/ssh: {e}"))?.flatten() {
        if entry.file_name().to_string_lossy().starts_with("ssh_host_") {
            fs::remove_file(entry.path()).map_err(|e| format!("{}: {e}", entry.path().display()))?;
        }
    }
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom")
        .and_then(|mut f| f.read_exact(&mut bytes))
        .map_err(|e| format!("/dev/urandom: {e}"))?;
    let id: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    files::write(Path::new("/etc/machine-id"), format!("{id}\n").as_bytes(), 0o444)?;
    // A seed kept on disk would be the same randomness twice.
    let _ = fs::remove_file("/var/lib/systemd/random-seed");
    Ok(())
}

/// Has the disk keep all that was written, and only then notes whose it is: a machine that loses its power at any moment of
/// its first boot begins anew, and one that lost it later has what it needs to be reached.
pub fn settle(instance: Option<&str>) -> Result<(), String> {
    let root = File::open("/").map_err(|e| format!("/: {e}"))?;
    let keep =
        || nix::unistd::syncfs(&root).map_err(|e| format!("cannot write the root file system out: {e}"));
    keep()?;
    let Some(instance) = instance else { return Ok(()) };
    files::write(Path::new(INSTANCE), instance.as_bytes(), 0o644)?;
    keep()
}

/// Makes the one host key that every current client takes, if there is none that is whole.
pub fn host_keys() -> Result<(), String> {
    let public = format!("{HOST_KEY}.pub");
    let paths = [Path::new(HOST_KEY), Path::new(&public)];
    // A file without content is what a crash leaves of one that was never written out.
    if paths.iter().all(|path| path.metadata().is_ok_and(|data| data.len() > 0)) {
        return Ok(());
    }
    for path in paths.iter().filter(|path| path.exists()) {
        fs::remove_file(path).map_err(|e| format!("{}: {e}", path.display()))?;
    }
    let status = Command::new("/usr/bin/ssh-keygen")
        .args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f", HOST_KEY])
        .stdin(Stdio::null())
        .status()
        .map_err(|e| format!("ssh-keygen: {e}"))?;
    if status.success() { Ok(()) } else { Err(format!("ssh-keygen: {status}")) }
}

/// Sets the name now and for later boots.
pub fn set_hostname(user: &Value) -> Result<(), String> {
    let Some(name) = user.get("hostname").and_then(Value::as_str) else { return Ok(()) };
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '.';
    if name.is_empty() || name.len() > 64 || !name.chars().all(plain) {
        return Err("not a host name".into());
    }
    nix::unistd::sethostname(name).map_err(|e| e.to_string())?;
    files::write(Path::new("/etc/hostname"), format!("{name}\n").as_bytes(), 0o644)?;
    let hosts = format!("127.0.0.1 localhost\n127.0.1.1 {name}\n::1 localhost ip6-localhost ip6-loopback\n");
    files::write(Path::new("/etc/hosts"), hosts.as_bytes(), 0o644)
}

/// The seed's keys, and only they, for root.
pub fn authorized_keys(user: &Value) -> Result<(), String> {
    let Some(keys) = user.get("ssh_authorized_keys").and_then(Value::as_array) else { return Ok(()) };
    let mut text = String::new();
    for key in keys.iter().filter_map(Value::as_str).filter(|key| !key.contains(['\n', '\0'])) {
        text.push_str(key);
        text.push('\n');
    }
    files::write(Path::new("/root/.ssh/authorized_keys"), text.as_bytes(), 0o600)
}

nix::ioctl_write_ptr!(
    /// `EXT4_IOC_RESIZE_FS`: grows a mounted file system to this many blocks.
    ext4_resize, b'f', 16, u64);

/// Lets the root file system fill its disk.
#[expect(unsafe_code, reason = "the resize ioctl has no safe form")]
pub fn grow_root() -> Result<(), String> {
    let root = File::open("/").map_err(|e| e.to_string())?;
    let block = fstatvfs(&root).map_err(|e| e.to_string())?.block_size();
    let sectors: u64 = fs::read_to_string("/sys/class/block/vda/size")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .ok_or("the size of the root disk cannot be read")?;
    let blocks = sectors * 512 / block.max(512);
    use std::os::fd::AsRawFd as _;
    // SAFETY: the descriptor is open for the call and the kernel only reads the number.
    match unsafe { ext4_resize(root.as_raw_fd(), &blocks) } {
        // EINVAL: it is as large already (or cannot shrink to it).
        Ok(_) | Err(nix::errno::Errno::EINVAL) => Ok(()),
        Err(e) => Err(format!("cannot grow the root file system: {e}")),
    }
}
