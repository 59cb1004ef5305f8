//! A KVM host in a box: a whole Debian host under emulation whose `/dev/kvm` runs guests, for what no test machine can be
//! trusted to have: working KVM, systemd as its first process, a kernel of choice, a reboot. Reached over SSH on
//! loopback alone; it has no other network. Must leave neither a process nor a file behind.

mod disk;

use crate::sh::{Done, capture, expect};
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    fs,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// Seconds for the host to answer; it takes about 15 where nothing else runs.
const PATIENCE: usize = 240;
/// Its memory: enough for a few guests.
const MEMORY: &str = "4096";

/// A kernel that the box can run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Debian 12's own, without TCX.
    V6_1,
    /// From Debian 12's backports.
    V6_12,
}

impl Kernel {
    /// What its release begins with.
    pub const fn release(self) -> &'static str {
        match self {
            Self::V6_1 => "6.1.",
            Self::V6_12 => "6.12.",
        }
    }
}

/// A running host.
#[derive(Debug)]
pub struct KvmBox {
    qemu: Child,
    port: u16,
    key: PathBuf,
}

impl KvmBox {
    /// Boots a fresh host. The files and folders, each under the name that is given with it, are found in `/share`.
    pub fn boot(kernel: Kernel, share: &[(&Path, &str)]) -> Result<Self> {
        let disk = disk::Disk::ready()?;
        // Gone as soon as QEMU has the files open: whatever then happens, nothing stays.
        let folder = Folder::new()?;
        let overlay = folder.0.join("root.qcow2");
        let mut create = Command::new("qemu-img");
        create.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(disk.root());
        expect(create.arg(&overlay), b"")?;
        let shared = folder.0.join("share.raw");
        disk::pack(share, &folder.0.join("share"), &shared)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let qemu = start(&disk, kernel, &overlay, &shared, port)?;
        let mut host = Self { qemu, port, key: disk.key() };
        host.wait().context("the host in the box does not come up")?;
        host.expect("mkdir -p /share && echo /dev/vdb /share ext4 ro 0 0 >> /etc/fstab && mount /share")?;
        Ok(host)
    }

    /// Runs a shell script as root.
    pub fn sh(&self, script: &str) -> Result<Done> {
        capture(self.ssh().arg(script), b"")
    }

    /// Runs a shell script as root; what it printed, or an error with what it complained of.
    pub fn expect(&self, script: &str) -> Result<String> {
        let done = self.sh(script)?;
        ensure!(
            done.ok(),
            "`{script}` in the box ended with {}:\n{}\n{}",
            done.code,
            done.out.trim_end(),
            done.err.trim_end()
        );
        Ok(done.out.trim().to_owned())
    }

    /// The command that a person logs in with.
    pub fn how_to_log_in(&self) -> String {
        format!("ssh -i {} -p {} -o StrictHostKeyChecking=no root@127.0.0.1", self.key.display(), self.port)
    }

    /// Reboots the host and waits until it answers again.
    pub fn reboot(&mut self) -> Result<()> {
        let boot = || self.expect("cat /proc/sys/kernel/random/boot_id");
        let before = boot()?;
        let _ = self.sh("systemctl reboot")?;
        for _ in 0..PATIENCE {
            thread::sleep(Duration::from_secs(1));
            if self.expect("cat /proc/sys/kernel/random/boot_id").is_ok_and(|now| now != before) {
                return Ok(());
            }
        }
        bail!("the host in the box did not come back from its reboot")
    }

    fn wait(&mut self) -> Result<()> {
        for _ in 0..PATIENCE {
            if let Some(status) = self.qemu.try_wait()? {
                bail!("QEMU ended ({status})");
            }
            if self.expect("systemctl is-system-running --wait | grep -E 'running|degraded'").is_ok() {
                return Ok(());
            }
            thread::sleep(Duration::from_secs(1));
        }
        bail!("no answer on SSH within {PATIENCE} s")
    }

    fn ssh(&self) -> Command {
        let mut command = Command::new("ssh");
        command.args(["-F", "/dev/null", "-l", "root", "-p", &self.port.to_string(), "-i"]).arg(&self.key);
        for option in [
            "BatchMode=yes",
            "ConnectTimeout=20",
            "IdentitiesOnly=yes",
            "LogLevel=ERROR",
            "ServerAliveInterval=20",
            "StrictHostKeyChecking=no",
            "UserKnownHostsFile=/dev/null",
        ] {
            command.args(["-o", option]);
        }
        command.args(["127.0.0.1", "--"]);
        command
    }
}

impl Drop for KvmBox {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn start(disk: &disk::Disk, kernel: Kernel, root: &Path, share: &Path, port: u16) -> Result<Child> {
    // Ended with its parent, even if that is killed.
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64", "-nodefaults", "-no-user-config"]);
    command.args(["-display", "none", "-M", "q35", "-accel", "tcg,thread=multi"]);
    command.args(["-cpu", "EPYC-Rome,+svm,+npt", "-smp", "2", "-m", MEMORY]);
    command.arg("-kernel").arg(disk.kernel(kernel)).arg("-initrd").arg(disk.initrd(kernel));
    command.args(["-append", "root=/dev/vda rw console=ttyS0 net.ifnames=0 quiet"]);
    let drive = |file: &Path, rest: &str| format!("file={},if=virtio,{rest}", file.display());
    command.args(["-drive", &drive(root, "format=qcow2,cache=unsafe")]);
    command.args(["-drive", &drive(share, "format=raw,read-only=on")]);
    let forward = format!("hostfwd=tcp:127.0.0.1:{port}-{}:22", disk::ADDRESS);
    command.args(["-netdev", &format!("user,id=net,net={}/24,restrict=on,{forward}", disk::NETWORK)]);
    command.args(["-device", "virtio-net-pci,netdev=net", "-device", "virtio-rng-pci"]);
    command.stdin(Stdio::null()).stdout(Stdio::null());
    command.spawn().context("QEMU could not be started; `cargo xtask setup` installs it")
}

/// A folder that goes when it is dropped.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self> {
        let path = std::env::temp_dir().join(format!("tapgate-box-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}
