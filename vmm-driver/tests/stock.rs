//! A stock cloud image: a partitioned qcow2 disk with cloud-init and without anything of ours, built as Debian builds its own,
//! imported and booted on our seed.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{PATIENCE, World};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use tapgate_model::VmId;
use tapgate_vmm::image::{self, Import};
use tapgate_vmm::{Exit, VmSpec, Vmm as _};

/// What Debian's cloud image has, as far as a boot needs it.
const PACKAGES: &str = "ca-certificates,cloud-guest-utils,cloud-init,curl,dbus,e2fsprogs,initramfs-tools,iproute2,iputils-ping,\
    linux-image-cloud-amd64,netplan.io,openssh-server,openssl,procps,sudo,systemd-resolved,systemd-sysv,udev";

#[test]
fn real_vm_stock_cloud_image_boots_unmodified() {
    // Built here: where the test runs, there is no network.
    let disk = cloud_image(&image::default_cache(), Layout::Debian);
    World::run(|world| async move {
        let cache = world.dir.path().join("images");
        let stock = Import { name: "stock", disk: &disk, kernel: None, cmdline: None };
        let image = image::import(&cache, &stock).unwrap();
        image::verify(image.dir()).unwrap();
        assert!(image.manifest().kernel_version.ends_with("-cloud-amd64"), "{:?}", image.manifest());
        assert!(image.manifest().cmdline.starts_with("root=UUID="));
        assert_eq!(
            image::import(&cache, &stock).unwrap().dir(),
            image.dir(),
            "the same files are the same image"
        );

        let datapath = world.datapath().await;
        let id = VmId::generate();
        let env = vec![
            ("TOKEN".to_owned(), "IRONSH_PROXY_token".to_owned()),
            ("NASTY".to_owned(), "a'b\"$(id)`id` é".to_owned()),
        ];
        let spec = VmSpec { image: Some(image), memory_mib: 1024, ..world.spec_without_image(&id, 20, env) };
        let _service = common::Service::start(&datapath, spec.seed.user_data().unwrap());
        let machine = common::driver().boot(&spec, common::gate(&datapath, &spec).await).await.unwrap();
        let _reap = common::Reap::of(machine.handle().process.pid);
        common::ready_within(&datapath, &spec, machine.as_ref(), PATIENCE * 3).await;
        let ask = |command: &str| world.ask(datapath.egress(), spec.net, command);
        assert!(
            ask("cloud-init status --wait --long; true").contains("NoCloud"),
            "{}",
            ask("cloud-init status --long; true")
        );
        assert_eq!(ask("hostname"), "guest-one");
        assert_eq!(ask("test -e /usr/lib/tapgate || echo none"), "none", "nothing of ours is in it");
        assert_eq!(ask("bash -lc 'printenv TOKEN'"), "IRONSH_PROXY_token");
        assert_eq!(ask("bash -lc 'printenv NASTY'"), "a'b\"$(id)`id` é");
        let ca = "/usr/local/share/ca-certificates/tapgate.crt";
        assert!(
            ask(&format!("openssl verify -CAfile /etc/ssl/certs/ca-certificates.crt {ca}")).ends_with("OK")
        );
        assert!(ask("ip -4 -o addr show dev eth0").contains(" 10.214.0.21/32 "));
        assert!(ask("ip -6 -o addr show dev eth0").contains(" fd74:6761:7465::15/128 "));
        assert!(ask("ip -6 route show default").contains("via fe80::1 dev eth0"));
        assert!(ask("resolvectl dns eth0").contains("169.254.77.1"));
        let served = ask("curl -sS --max-time 20 http://169.254.169.254/v1/user-data");
        assert!(served.starts_with("#cloud-config"), "traffic flows");
        assert!(
            ask("ping -6 -c 1 -W 5 -I fd74:6761:7465::15 fe80::1%eth0").contains("1 received"),
            "by IPv6 too"
        );
        let size: u64 = ask("df --output=size -B1 / | tail -1").trim().parse().unwrap();
        assert!(size > 3 << 30, "its root has grown into its disk: {size}");
        assert_eq!(
            machine.shutdown(PATIENCE * 2).await.unwrap(),
            Exit::GuestShutdown,
            "logind hears the power button"
        );
    });
}

/// Imported in the ordinary run; with `TAPGATE_LONG` set booted too, with a kernel that is given beside the disk.
#[test]
fn real_vm_stock_cloud_image_in_ubuntus_layout() {
    let disk = cloud_image(&image::default_cache(), Layout::Ubuntu);
    World::run(|world| async move {
        let cache = world.dir.path().join("images");
        let found = Import { name: "noble", disk: &disk, kernel: None, cmdline: None };
        let found = image::import(&cache, &found).unwrap();
        assert!(found.manifest().kernel_version.ends_with("-cloud-amd64"), "{:?}", found.manifest());
        let (kernel, initrd) = (world.dir.path().join("vmlinuz"), world.dir.path().join("initrd"));
        std::fs::copy(found.kernel(), &kernel).unwrap();
        std::fs::copy(found.initrd(), &initrd).unwrap();
        let cmdline = "root=LABEL=cloudimg-rootfs ro";
        let given =
            Import { name: "noble", disk: &disk, kernel: Some((&kernel, &initrd)), cmdline: Some(cmdline) };
        let given = image::import(&cache, &given).unwrap();
        assert_ne!(given.dir(), found.dir());
        assert_eq!(given.manifest().kernel, found.manifest().kernel);
        assert_eq!(
            (given.manifest().kernel_version.as_str(), given.manifest().cmdline.as_str()),
            ("given", cmdline)
        );
        if std::env::var_os("TAPGATE_LONG").is_none() {
            return;
        }
        let datapath = world.datapath().await;
        for (slot, image) in [(21, found), (22, given)] {
            let spec = world.spec_without_image(&VmId::generate(), slot, Vec::new());
            let spec = VmSpec { image: Some(image), memory_mib: 1024, ..spec };
            let machine = common::driver().boot(&spec, common::gate(&datapath, &spec).await).await.unwrap();
            let _reap = common::Reap::of(machine.handle().process.pid);
            common::ready_within(&datapath, &spec, machine.as_ref(), PATIENCE * 3).await;
            let ask = |command: &str| world.ask(datapath.egress(), spec.net, command);
            assert!(ask("cloud-init status --wait --long; true").contains("NoCloud"));
            assert_eq!(ask("hostname"), "guest-one");
            assert_eq!(
                ask("findmnt -no LABEL / && findmnt -no LABEL /boot && findmnt -no LABEL /boot/efi"),
                "cloudimg-rootfs\nBOOT\nUEFI"
            );
            assert_eq!(ask("netplan get ethernets.eth0.mtu"), "1500", "the network is netplan's");
            let size: u64 = ask("df --output=size -B1 / | tail -1").trim().parse().unwrap();
            assert!(size > 3 << 30, "its root has grown into its disk: {size}");
            assert_eq!(machine.shutdown(PATIENCE * 2).await.unwrap(), Exit::GuestShutdown);
            datapath.detach(spec.net).await.unwrap();
        }
    });
}

#[test]
fn real_vm_import_refuses_what_would_reach_the_host() {
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let cache = at("images");
    let import = |disk: &Path| {
        let import = Import { name: "x", disk, kernel: None, cmdline: None };
        image::import(&cache, &import).unwrap_err().to_string()
    };
    std::fs::write(at("secret"), vec![b's'; 1 << 20]).unwrap();
    let qemu_img = |args: &[&str]| {
        assert!(
            Command::new("qemu-img")
                .args(args)
                .stdout(Stdio::null())
                .current_dir(&dir)
                .status()
                .unwrap()
                .success()
        );
    };
    qemu_img(&["create", "-f", "qcow2", "-b", "secret", "-F", "raw", "backed.qcow2"]);
    qemu_img(&["create", "-f", "qcow2", "-o", "data_file=secret,data_file_raw=on", "external.qcow2", "1M"]);
    qemu_img(&["create", "-f", "vmdk", "disk.vmdk", "1M"]);
    qemu_img(&["create", "-f", "qcow2", "empty.qcow2", "16M"]);
    assert!(import(&at("backed.qcow2")).contains("backing file"));
    assert!(import(&at("external.qcow2")).contains("another file"));
    assert!(import(&at("disk.vmdk")).contains("VMDK"));
    assert!(import(&at("empty.qcow2")).contains("--cmdline"), "{}", import(&at("empty.qcow2")));
    assert!(import(&at("nothing")).contains("nothing"));
    let names = Import { name: "../x", disk: &at("secret"), kernel: None, cmdline: None };
    assert!(image::import(&cache, &names).unwrap_err().to_string().contains("not a name"));
    let left: Vec<_> = std::fs::read_dir(&cache).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(left.is_empty(), "{left:?}");
}

/// How a cloud image is cut up.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Layout {
    /// One partition.
    Debian,
    /// As of 24.04: the root is the first by number and the last on the disk; `/boot` and the firmware have partitions of their own.
    Ubuntu,
}

/// The packages, fetched once.
fn tree(cache: &Path) -> PathBuf {
    std::fs::create_dir_all(cache).unwrap();
    let tar = cache.join("test-cloud-tree-1.tar");
    if !tar.exists() {
        let work = tempfile::Builder::new().prefix(".cloud-").tempdir_in(cache).unwrap();
        std::fs::write(work.path().join("sources.list"), image::apt_sources()).unwrap();
        let setup = r#": > "$1/etc/machine-id"; rm -f "$1"/etc/ssh/ssh_host_*"#;
        let mut build = Command::new("mmdebstrap");
        build.args(["--variant=minbase", "--quiet", "--mode=root", "--format=tar"]);
        build.arg(format!("--include={PACKAGES}")).arg(format!("--customize-hook={setup}"));
        build.args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=path-exclude=/usr/share/doc/*"]);
        build.args(["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/man/*"]);
        build.arg("bookworm").arg(work.path().join("tree.tar"));
        if !image::apt_sources().is_empty() {
            build.arg(work.path().join("sources.list"));
        }
        run(&mut build);
        std::fs::rename(work.path().join("tree.tar"), &tar).unwrap();
    }
    tar
}

/// The disk, built once: file systems as mkfs makes them of folders, a GPT as sfdisk makes it, packed as qcow2.
fn cloud_image(cache: &Path, layout: Layout) -> PathBuf {
    const MIB: u64 = 1 << 20;
    let disk = cache.join(match layout {
        Layout::Debian => "test-cloud-image-2.qcow2",
        Layout::Ubuntu => "test-cloud-image-2-ubuntu.qcow2",
    });
    if disk.exists() {
        return disk;
    }
    let tar = tree(cache);
    let work = tempfile::Builder::new().prefix(".cloud-").tempdir_in(cache).unwrap();
    let at = |name: &str| work.path().join(name);
    let root = at("root");
    std::fs::create_dir(&root).unwrap();
    run(Command::new("tar").args(["--numeric-owner", "-xpf"]).arg(&tar).arg("-C").arg(&root));
    let raw = at("disk.raw");
    let ext4 = |from: &Path, label: &str, start: u64, size: u64| {
        let mut mkfs = Command::new("mkfs.ext4");
        mkfs.args(["-q", "-F", "-L", label, "-E", &format!("offset={start},lazy_itable_init=1"), "-d"]);
        run(mkfs.arg(from).arg(&raw).arg(format!("{}k", size / 1024)));
    };
    let size = 3072 * MIB;
    std::fs::File::create(&raw).unwrap().set_len(size).unwrap();
    let table = match layout {
        Layout::Debian => {
            std::fs::write(root.join("etc/fstab"), "LABEL=root / ext4 rw,discard,errors=remount-ro 0 1\n")
                .unwrap();
            ext4(&root, "root", MIB, size - 2 * MIB);
            format!("label: gpt\nstart=2048, size={}, type=linux\n", (size - 2 * MIB) / 512)
        }
        Layout::Ubuntu => {
            let fstab = "LABEL=cloudimg-rootfs / ext4 discard,commit=30,errors=remount-ro 0 1\n\
                LABEL=BOOT /boot ext4 defaults 0 2\nLABEL=UEFI /boot/efi vfat umask=0077 0 1\n";
            std::fs::write(root.join("etc/fstab"), fstab).unwrap();
            let boot = at("boot");
            std::fs::rename(root.join("boot"), &boot).unwrap();
            std::fs::create_dir(root.join("boot")).unwrap();
            std::fs::create_dir(boot.join("efi")).unwrap();
            // What update-initramfs leaves beside the newest.
            for (link, prefix) in [("vmlinuz", "vmlinuz-"), ("initrd.img", "initrd.img-")] {
                let names = std::fs::read_dir(&boot).unwrap().map(|entry| entry.unwrap().file_name());
                let newest = names.max_by_key(|name| name.to_string_lossy().starts_with(prefix)).unwrap();
                std::os::unix::fs::symlink(newest, boot.join(link)).unwrap();
            }
            let (firmware, kernel, system) = (5 * MIB, 111 * MIB, 623 * MIB);
            ext4(&boot, "BOOT", kernel, system - kernel);
            ext4(&root, "cloudimg-rootfs", system, size - MIB - system);
            let mut mkfs = Command::new("mkfs.vfat");
            mkfs.args(["-n", "UEFI", "-F", "32", "--offset", &(firmware / 512).to_string()]);
            run(mkfs.arg(&raw).arg(((kernel - firmware) / 1024).to_string()));
            let sectors = |from: u64, to: u64| format!("start={}, size={}", from / 512, (to - from) / 512);
            format!(
                "label: gpt\n1: {}, type=linux\n14: {}, type=21686148-6449-6E6F-744E-656564454649\n15: {}, type=uefi\n\
                 16: {}, type=BC13C2FF-59E6-4262-A352-B275FD6F7172\n",
                sectors(system, size - MIB),
                sectors(MIB, firmware),
                sectors(firmware, kernel),
                sectors(kernel, system),
            )
        }
    };
    let mut sfdisk = Command::new("sfdisk").arg("--quiet").arg(&raw).stdin(Stdio::piped()).spawn().unwrap();
    std::io::Write::write_all(&mut sfdisk.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    let mut convert = Command::new("qemu-img");
    run(convert.args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(at("disk.qcow2")));
    std::fs::rename(at("disk.qcow2"), &disk).unwrap();
    disk
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
