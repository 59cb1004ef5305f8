//! A stranger in the view of a VMM that runs: a thread that goes where the process is (its files, its network, its user) and
//! tries what would take it out. It has no filter around it, so what holds here holds by files and rights alone.
//!
//! Must never change anything that the VM uses: it opens, and creates only what it removes.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Where a VMM may write: its own disk, and its memory of 2 MiB.
const WRITABLE: [&str; 2] = ["/vm/disk", "/run"];
/// The only devices that it may have: /dev/null, /dev/urandom, /dev/net/tun, /dev/kvm.
const DEVICES: [(u64, u64); 4] = [(1, 3), (1, 9), (10, 200), (10, 232)];
/// For an answer that does not come.
const PATIENCE: Duration = Duration::from_secs(2);
/// More files than a view has.
const MANY: usize = 400_000;

/// Everything that worked and must not.
pub fn attempts(pid: i32, uid: u32, own: &Path) -> Vec<String> {
    let own = own.to_owned();
    std::thread::spawn(move || {
        enter(pid, uid);
        let mut worked = Vec::new();
        reach(&own, &mut worked);
        walk(&mut worked);
        worked
    })
    .join()
    .unwrap()
}

/// For good: the thread ends there. libc would change the user of all threads, the bare calls change that of this one.
fn enter(pid: i32, uid: u32) {
    use nix::sched::{CloneFlags, setns, unshare};
    let place = |kind: &str| File::open(format!("/proc/{pid}/ns/{kind}")).unwrap();
    let (files, network) = (place("mnt"), place("net"));
    unshare(CloneFlags::CLONE_FS).unwrap();
    setns(&network, CloneFlags::CLONE_NEWNET).unwrap();
    setns(&files, CloneFlags::CLONE_NEWNS).unwrap();
    // SAFETY: numbers and a null list of no groups; no memory is touched.
    let gave_up = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0, std::ptr::null::<u32>()),
            libc::syscall(libc::SYS_setresgid, uid, uid, uid),
            libc::syscall(libc::SYS_setresuid, uid, uid, uid),
        ]
    };
    assert_eq!(gave_up, [0; 3]);
}

/// Paths of the host, straight and by climbing out, and the network.
fn reach(own: &Path, worked: &mut Vec<String>) {
    let beside = own.parent().unwrap().join("another-vms-disk");
    let host =
        ["/etc/passwd", "/etc/shadow", "/proc/1/root", "/sys/kernel", "/var/lib", "/root", "/tmp", "/bin/sh"];
    let paths = host.map(PathBuf::from).into_iter().chain([beside, own.to_owned()]);
    for path in paths {
        let climbing = Path::new("/run/../../../..").join(path.strip_prefix("/").unwrap());
        for path in [path, climbing] {
            if path.symlink_metadata().is_ok() {
                worked.push(format!("{} is there", path.display()));
            }
        }
    }
    for address in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(192, 0, 2, 1), Ipv4Addr::new(203, 0, 113, 7)] {
        if TcpStream::connect_timeout(&(address, super::OUTSIDE).into(), PATIENCE).is_ok() {
            worked.push(format!("a connection to {address}"));
        }
    }
}

/// Every file, folder and device of the view.
fn walk(worked: &mut Vec<String>) {
    let mut folders = vec![PathBuf::from("/")];
    let mut seen = 0;
    while let Some(folder) = folders.pop() {
        let may_write = WRITABLE.iter().any(|place| folder.starts_with(place));
        let new = folder.join("a-new-file");
        if !may_write && File::create_new(&new).is_ok() {
            let _ = fs::remove_file(&new);
            worked.push(format!("{} was made", new.display()));
        }
        // The VMM's own folder is its user's; what others own it may not even look into.
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            seen += 1;
            assert!(seen < MANY, "this is no small view");
            let (path, Ok(data)) = (entry.path(), entry.metadata()) else { continue };
            let kind = data.file_type();
            if kind.is_dir() {
                folders.push(path);
            } else if kind.is_char_device() || kind.is_block_device() {
                let device = (libc::major(data.rdev()).into(), libc::minor(data.rdev()).into());
                if kind.is_block_device() || !DEVICES.contains(&device) {
                    worked.push(format!("the device {}", path.display()));
                }
            } else if kind.is_file() && !WRITABLE.iter().any(|place| path.starts_with(place)) {
                match OpenOptions::new().append(true).open(&path) {
                    Ok(_) => worked.push(format!("{} can be written", path.display())),
                    Err(error) => {
                        let refused = [ErrorKind::PermissionDenied, ErrorKind::ReadOnlyFilesystem];
                        assert!(
                            refused.contains(&error.kind()) || error.raw_os_error() == Some(libc::ETXTBSY),
                            "{error}"
                        );
                    }
                }
            }
        }
    }
    assert!(seen > 3, "nothing was looked at");
}
