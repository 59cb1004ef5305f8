//! What is learnt of a real QEMU by its control connection: what its guest did while that was lost and made anew, and that it is held
//! for want of disk. Needs root; TCG will do.
#![allow(missing_docs, dead_code, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{PATIENCE, World, boot, ready};
use nix::mount::MsFlags;
use nix::sys::socket::{Shutdown, UnixAddr, getpeername, shutdown};
use std::io::{BufRead as _, BufReader, Lines, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;
use tapgate_model::VmId;
use tapgate_vmm::Exit;

const CONTROL: &str = "qmp.sock";
/// For what takes a second or two.
const SOON: Duration = Duration::from_secs(60);

/// What the driver is connected by, in this process.
fn connections() -> Vec<i32> {
    let entries = std::fs::read_dir("/proc/self/fd").unwrap().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()));
    let of_qemu = |number: &i32| {
        let peer: Result<UnixAddr, _> = getpeername(*number);
        peer.is_ok_and(|peer| peer.path().is_some_and(|path| path.ends_with(CONTROL)))
    };
    numbers.filter(of_qemu).collect()
}

/// Somebody else's connection: QEMU talks to one at a time, so it is the next one's turn when that of the driver ends.
struct Other(Lines<BufReader<UnixStream>>);

impl Other {
    fn instead(dir: &Path) -> Self {
        let ours = connections();
        assert!(!ours.is_empty(), "the driver has no connection");
        let mut stream = UnixStream::connect(dir.join(CONTROL)).unwrap();
        for number in ours {
            shutdown(number, Shutdown::Both).unwrap();
        }
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        writeln!(stream, "{{\"execute\": \"qmp_capabilities\"}}").unwrap();
        let mut other = Self(BufReader::new(stream).lines());
        other.hears("\"return\"");
        other
    }

    fn hears(&mut self, what: &str) {
        while !self.0.next().unwrap().unwrap().contains(what) {}
    }
}

#[test]
fn real_vm_what_qemu_says_to_nobody_is_found_out() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let spec = world.spec(&VmId::generate(), 6, Vec::new());
        let (machine, _reap) = boot(&datapath, &spec).await;
        let later = |key: &str| {
            // The guest's own key for it, so that nothing takes its time.
            let when = "--on-active=1 --timer-property=AccuracySec=100ms";
            let script = format!("systemd-run {when} sh -c 'sync; echo {key} > /proc/sysrq-trigger'");
            world.ask(datapath.egress(), spec.net, &script);
        };

        // Nothing happened: whether it did cannot be told, so whoever waits for SSH asks again.
        let mut observed = machine.observed();
        drop(Other::instead(&spec.dir));
        let asked = tokio::time::timeout(SOON, observed.wait_for(|seen| seen.reboots == 1)).await;
        asked.expect("it is asked again").unwrap();

        later("b");
        let mut other = Other::instead(&spec.dir);
        other.hears("\"RESET\"");
        drop(other);
        let seen = tokio::time::timeout(SOON, observed.wait_for(|seen| seen.reboots == 2)).await;
        seen.expect("a restart is seen").unwrap();
        ready(&datapath, &spec, machine.as_ref()).await;

        later("o");
        let mut other = Other::instead(&spec.dir);
        other.hears("\"SHUTDOWN\"");
        drop(other);
        let exit = tokio::time::timeout(SOON, machine.wait()).await;
        assert_eq!(exit.expect("its end is seen"), Exit::GuestShutdown);
    });
}

/// A file system in memory for a VM's folder, small at first.
struct Small<'a>(&'a Path);

impl<'a> Small<'a> {
    fn mount(at: &'a Path) -> Self {
        std::fs::create_dir(at).unwrap();
        let size = Some("size=256m,mode=0700");
        nix::mount::mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), size).unwrap();
        Self(at)
    }

    fn grow(&self) {
        let size = Some("size=1g,mode=0700");
        nix::mount::mount(None::<&str>, self.0, None::<&str>, MsFlags::MS_REMOUNT, size).unwrap();
    }

    /// MiB that are used, and that are free.
    fn space(&self) -> (u64, u64) {
        let now = nix::sys::statvfs::statvfs(self.0).unwrap();
        let mib = |blocks: u64| (blocks * now.fragment_size()) >> 20;
        (mib(now.blocks() - now.blocks_free()), mib(now.blocks_free()))
    }
}

impl Drop for Small<'_> {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn real_vm_a_guest_that_is_held_for_want_of_disk_goes_on_when_there_is_some() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let spec = world.spec(&VmId::generate(), 7, Vec::new());
        let disk = Small::mount(&spec.dir);
        let (machine, _reap) = boot(&datapath, &spec).await;
        let fill = "systemd-run dd if=/dev/urandom of=/root/large bs=1M count=400 oflag=direct";
        world.ask(datapath.egress(), spec.net, fill);
        let until = async |what: &str, is: &dyn Fn() -> bool| {
            let end = std::time::Instant::now() + PATIENCE;
            while !is() {
                assert!(std::time::Instant::now() < end, "never: {what}, {:?}", disk.space());
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        until("it is full", &|| disk.space().1 < 2).await;
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(machine.observed().borrow().exit.is_none(), "its VMM runs");
        disk.grow();
        until("the guest goes on", &|| disk.space().0 > 400).await;
        world.ask(datapath.egress(), spec.net, "sync; test -s /root/large");
        assert_eq!(machine.kill().await.unwrap(), Exit::Stopped);
    });
}
