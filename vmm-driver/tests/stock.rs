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
    let disk = cloud_image(&image::default_cache());
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

/// The disk, built once: packages by mmdebstrap, a GPT with one partition as sfdisk makes it, packed as qcow2.
fn cloud_image(cache: &Path) -> PathBuf {
    std::fs::create_dir_all(cache).unwrap();
    let disk = cache.join("test-cloud-image-1.qcow2");
    if disk.exists() {
        return disk;
    }
    let work = tempfile::Builder::new().prefix(".cloud-").tempdir_in(cache).unwrap();
    let at = |name: &str| work.path().join(name);
    std::fs::write(at("sources.list"), image::apt_sources()).unwrap();
    let tree = at("root");
    let setup = r#"printf 'LABEL=root / ext4 rw,discard,errors=remount-ro 0 1\n' > "$1/etc/fstab"; : > "$1/etc/machine-id"; rm -f "$1"/etc/ssh/ssh_host_*"#;
    let mut build = Command::new("mmdebstrap");
    build.args(["--variant=minbase", "--quiet", "--mode=root", "--format=directory"]);
    build.arg(format!("--include={PACKAGES}")).arg(format!("--customize-hook={setup}"));
    build.args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=path-exclude=/usr/share/doc/*"]);
    build.args(["--dpkgopt=path-exclude=/usr/share/locale/*", "--dpkgopt=path-exclude=/usr/share/man/*"]);
    build.arg("bookworm").arg(&tree);
    if !image::apt_sources().is_empty() {
        build.arg(at("sources.list"));
    }
    run(&mut build);
    let raw = at("disk.raw");
    std::fs::File::create(&raw).unwrap().set_len(2 << 30).unwrap();
    let start = 1 << 20;
    let mut mkfs = Command::new("mkfs.ext4");
    mkfs.args(["-q", "-F", "-L", "root", "-E", &format!("offset={start},lazy_itable_init=1"), "-d"]);
    run(mkfs.arg(&tree).arg(&raw).arg(format!("{}k", (2u64 << 20) - 2048)));
    let mut sfdisk = Command::new("sfdisk").arg("--quiet").arg(&raw).stdin(Stdio::piped()).spawn().unwrap();
    let table = "label: gpt\nstart=2048, size=4190208, type=linux\n";
    std::io::Write::write_all(&mut sfdisk.stdin.take().unwrap(), table.as_bytes()).unwrap();
    assert!(sfdisk.wait().unwrap().success());
    run(Command::new("qemu-img")
        .args(["convert", "-f", "raw", "-O", "qcow2"])
        .arg(&raw)
        .arg(at("disk.qcow2")));
    std::fs::rename(at("disk.qcow2"), &disk).unwrap();
    disk
}

fn run(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
