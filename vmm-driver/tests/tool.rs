//! What `qemu-img` is when it works on a VM's disk. The real one, stopped by a lease on the file that it is about to open, so that it
//! can be looked at for as long as that takes.
#![allow(missing_docs, dead_code, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use nix::mount::MsFlags;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};
use tapgate_vmm::confine::tool::Work;
use tapgate_vmm::disk::{self, Format};
use tapgate_vmm::turn::Wanted;

const SLOT: u32 = 44;
const MIB: u64 = 1 << 20;
/// The kernel breaks a lease after 45 s.
const SOON: Duration = Duration::from_secs(30);

/// Whoever opens the file in a way that conflicts with it waits (fcntl(2), "Leases").
struct Lease(File);

impl Lease {
    fn on(path: &Path, kind: i32) -> Self {
        /// Not in the libc crate.
        const F_SETSIG: i32 = 10;
        let file = File::open(path).unwrap();
        let ask = |what: i32, how: i32| {
            // SAFETY: numbers alone.
            let done = unsafe { libc::fcntl(file.as_raw_fd(), what, how) };
            assert_eq!(done, 0, "{}: {}", path.display(), std::io::Error::last_os_error());
        };
        // A signal that nobody minds.
        ask(F_SETSIG, libc::SIGURG);
        ask(libc::F_SETLEASE, kind);
        Self(file)
    }
}

/// Does the work, and looks at the tool in the middle of it.
fn watched<T: Send>(file: &Path, kind: i32, work: impl FnOnce() -> T + Send) -> T {
    let lease = Lease::on(file, kind);
    std::thread::scope(move |scope| {
        let worker = scope.spawn(work);
        let end = Instant::now() + SOON;
        let pid = loop {
            if let Some(pid) = tool() {
                break pid;
            }
            assert!(!worker.is_finished() && Instant::now() < end, "no tool was seen at work");
            std::thread::sleep(Duration::from_millis(2));
        };
        unprivileged(pid);
        drop(lease);
        worker.join().unwrap()
    })
}

/// A `qemu-img` that this process started.
fn tool() -> Option<i32> {
    let parent = format!("PPid:\t{}\n", std::process::id());
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let mut pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|pid| {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        status.starts_with("Name:\tqemu-img\n") && status.contains(&parent)
    })
}

fn unprivileged(pid: i32) {
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{pid}/{name}")).unwrap();
    let status = read("status");
    let field = |name: &str| -> Vec<String> {
        let line = status.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_once(':').unwrap().1.split_whitespace().map(str::to_owned).collect()
    };
    let uid = tapgate_vmm::uid_of(SLOT).to_string();
    assert_eq!((field("Uid"), field("Gid")), (vec![uid.clone(); 4], vec![uid; 4]));
    assert!(field("Groups").is_empty());
    for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
        assert_eq!(field(set), ["0000000000000000"], "{set}");
    }
    assert_eq!((field("NoNewPrivs"), field("Seccomp")), (vec!["1".to_owned()], vec!["2".to_owned()]));
    for name in ["mnt", "net", "ipc", "uts"] {
        let of = |pid: &str| std::fs::metadata(format!("/proc/{pid}/ns/{name}")).unwrap().ino();
        assert_ne!(of("self"), of(&pid.to_string()), "{name} namespace");
    }
    for name in ["etc/passwd", "proc", "sys", "root", "home", "bin/sh", "var", "tmp", "dev"] {
        assert!(!Path::new(&format!("/proc/{pid}/root/{name}")).exists(), "{name} is in its view");
    }
    let limits = read("limits");
    let limit = |name: &str| {
        let line = limits.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap()
    };
    assert_eq!((limit("Max data size"), limit("Max core file size")), ("2147483648", "0"));
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let open: Vec<_> = open.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
    assert!(!open.iter().any(|file| file.ends_with("secret")), "{open:?}");
}

/// A file system that shares no blocks, as most: disks are layers there.
struct Plain<'a>(&'a Path);

impl<'a> Plain<'a> {
    fn mount(at: &'a Path) -> Self {
        nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=256m")).unwrap();
        Self(at)
    }
}

impl Drop for Plain<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

fn qemu_io(file: &Path, commands: &[&str]) {
    let mut run = Command::new("qemu-io");
    run.args(["-f", "qcow2"]).args(commands.iter().flat_map(|command| ["-c", command])).arg(file);
    let output = run.output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success() && !said.contains("failed"), "{said}");
}

#[test]
fn what_a_guest_wrote_is_never_read_by_root() {
    let dir = tempfile::tempdir().unwrap();
    let _plain = Plain::mount(dir.path());
    let image = common::stand_in(&dir.path().join("image"));
    let secret = File::create(dir.path().join("secret")).unwrap();
    nix::fcntl::fcntl(&secret, nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty())).unwrap();
    let vm = dir.path().join("vm");
    std::fs::create_dir(&vm).unwrap();
    let wanted = Wanted::default();
    let work = Work { uid: tapgate_vmm::uid_of(SLOT), wanted: &wanted };
    let image = disk::origin(&vm, &image).unwrap();
    let prepare = |bytes| disk::prepare(&vm, &image, None, bytes, work).unwrap();
    let owners = |file: &Path| {
        let data = file.metadata().unwrap();
        (data.uid(), data.gid(), data.mode() & 0o777)
    };

    let made = prepare(16 * MIB);
    assert_eq!((made.format, disk::size(&made).unwrap()), (Format::Qcow2, 16 * MIB));
    assert_eq!(owners(&made.path), (0, 0, 0o600));
    qemu_io(&made.path, &["write -P 0x5a 1M 64k"]);

    let grown = watched(&made.path, libc::F_RDLCK, || prepare(96 * MIB));
    assert_eq!(disk::size(&grown).unwrap(), 96 * MIB);
    assert_eq!(owners(&made.path), (0, 0, 0o600), "it is the daemon's again");
    qemu_io(&made.path, &["read -P 0x5a 1M 64k", "read -P 7 8M 4k", "read -P 0 9M 64k", "read -P 0 16M 80M"]);
    prepare(96 * MIB);

    let (raw, packed) = (vm.join("snapshot.raw"), dir.path().join("snapshot.qcow2"));
    File::create(&raw).unwrap().write_all_at(&[9; 4096], 2 * MIB).unwrap();
    watched(&raw, libc::F_WRLCK, || disk::pack(&raw, &packed, work).unwrap());
    assert_eq!((owners(&raw).0, owners(&packed)), (0, (0, 0, 0o600)));
    qemu_io(&packed, &["read -P 9 2M 4k", "read -P 0 0 2M"]);
}
