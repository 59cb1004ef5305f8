//! A closed world for the drivers' tests: a host namespace with a real datapath, real VMs behind real gates, and SSH into
//! them. Everything goes with the test, however it ends.
#![allow(dead_code, reason = "each test file uses its own part")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use socket2::{Domain, Protocol, Socket, Type};
use std::future::Future;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::Duration;
use tapgate_datapath::{Datapath, DatapathConfig, Gate};
use tapgate_ebpf_common::net::port;
use tapgate_model::{GuestNet, Mode, RuleSet, UserId, VmId, VmPolicy};
use tapgate_netns::{Netns, Rtnl};
use tapgate_vmm::accel::Accel;
use tapgate_vmm::image::{self, Image};
use tapgate_vmm::{QemuDriver, Running, Seed, VmSpec, Vmm as _};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Under TCG on a busy machine a boot takes its time.
pub const PATIENCE: Duration = Duration::from_secs(180);

/// The base image, built once.
pub fn debian() -> Image {
    image::build_debian12(&image::default_cache()).unwrap()
}

/// The stand-in with another disk.
pub fn reseal(dir: &Path, disk: &[u8]) -> Image {
    use tapgate_vmm::image::{FileSeal, Manifest};
    std::fs::write(dir.join("disk.raw"), disk).unwrap();
    let manifest = dir.join("manifest.json");
    let old: Manifest = serde_json::from_slice(&std::fs::read(&manifest).unwrap()).unwrap();
    let new = Manifest { disk: FileSeal::of(dir, "disk.raw").unwrap(), ..old };
    std::fs::write(manifest, serde_json::to_vec(&new).unwrap()).unwrap();
    image::open(dir).unwrap()
}

/// An image for a VMM that runs no guest: files of the right kinds.
pub fn stand_in(dir: &Path) -> Image {
    use tapgate_vmm::image::{FileSeal, Manifest};
    if !dir.exists() {
        std::fs::create_dir(dir).unwrap();
        std::fs::write(dir.join("kernel"), b"\x7fELF and so on").unwrap();
        std::fs::write(dir.join("initrd"), b"070701").unwrap();
        let disk = std::fs::File::create(dir.join("disk.raw")).unwrap();
        disk.set_len(16 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, &[7; 4096], 8 << 20).unwrap();
        let seal = |name: &str| FileSeal::of(dir, name).unwrap();
        let manifest = Manifest {
            format: 1,
            name: "stand-in".into(),
            recipe: "none".into(),
            kernel: seal("kernel"),
            initrd: seal("initrd"),
            disk: seal("disk.raw"),
            kernel_version: "0".into(),
            cmdline: "root=/dev/vda rw".into(),
            packages: Vec::new(),
        };
        std::fs::write(dir.join("manifest.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
    }
    image::open(dir).unwrap()
}

/// A VM is emulated here, whatever the machine offers: the tests are about the driver.
pub fn driver() -> QemuDriver {
    QemuDriver::new(Accel::Tcg)
}

/// What tools run as that make a disk for no VM in particular.
pub fn work() -> tapgate_vmm::confine::tool::Work<'static> {
    static WANTED: LazyLock<tapgate_vmm::turn::Wanted> = LazyLock::new(Default::default);
    tapgate_vmm::confine::tool::Work { uid: tapgate_vmm::uid_of(1), wanted: &WANTED }
}

/// The host.
pub struct World {
    pub dir: tempfile::TempDir,
    pub instance: String,
    pub host: Netns,
    pub key: PathBuf,
}

impl World {
    pub fn new() -> Self {
        let instance = format!("v{}-{}", std::process::id() % 100_000, NEXT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::tempdir().unwrap();
        let key = dir.path().join("key");
        let mut keygen = Command::new("ssh-keygen");
        assert!(status(keygen.args(["-q", "-t", "ed25519", "-N", "", "-C", "test", "-f"]).arg(&key)));
        let host = Netns::create(&format!("tgvm-{instance}")).unwrap();
        Self { dir, instance, host, key }
    }

    /// Runs the test on threads of the host's namespace.
    pub fn run<F: Future<Output = ()>>(test: impl FnOnce(Arc<Self>) -> F + Send) {
        // The image is built out here: in the host's namespace is no network to fetch packages by.
        if std::thread::current().name().is_some_and(|test| test.contains("real_vm")) {
            drop(debian());
        }
        let world = Arc::new(Self::new());
        let host = world.host.clone();
        host.run(|| {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let inside = Rtnl::connect(&world.host).unwrap();
                inside.set_up(inside.link("lo").await.unwrap()).await.unwrap();
                test(world).await;
            });
        })
        .unwrap();
    }

    /// A namespace that stands for a guest.
    pub fn guest_name(&self) -> String {
        format!("tgvm-{}-g", self.instance)
    }

    pub fn config(&self) -> DatapathConfig {
        DatapathConfig {
            instance: self.instance.clone(),
            pin_root: PathBuf::from(format!("/sys/fs/bpf/tgvm-{}", self.instance)),
            guest_v4: "10.214.0.0/16".parse().unwrap(),
            guest_v6: Some("fd74:6761:7465::/64".parse().unwrap()),
            guest_v6_routed: false,
            uplink: None,
            flows_per_second: 1000.try_into().unwrap(),
        }
    }

    pub async fn datapath(&self) -> Datapath {
        Datapath::open(self.config()).await.unwrap()
    }

    pub fn spec(&self, id: &VmId, slot: u32, env: Vec<(String, String)>) -> VmSpec {
        VmSpec { image: Some(debian()), ..self.spec_without_image(id, slot, env) }
    }

    pub fn spec_without_image(&self, id: &VmId, slot: u32, env: Vec<(String, String)>) -> VmSpec {
        let net = net(slot);
        let seed = Seed {
            instance_id: id.to_string(),
            hostname: "guest-one".into(),
            ssh_keys: vec![
                std::fs::read_to_string(self.key.with_extension("pub")).unwrap().trim().to_owned(),
            ],
            net,
            ca_pem: self.ca(),
            env,
        };
        VmSpec {
            id: id.clone(),
            dir: self.dir.path().join(id.as_str()),
            image: None,
            vcpus: 1,
            memory_mib: 512,
            disk_bytes: 4 << 30,
            net,
            seed,
            snapshot: None,
            resume: tapgate_vmm::Resume::Never,
            guest_ns: None,
        }
    }

    /// A CA of openssl's making.
    pub fn ca(&self) -> String {
        let (key, cert) = (self.dir.path().join("ca.key"), self.dir.path().join("ca.pem"));
        if !cert.exists() {
            let args = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 30 -subj /CN=tapgate-test";
            let mut command = Command::new("openssl");
            command
                .args(args.split(' '))
                .arg("-keyout")
                .arg(&key)
                .arg("-out")
                .arg(&cert)
                .stderr(Stdio::null());
            assert!(status(&mut command));
        }
        std::fs::read_to_string(cert).unwrap()
    }

    /// Runs a command in the guest, over SSH from the egress namespace.
    pub fn ssh(&self, egress: &Netns, net: GuestNet, command: &str) -> Output {
        self.ssh_with(egress, net, command, Stdio::null())
    }

    fn ssh_with(&self, egress: &Netns, net: GuestNet, command: &str, input: Stdio) -> Output {
        let mut ssh = Command::new("ssh");
        ssh.arg("-i").arg(&self.key).args([
            "-o",
            "StrictHostKeyChecking=no",
            "-o",
            "UserKnownHostsFile=/dev/null",
        ]);
        ssh.args(["-o", "LogLevel=ERROR", "-o", "BatchMode=yes", "-o", "ConnectTimeout=60"]);
        ssh.arg(format!("root@{}", net.v4)).arg(command).stdin(input);
        egress.run(move || ssh.output()).unwrap().unwrap()
    }

    /// Puts a Java runtime with its key store into the guest, made of this machine's: an image that has Java, as far as trust goes.
    pub fn give_java(&self, egress: &Netns, net: GuestNet) {
        let at = |name: &str| self.dir.path().join(name);
        let root = at("java-root");
        let (jvm, store) = (root.join("usr/lib/jvm/java"), root.join("etc/ssl/certs/java"));
        for folder in [jvm.parent().unwrap(), &store, &root.join("usr/bin")] {
            std::fs::create_dir_all(folder).unwrap();
        }
        let mut jlink = Command::new("jlink");
        jlink.args(["--add-modules", "java.base", "--strip-debug", "--compress=2", "--output"]);
        assert!(status(jlink.arg(&jvm)), "jlink, of default-jdk-headless");
        std::fs::copy("/etc/ssl/certs/java/cacerts", store.join("cacerts")).unwrap();
        std::os::unix::fs::symlink("/usr/lib/jvm/java/bin/keytool", root.join("usr/bin/keytool")).unwrap();
        assert!(status(Command::new("tar").arg("-cf").arg(at("java.tar")).arg("-C").arg(&root).arg(".")));
        let tar = std::fs::File::open(at("java.tar")).unwrap();
        let unpacked = self.ssh_with(egress, net, "tar -xf - --no-overwrite-dir -C / && sync", tar.into());
        assert!(unpacked.status.success(), "{}", String::from_utf8_lossy(&unpacked.stderr));
    }

    /// The same, for commands that must work.
    pub fn ask(&self, egress: &Netns, net: GuestNet, command: &str) -> String {
        let output = self.ssh(egress, net, command);
        let (out, error) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{command}: {out}{error}");
        out.trim_end_matches('\n').to_owned()
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = Netns::delete(&format!("tapgate-{}", self.instance));
        let _ = Netns::delete(self.host.name());
        let _ = Netns::delete(&self.guest_name());
        let config = self.config();
        let _ = std::fs::remove_dir_all(config.pin_root.join(&config.instance));
        let _ = std::fs::remove_dir(&config.pin_root);
    }
}

/// Kills a VMM when the test ends, also by a panic, and the successor that it got after a restart.
pub struct Reap(pub Vec<i32>);

impl Reap {
    pub fn of(pid: i32) -> Self {
        Self(vec![pid])
    }

    pub fn also(&mut self, pid: i32) {
        self.0.push(pid);
    }
}

impl Drop for Reap {
    fn drop(&mut self) {
        for pid in &self.0 {
            let membership = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            // A number that is another process's by now has no such group.
            let group = membership.lines().find_map(|line| line.strip_prefix("0::/tapgate/vm_"));
            let Some(name) = group else { continue };
            let pid = nix::unistd::Pid::from_raw(*pid);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            let _ = nix::sys::wait::waitpid(pid, None);
            // With the test its supervisor goes, which would have removed the group.
            if let Some(root) = tapgate_vmm::cgroup::Cgroup::root() {
                let _ = std::fs::remove_dir(root.join(format!("tapgate/vm_{name}")));
            }
        }
    }
}

/// The guest service as the daemon's: answers `user-data` with a tag, and holds a question that has that tag.
pub struct Service {
    pub answer: Arc<std::sync::Mutex<String>>,
    sockets: [Socket; 4],
}

impl Service {
    pub fn start(datapath: &Datapath, first: String) -> Self {
        let socket = |kind: Type, protocol: Protocol, number: u16| {
            let socket = Socket::new(Domain::IPV4, kind, Some(protocol)).unwrap();
            socket.set_ip_transparent_v4(true).unwrap();
            socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, number)).into()).unwrap();
            if kind == Type::STREAM {
                socket.listen(16).unwrap();
            }
            socket
        };
        let (tcp, dns_udp, dns_tcp, service) = datapath
            .egress()
            .run(|| {
                let tcp = |number| socket(Type::STREAM, Protocol::TCP, number);
                let udp = socket(Type::DGRAM, Protocol::UDP, port::DNS_UDP);
                (tcp(port::TCP), udp, tcp(port::DNS_TCP), tcp(port::SERVICE))
            })
            .unwrap();
        let sockets = [tcp, dns_udp, dns_tcp, service.try_clone().unwrap()];
        let answer = Arc::new(std::sync::Mutex::new(first));
        let (shown, listener) = (answer.clone(), std::net::TcpListener::from(service));
        std::thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                let shown = shown.clone();
                std::thread::spawn(move || serve(stream, &shown));
            }
        });
        let started = Self { answer, sockets };
        started.hand_over(datapath);
        started
    }

    /// To another datapath of the same instance, as a daemon does that comes after one.
    pub fn hand_over(&self, datapath: &Datapath) {
        let [tcp, dns_udp, dns_tcp, service] = &self.sockets;
        datapath
            .set_listeners(false, tcp.as_fd(), dns_udp.as_fd(), dns_tcp.as_fd(), service.as_fd())
            .unwrap();
    }
}

fn serve(mut stream: std::net::TcpStream, shown: &std::sync::Mutex<String>) {
    let mut request = vec![0u8; 4096];
    let n = stream.read(&mut request).unwrap_or(0);
    let request = String::from_utf8_lossy(&request[..n]).into_owned();
    if !request.starts_with("GET /v1/user-data HTTP/1.1\r\n") {
        // The guest's agent asks for its task too: there is none.
        let _ = stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n");
        return;
    }
    loop {
        let text = shown.lock().unwrap().clone();
        let tag =
            format!("\"{}\"", text.bytes().fold(7u64, |sum, b| sum.wrapping_mul(31).wrapping_add(b.into())));
        if !request.contains(&format!("If-None-Match: {tag}\r\n")) {
            let head = format!("HTTP/1.1 200 OK\r\netag: {tag}\r\ncontent-length: {}\r\n\r\n", text.len());
            let _ = stream.write_all((head + &text).as_bytes());
            return;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

pub fn net(slot: u32) -> GuestNet {
    GuestNet::new(slot, Ipv4Addr::new(10, 214, 0, 0), Some("fd74:6761:7465::".parse().unwrap()))
}

pub fn policy(vm: &VmId) -> VmPolicy {
    VmPolicy {
        vm: vm.clone(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Enforce,
        rules: RuleSet::default(),
        secrets: Arc::new([]),
        secrets_over_http: Default::default(),
    }
}

pub async fn gate(datapath: &Datapath, spec: &VmSpec) -> Gate {
    datapath.attach_tap(&spec.id, spec.net, &policy(&spec.id)).await.unwrap()
}

/// Boots and waits until SSH answers; the console is shown if it does not.
pub async fn boot(datapath: &Datapath, spec: &VmSpec) -> (Box<dyn Running>, Reap) {
    let machine = driver().boot(spec, gate(datapath, spec).await).await.unwrap();
    let reap = Reap::of(machine.handle().process.pid);
    ready(datapath, spec, machine.as_ref()).await;
    (machine, reap)
}

pub async fn ready(datapath: &Datapath, spec: &VmSpec, machine: &dyn Running) {
    ready_within(datapath, spec, machine, PATIENCE).await;
}

/// The same for a guest that takes longer.
pub async fn ready_within(datapath: &Datapath, spec: &VmSpec, machine: &dyn Running, patience: Duration) {
    let started = std::time::Instant::now();
    tokio::select! {
        () = machine.ready(datapath.egress()) => {
            let cpu = cpu_seconds(machine.handle().process.pid);
            eprintln!("ready after {:?}, {cpu:.2} s of CPU time", started.elapsed());
        }
        exit = machine.wait() => panic!("it ended: {exit:?}\n{}", console(&spec.dir)),
        () = tokio::time::sleep(patience) => panic!("SSH never answered\n{}", console(&spec.dir)),
    }
}

/// What a process has used so far, in user and kernel mode.
fn cpu_seconds(pid: i32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<f64> = stat
        .rsplit_once(')')
        .map(|(_, rest)| rest.split_whitespace().filter_map(|field| field.parse().ok()).collect())
        .unwrap_or_default();
    // The state is no number, so utime and stime are fields 10 and 11 here; a tick is 10 ms on Linux.
    fields.get(10).zip(fields.get(11)).map_or(0.0, |(user, system)| (user + system) / 100.0)
}

pub fn console(dir: &Path) -> String {
    let read = |name: &str| std::fs::read_to_string(dir.join(name)).unwrap_or_default();
    format!("{}\n{}", read("console.log"), read("vmm.log"))
}

fn status(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).status().unwrap().success()
}
