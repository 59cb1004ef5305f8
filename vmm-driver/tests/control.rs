//! The connection to a real QEMU is lost and made anew: what its guest did in between is found out. Needs root; TCG will do.
#![allow(missing_docs, dead_code, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{PATIENCE, World, boot, ready};
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
