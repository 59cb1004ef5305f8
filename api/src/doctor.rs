//! `tapgate doctor`: tests what this host can do, and says how to mend what is missing.
//!
//! Looks and tries; changes nothing that outlives it, but that the data directory may remember what KVM can do. A check that cannot be made counts as failed.

use crate::config::{Config, DriverKind};
use crate::http::tls::Tls;
use serde::Serialize;
use std::{
    path::{Path, PathBuf},
    process::Command,
};
use tapgate_vmm::{
    accel::{self, Accel},
    cgroup::Cgroup,
};

/// A certificate that ends so soon is to be renewed: 14 days.
const SOON_US: i64 = 14 * 24 * 3600 * 1_000_000;
const RENEW: &str = "renew the certificate in its place: clients refuse one that is over, and the daemon reads it again by itself";

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Outcome {
    /// tapgate cannot serve without it.
    Fail,
    /// As it should be.
    Ok,
    /// tapgate serves, but less well.
    Warn,
}

/// One thing that was looked at.
#[derive(Clone, Debug, Serialize)]
pub struct Check {
    /// What.
    pub name: &'static str,
    /// How it ended.
    pub outcome: Outcome,
    /// What was found.
    pub found: String,
    /// What to do about it, unless it is well.
    pub remedy: Option<String>,
}

impl Check {
    fn ok(name: &'static str, found: impl Into<String>) -> Self {
        Self { name, outcome: Outcome::Ok, found: found.into(), remedy: None }
    }
    fn bad(
        outcome: Outcome,
        name: &'static str,
        found: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Self {
        Self { name, outcome, found: found.into(), remedy: Some(remedy.into()) }
    }
}

/// Makes every check that the configuration calls for.
pub fn checks(config: &Config) -> Vec<Check> {
    let mut checks = vec![
        root(),
        kernel(),
        bpf(),
        bpffs(),
        tun(),
        cgroup(),
        disk_limits(&config.data_dir),
        program("nft", Path::new("nft"), "nftables"),
    ];
    if config.driver == DriverKind::Qemu {
        checks.push(program("qemu-system-x86_64", &qemu(config), "qemu-system-x86"));
        checks.push(program("qemu-img", Path::new("qemu-img"), "qemu-utils"));
        checks.push(image(config));
        checks.push(kvm(config));
    }
    if let DriverKind::Firecracker | DriverKind::CloudHypervisor = config.driver {
        checks.push(vmm(config));
        checks.push(program("qemu-img", Path::new("qemu-img"), "qemu-utils"));
        checks.push(image(config));
        checks.push(kvm_opens());
    }
    checks.push(data_dir(&config.data_dir));
    checks.push(listen(config));
    checks.extend(config.tls.clone().map(|(cert, key)| tls(cert, key)));
    checks
}

fn root() -> Check {
    match nix::unistd::geteuid().is_root() {
        true => Check::ok("root", "running as root"),
        false => {
            Check::bad(Outcome::Fail, "root", "not root", "run with sudo: namespaces, taps and BPF need it")
        }
    }
}

fn kernel() -> Check {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim().to_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 6) {
        Check::ok("kernel", format!("{release}: programs attach by TCX"))
    } else if version >= (6, 1) {
        Check::ok("kernel", format!("{release}: programs attach by clsact (TCX needs 6.6)"))
    } else {
        Check::bad(
            Outcome::Fail,
            "kernel",
            release,
            "tapgate needs Linux 6.1 or later; on Debian 12 install linux-image-amd64",
        )
    }
}

fn bpf() -> Check {
    let all = tapgate_datapath::requirements();
    let missing: Vec<String> =
        all.iter().filter(|one| !one.present).map(|one| format!("{} ({})", one.name, one.since)).collect();
    if missing.is_empty() {
        return Check::ok("bpf", format!("all {} features that the programs need", all.len()));
    }
    Check::bad(
        Outcome::Fail,
        "bpf",
        format!("missing: {}", missing.join(", ")),
        "use a kernel of the version in brackets or later, built with CONFIG_BPF_SYSCALL=y, CONFIG_NET_CLS_BPF and CONFIG_DEBUG_INFO_BTF=y",
    )
}

fn bpffs() -> Check {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mounted = mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    });
    match mounted {
        true => Check::ok("bpffs", "/sys/fs/bpf"),
        false => Check::bad(
            Outcome::Warn,
            "bpffs",
            "not mounted; tapgate mounts it at start",
            "mount it at boot: `mount -t bpf bpf /sys/fs/bpf`",
        ),
    }
}

fn tun() -> Check {
    match std::fs::OpenOptions::new().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => Check::ok("tun", "/dev/net/tun"),
        Err(error) => Check::bad(Outcome::Fail, "tun", error.to_string(), "load the driver: `modprobe tun`"),
    }
}

fn cgroup() -> Check {
    let Some(root) = Cgroup::root() else {
        return Check::bad(
            Outcome::Warn,
            "cgroup",
            "no cgroup v2 that can be written",
            "boot with systemd.unified_cgroup_hierarchy=1; without it VMs have no CPU, memory and disk limits of the host's",
        );
    };
    let missing = tapgate_vmm::cgroup::missing_controllers(&root);
    match missing.is_empty() {
        true => Check::ok("cgroup", format!("version 2 at {}", root.display())),
        false => Check::bad(
            Outcome::Warn,
            "cgroup",
            format!("version 2, without {}", missing.join(", ")),
            "boot with systemd.unified_cgroup_hierarchy=1 (a controller in a version 1 hierarchy is missing here); VMs have no limit \
             of what is missing",
        ),
    }
}

/// Whether a VM's disk can be limited where it will lie.
fn disk_limits(data_dir: &Path) -> Check {
    let existing = data_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match tapgate_vmm::block::device_of(existing) {
        Some(disk) => Check::ok("disk_limits", format!("{} lies on disk {disk}", existing.display())),
        None => Check::bad(
            Outcome::Warn,
            "disk_limits",
            format!("no disk of this host is found behind {}", existing.display()),
            "put data_dir on a local disk; elsewhere (a network's file system, ZFS) VMs have no limit of disk I/O",
        ),
    }
}

/// The QEMU that the daemon will run.
fn qemu(config: &Config) -> PathBuf {
    config.vmm_program.clone().unwrap_or_else(tapgate_vmm::default_program)
}

fn program(name: &'static str, path: &Path, package: &str) -> Check {
    let shown = path.display();
    match Command::new(path).arg("--version").output() {
        Ok(output) if output.status.success() => {
            Check::ok(name, String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or_default())
        }
        Ok(output) => Check::bad(
            Outcome::Fail,
            name,
            format!("`{shown} --version` ended with {}", output.status),
            format!("reinstall it: `apt-get install --reinstall {package}`"),
        ),
        Err(error) => Check::bad(
            Outcome::Fail,
            name,
            format!("{shown}: {error}"),
            format!("install it: `apt-get install {package}`"),
        ),
    }
}

fn image(config: &Config) -> Check {
    match crate::images::find(&config.image_dir, &config.image) {
        Ok(image) => Check::ok("image", image.dir().display().to_string()),
        Err(error) => {
            let build = crate::images::command("build", &config.image_dir);
            Check::bad(Outcome::Fail, "image", error.to_string(), format!("build it: `{build}`"))
        }
    }
}

/// Opening `/dev/kvm` proves little: a guest's kernel is run for a moment, once there is an image to take it from.
fn kvm(config: &Config) -> Check {
    let remedy = "guests run under emulation (TCG), several times slower; turn on virtualisation in the firmware and \
                  `modprobe kvm_amd` or `kvm_intel`";
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Check::bad(Outcome::Warn, "kvm", format!("/dev/kvm: {error}"), remedy);
    }
    let Ok(image) = crate::images::find(&config.image_dir, &config.image) else {
        return Check::ok("kvm", "/dev/kvm opens; whether it runs guests is tried once there is an image");
    };
    let probe = accel::probe(&image, &qemu(config), &config.data_dir);
    match probe.accel {
        Accel::Kvm => Check::ok("kvm", probe.reason),
        Accel::Tcg => Check::bad(Outcome::Warn, "kvm", probe.reason, remedy),
    }
}

/// The program of a driver that no package brings.
fn vmm(config: &Config) -> Check {
    let usual = match config.driver {
        DriverKind::Firecracker => "/usr/local/bin/firecracker",
        _ => "/usr/local/bin/cloud-hypervisor",
    };
    let path = config.vmm_program.clone().unwrap_or_else(|| usual.into());
    match path.is_file() {
        true => Check::ok("vmm", path.display().to_string()),
        false => Check::bad(
            Outcome::Fail,
            "vmm",
            format!("there is no {}", path.display()),
            "take the program from its project's releases and set `vmm_program`",
        ),
    }
}

/// For a driver that has no emulation, and may be on a host without QEMU to try more with.
fn kvm_opens() -> Check {
    match accel::open_kvm() {
        Ok(_) => Check::ok("kvm", "/dev/kvm opens"),
        Err(error) => Check::bad(
            Outcome::Fail,
            "kvm",
            format!("/dev/kvm: {error}"),
            "turn on virtualisation in the firmware and `modprobe kvm_amd` or `kvm_intel`, or set driver = \"qemu\"",
        ),
    }
}

fn data_dir(dir: &Path) -> Check {
    let existing = dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match nix::unistd::access(existing, nix::unistd::AccessFlags::W_OK) {
        Ok(()) => Check::ok("data_dir", dir.display().to_string()),
        Err(error) => Check::bad(
            Outcome::Fail,
            "data_dir",
            format!("{}: {error}", existing.display()),
            "give another with --data-dir, or make it writable",
        ),
    }
}

fn listen(config: &Config) -> Check {
    match std::net::TcpListener::bind(config.listen) {
        Ok(_) => Check::ok("listen", config.listen.to_string()),
        Err(error) => Check::bad(
            Outcome::Warn,
            "listen",
            format!("{}: {error}", config.listen),
            "a daemon runs already, or another program has the port: give another with --listen",
        ),
    }
}

fn tls(cert: PathBuf, key: PathBuf) -> Check {
    let path = cert.display().to_string();
    let until_us = match Tls::load(cert, key) {
        Ok(loaded) => loaded.until_us(),
        Err(error) => {
            let remedy = "give tls_cert the certificate chain, the server's own first, and tls_key its private key, both in PEM";
            return Check::bad(Outcome::Fail, "tls", error.to_string(), remedy);
        }
    };
    let until = format!("{path}: until {}", crate::http::time(until_us));
    match until_us - tapgate_store::now_us() {
        ..=0 => Check::bad(Outcome::Warn, "tls", format!("{until}, which is over"), RENEW),
        left if left < SOON_US => Check::bad(Outcome::Warn, "tls", format!("{until}, which is soon"), RENEW),
        _ => Check::ok("tls", until),
    }
}

/// Options of `tapgate doctor`.
#[derive(clap::Args, Debug)]
#[group(skip)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
    /// What the daemon will be started with.
    #[command(flatten)]
    pub serve: crate::serve::Args,
}

/// Makes the checks and prints them.
///
/// # Errors
/// The configuration is unusable, or tapgate cannot serve on this host.
pub fn run(args: Args) -> anyhow::Result<()> {
    let json = args.json;
    let checks = checks(&args.serve.config()?);
    if json {
        println!("{}", serde_json::json!({ "checks": checks }));
    } else {
        for check in &checks {
            let mark = match check.outcome {
                Outcome::Ok => "ok  ",
                Outcome::Warn => "warn",
                Outcome::Fail => "FAIL",
            };
            println!("{mark}  {:<20} {}", check.name, check.found);
            if let Some(remedy) = &check.remedy {
                println!("      {:<20} -> {remedy}", "");
            }
        }
    }
    match checks.iter().filter(|check| check.outcome == Outcome::Fail).count() {
        0 => Ok(()),
        1 => anyhow::bail!("one thing has to be mended before tapgate can serve here"),
        failed => anyhow::bail!("{failed} things have to be mended before tapgate can serve here"),
    }
}
