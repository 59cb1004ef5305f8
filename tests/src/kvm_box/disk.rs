//! The host's disk: Debian with systemd, SSH, QEMU and two kernels, built once by mmdebstrap and `mkfs.ext4 -d` and kept
//! beside the base images; and the disk that carries files into a box. Neither is ever mounted here.

use super::Kernel;
use crate::sh::{expect, run};
use anyhow::{Context as _, Result, ensure};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

/// The host's address and network inside QEMU's user-mode network.
pub const ADDRESS: &str = "192.0.2.15";
/// See [`ADDRESS`].
pub const NETWORK: &str = "192.0.2.0";

/// Raise when what this file builds changes.
const VERSION: u32 = 1;
const SUITE: &str = "bookworm";
const SIZE: u64 = 12 << 30;
/// What an operator would install by what `tapgate doctor` says, and what the demo's world is made of.
const PACKAGES: &str = "ca-certificates,curl,dbus,e2fsprogs,git,iproute2,iputils-ping,kmod,linux-image-cloud-amd64,\
    nftables,openssh-client,openssh-server,openssl,procps,qemu-system-x86,qemu-utils,systemd-sysv,udev,util-linux";
const NEWER_KERNEL: &str = "chroot \"$1\" apt-get install -qq -y --no-install-recommends -t bookworm-backports linux-image-cloud-amd64";

/// The built disk.
#[derive(Debug)]
pub struct Disk(PathBuf);

impl Disk {
    /// The disk, built now if it is not there.
    pub fn ready() -> Result<Self> {
        let cache = cache();
        fs::create_dir_all(&cache).with_context(|| format!("{} cannot be made", cache.display()))?;
        let lock = File::create(cache.join("kvm-box.lock"))?;
        lock.lock()?;
        let disk = Self(cache.join(format!("kvm-box-{VERSION}")));
        if !disk.0.exists() {
            build(&disk).context("the disk of the KVM host in a box cannot be built")?;
        }
        Ok(disk)
    }

    /// The root disk, never written.
    pub fn root(&self) -> PathBuf {
        self.0.join("root.raw")
    }

    /// The private key that its root account accepts.
    pub fn key(&self) -> PathBuf {
        self.0.join("key")
    }

    /// A kernel.
    pub fn kernel(&self, kernel: Kernel) -> PathBuf {
        self.0.join(format!("vmlinuz-{}", kernel.release()))
    }

    /// Its initramfs.
    pub fn initrd(&self, kernel: Kernel) -> PathBuf {
        self.0.join(format!("initrd-{}", kernel.release()))
    }
}

fn cache() -> PathBuf {
    std::env::var_os("TAPGATE_CACHE").map_or_else(|| "/var/cache/tapgate".into(), PathBuf::from)
}

fn build(disk: &Disk) -> Result<()> {
    let work = disk.0.with_extension(format!("work-{}", std::process::id()));
    let built = build_in(&work, disk);
    let _ = fs::remove_dir_all(&work);
    built
}

fn build_in(work: &Path, disk: &Disk) -> Result<()> {
    let (root, done) = (work.join("root"), work.join("done"));
    for folder in [&root, &done] {
        fs::create_dir_all(folder)?;
    }
    let list = work.join("sources.list");
    fs::write(&list, sources()?)?;
    let mut strap = Command::new("mmdebstrap");
    strap.args(["--variant=minbase", "--quiet", "--format=directory", &format!("--include={PACKAGES}")]);
    strap.args(["--aptopt=APT::Install-Recommends \"false\"", "--aptopt=Acquire::Languages \"none\""]);
    strap.args(["doc", "man", "locale"].map(|part| format!("--dpkgopt=path-exclude=/usr/share/{part}/*")));
    strap.arg(format!("--customize-hook={NEWER_KERNEL}"));
    expect(strap.arg(SUITE).arg(&root).arg(&list), b"")?;
    furnish(&root, &done)?;
    for kernel in [Kernel::V6_1, Kernel::V6_12] {
        let release = kernel.release();
        for (from, to) in [("vmlinuz", "vmlinuz"), ("initrd.img", "initrd")] {
            fs::copy(in_boot(&root, &format!("{from}-{release}"))?, done.join(format!("{to}-{release}")))?;
        }
    }
    ext4(&root, &done.join("root.raw"), SIZE)?;
    fs::rename(&done, &disk.0)?;
    Ok(())
}

/// Network, SSH key, the KVM module: what an installer would have asked.
fn furnish(root: &Path, done: &Path) -> Result<()> {
    let key = done.join("key");
    run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", "box", "-f", &key.to_string_lossy()])?;
    let write = |name: &str, text: &str| {
        let path = root.join(name);
        fs::create_dir_all(path.parent().unwrap_or(root))?;
        fs::write(path, text)
    };
    write("root/.ssh/authorized_keys", &fs::read_to_string(key.with_extension("pub"))?)?;
    write(
        "etc/systemd/network/10-box.network",
        &format!("[Match]\nName=e*\n[Network]\nAddress={ADDRESS}/24\n"),
    )?;
    write("etc/fstab", "/dev/vda / ext4 defaults 0 1\n")?;
    write("etc/hostname", "box\n")?;
    write("etc/modules-load.d/kvm.conf", "kvm_amd\n")?;
    let mut enable = Command::new("systemctl");
    expect(enable.arg("--root").arg(root).args(["enable", "systemd-networkd", "ssh"]), b"")?;
    Ok(())
}

fn in_boot(root: &Path, prefix: &str) -> Result<PathBuf> {
    let boot = fs::read_dir(root.join("boot"))?.flatten().map(|entry| entry.path());
    let mut fitting =
        boot.filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix)));
    fitting.next().with_context(|| format!("Debian brought no {prefix}*"))
}

/// Where this machine's own apt finds Debian, with the suites that the host needs.
fn sources() -> Result<String> {
    let format = "$(SITE) $(CODENAME) $(COMPONENT) $(ORIGIN)";
    let text = run("apt-get", ["indextargets", "--format", format, "Created-By: Packages"])?;
    let mut lines: Vec<String> = text
        .lines()
        .filter_map(|line| match line.split(' ').collect::<Vec<_>>()[..] {
            [site, suite, "main", "Debian"] if suite.starts_with(SUITE) => Some((site, suite)),
            _ => None,
        })
        .map(|(site, suite)| format!("deb {site} {suite} main\n"))
        .collect();
    let release = format!(" {SUITE} main\n");
    let own = lines.iter().find(|line| line.ends_with(&release));
    let own = own.with_context(|| format!("this machine's apt knows no {SUITE}"))?;
    // Backports lie where the release itself does.
    lines.push(own.replace(&release, &format!(" {SUITE}-backports main\n")));
    lines.sort();
    lines.dedup();
    Ok(lines.concat())
}

/// Packs the files and folders, each under its name, into a disk.
pub fn pack(files: &[(&Path, &str)], staging: &Path, disk: &Path) -> Result<()> {
    fs::create_dir_all(staging)?;
    for (from, name) in files {
        let to = staging.join(name);
        fs::create_dir_all(to.parent().unwrap_or(staging))?;
        let mut copy = Command::new("cp");
        expect(copy.args(["--archive", "--sparse=always", "--reflink=auto"]).arg(from).arg(to), b"")?;
    }
    let used = run("du", ["-s", "--block-size=1", &staging.to_string_lossy()])?;
    let used: u64 = used.split_whitespace().next().and_then(|text| text.parse().ok()).unwrap_or(0);
    ensure!(used < SIZE, "what is to be shared with the box is larger than {SIZE} octets");
    ext4(staging, disk, used + used / 5 + (64 << 20))?;
    fs::remove_dir_all(staging)?;
    Ok(())
}

fn ext4(root: &Path, disk: &Path, size: u64) -> Result<()> {
    File::create(disk)?.set_len(size)?;
    expect(Command::new("mkfs.ext4").args(["-q", "-F", "-d"]).arg(root).arg(disk), b"")?;
    Ok(())
}
