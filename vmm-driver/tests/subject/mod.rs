//! What the suite runs on: a driver, how its guest is spoken to, and how it is seen that nothing gets out.

mod inside;

use crate::common::{self, PATIENCE, World};
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::unix::fs::MetadataExt as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tapgate_datapath::Datapath;
use tapgate_vmm::image::Image;
use tapgate_vmm::{ApiDriver, ApiKind, Running, VmSpec, Vmm};

/// A port that only a breach reaches.
const OUTSIDE: u16 = 4444;

/// The name of a file that this process has open for its children too, as a daemon may that was started carelessly.
pub const INHERITABLE: &str = "inheritable";

const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 77, 1);

/// A driver under test.
pub struct Subject {
    driver: Box<dyn Vmm>,
    image: Image,
    simulated: Option<ApiKind>,
}

impl Subject {
    pub fn qemu() -> Self {
        let accel = match std::env::var("TAPGATE_TEST_ACCEL").as_deref() {
            Ok("kvm") => tapgate_vmm::accel::Accel::Kvm,
            _ => tapgate_vmm::accel::Accel::Tcg,
        };
        Self {
            driver: Box::new(tapgate_vmm::QemuDriver::new(accel)),
            image: common::debian(),
            simulated: None,
        }
    }

    pub fn given(kind: ApiKind, program: PathBuf) -> Self {
        Self { driver: Box::new(ApiDriver::new(kind, program)), image: common::debian(), simulated: None }
    }

    pub fn simulated(world: &World, kind: ApiKind) -> Self {
        let program = PathBuf::from(env!("CARGO_BIN_EXE_tapgate-vmm-sim"));
        Self {
            driver: Box::new(ApiDriver::new(kind, program)),
            image: common::stand_in(&world.dir.path().join("image")),
            simulated: Some(kind),
        }
    }

    pub fn name(&self) -> String {
        format!("{}{}", self.driver.name(), if self.is_simulated() { " (simulated)" } else { "" })
    }

    pub fn is_simulated(&self) -> bool {
        self.simulated.is_some()
    }

    pub fn driver(&self) -> &dyn Vmm {
        self.driver.as_ref()
    }

    pub fn spec(&self, world: &World, slot: u32, env: Vec<(String, String)>) -> VmSpec {
        let spec = world.spec_without_image(&crate::fresh(), slot, env);
        let disk_bytes = if self.is_simulated() { 32 << 20 } else { 4 << 30 };
        VmSpec { image: Some(self.image.clone()), disk_bytes, ..spec }
    }

    pub async fn ready(&self, datapath: &Datapath, spec: &VmSpec, machine: &dyn Running) {
        if !self.is_simulated() {
            return common::ready(datapath, spec, machine).await;
        }
        let started = async {
            while !self.console(spec).contains("Linux version") {
                tokio::time::sleep(std::time::Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(PATIENCE, started).await.expect("it says its first line");
    }

    pub fn restart(&self, world: &World, datapath: &Datapath, spec: &VmSpec) {
        if self.is_simulated() {
            return signal(tapgate_vmm::noted_handle(&spec.dir).unwrap().process.pid, libc::SIGUSR1);
        }
        world.ssh(datapath.egress(), spec.net, "systemctl reboot");
    }

    /// Something on the disk that has to be there later. A simulated guest counts its starts there.
    pub fn leave_mark(&self, world: &World, datapath: &Datapath, spec: &VmSpec) {
        if !self.is_simulated() {
            world.ask(datapath.egress(), spec.net, "cat /etc/machine-id > /root/mark && sync");
        }
    }

    pub fn has_mark(&self, world: &World, datapath: &Datapath, spec: &VmSpec) {
        if self.is_simulated() {
            let console = self.console(spec);
            let mut starts =
                console.lines().filter_map(|line| line.split_once(", start ")?.1.parse::<u64>().ok());
            return assert!(starts.next_back().is_some_and(|n| n >= 2), "{console}");
        }
        let mark = world.ask(datapath.egress(), spec.net, "cat /root/mark");
        assert_eq!(mark.len(), 32, "{mark}");
        let same = mark == world.ask(datapath.egress(), spec.net, "cat /etc/machine-id");
        assert_eq!(same, spec.snapshot.is_none(), "a clone is another machine");
        assert!(!world.ask(datapath.egress(), spec.net, "dmesg").contains("EXT4-fs error"));
    }

    /// Lets the guest try to get out, and have what it may have.
    pub fn probe(&self, world: &World, datapath: &Datapath, spec: &VmSpec, outside: &Outside) {
        assert!(link_exists(datapath, spec), "its tap is there");
        if self.is_simulated() {
            let console = self.console(spec);
            assert!(!console.contains("ESCAPED"), "{console}");
            return;
        }
        let served = "curl -sS --max-time 20 http://169.254.169.254/v1/user-data";
        assert!(world.ask(datapath.egress(), spec.net, served).starts_with("#cloud-config"), "traffic flows");
        let mut script = String::new();
        for address in &outside.addresses {
            script.push_str(&format!("timeout 1 bash -c 'echo x > /dev/tcp/{address}/{OUTSIDE}'; "));
            script.push_str(&format!("echo x > /dev/udp/{address}/{OUTSIDE}; "));
            // The gateway's own address answers: that is a row of the table.
            if *address != GATEWAY {
                script.push_str(&format!("ping -c 1 -W 1 {address} && echo PONG; "));
            }
        }
        let said = world.ask(datapath.egress(), spec.net, &format!("({script}) 2>/dev/null; true"));
        assert!(!said.contains("PONG"), "{said}");
        assert_eq!(outside.reached(), 0, "the guest got out");
    }

    /// What the VMM's process is, seen from outside.
    pub fn confined(&self, spec: &VmSpec, pid: i32) {
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| -> Vec<String> {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_once(':').unwrap().1.split_whitespace().map(str::to_owned).collect()
        };
        let uid = tapgate_vmm::uid_of(spec.net.slot);
        assert_eq!(field("Uid"), vec![uid.to_string(); 4]);
        assert_eq!(field("Gid"), vec![uid.to_string(); 4]);
        assert!(field("Groups").is_empty());
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(set), ["0000000000000000"], "{set}");
        }
        assert_eq!((field("NoNewPrivs"), field("Seccomp")), (vec!["1".to_owned()], vec!["2".to_owned()]));
        let filters: u32 = field("Seccomp_filters")[0].parse().unwrap();
        assert!(filters >= if self.driver.name() == "qemu" { 2 } else { 1 }, "{filters} filters");

        let root = PathBuf::from(format!("/proc/{pid}/root"));
        let mut seen: Vec<String> = std::fs::read_dir(&root)
            .unwrap()
            .map(|e| e.unwrap().file_name().into_string().unwrap())
            .collect();
        seen.retain(|name| !name.starts_with("lib"));
        seen.sort();
        let expected: &[&str] = match self.driver.name() {
            // Under KVM with a `dev` that holds nothing else.
            "qemu" => &["dev", "etc", "run", "usr", "vm"],
            _ => &["dev", "run", "vm"],
        };
        for name in &seen {
            let library = ["etc", "usr"].contains(&name.as_str()) || self.program_is_below(name);
            assert!(expected.contains(&name.as_str()) || library, "{seen:?}");
        }
        for name in ["etc/passwd", "proc", "sys", "root", "home", "usr/bin/sh", "bin/sh", "var"] {
            assert!(!root.join(name).exists(), "{name} is in its view");
        }
        for link in ["mnt", "net", "ipc", "uts"] {
            let of = |pid: &str| std::fs::metadata(format!("/proc/{pid}/ns/{link}")).unwrap().ino();
            assert_ne!(of("self"), of(&pid.to_string()), "{link} namespace");
        }
        let inherited = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
        let inherited: Vec<_> = inherited.filter_map(|fd| std::fs::read_link(fd.path()).ok()).collect();
        assert!(!inherited.iter().any(|file| file.ends_with(INHERITABLE)), "{inherited:?}");
        let worked = inside::attempts(pid, uid, &spec.dir);
        assert!(worked.is_empty(), "from inside its view: {worked:?}");
        let group = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        if let Some(cgroups) = tapgate_vmm::cgroup::Cgroup::root() {
            assert!(group.contains(&format!("/tapgate/{}", spec.id)), "{group}");
            let dir = cgroups.join("tapgate").join(spec.id.as_str());
            let limit =
                |name: &str| std::fs::read_to_string(dir.join(name)).map(|text| text.trim().to_owned());
            for (name, value) in
                [("cpu.max", "150000 100000"), ("memory.max", "1073741824"), ("pids.max", "129")]
            {
                // A controller that this host does not delegate is in the VM's notes.
                if let Ok(found) = limit(name) {
                    assert_eq!(found, value, "{name}");
                }
            }
            if let (Ok(found), Some(disk)) = (limit("io.max"), tapgate_vmm::block::device_of(&spec.dir)) {
                let line = format!("{disk} rbps=536870912 wbps=536870912 riops=20000 wiops=20000");
                assert!(found.lines().any(|found| found == line), "{found}");
            }
        }
    }

    fn program_is_below(&self, name: &str) -> bool {
        self.is_simulated() && env!("CARGO_BIN_EXE_tapgate-vmm-sim").trim_start_matches('/').starts_with(name)
            || ["TAPGATE_TEST_FIRECRACKER", "TAPGATE_TEST_CLOUD_HYPERVISOR"]
                .iter()
                .filter_map(|variable| std::env::var(variable).ok())
                .any(|program| program.trim_start_matches('/').starts_with(name))
    }

    fn console(&self, spec: &VmSpec) -> String {
        std::fs::read_to_string(spec.dir.join("console.log")).unwrap_or_default()
    }
}

pub fn link_exists(datapath: &Datapath, spec: &VmSpec) -> bool {
    let mut ip = std::process::Command::new("ip");
    ip.args(["-o", "link", "show", "up", "dev", &spec.net.link()]);
    let output = datapath.egress().run(move || ip.output()).unwrap().unwrap();
    !output.stdout.is_empty()
}

pub fn signal(pid: i32, number: i32) {
    let signal = nix::sys::signal::Signal::try_from(number).unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal).unwrap();
}

/// Servers in the host's namespace that no guest may reach.
pub struct Outside {
    addresses: Vec<Ipv4Addr>,
    reached: Arc<AtomicU32>,
}

impl Outside {
    /// To be called on a thread of the host's namespace, after the datapath was opened.
    pub fn listen() -> Self {
        let reached = Arc::new(AtomicU32::new(0));
        let tcp = TcpListener::bind((Ipv4Addr::UNSPECIFIED, OUTSIDE)).unwrap();
        let udp = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, OUTSIDE)).unwrap();
        let count = reached.clone();
        std::thread::spawn(move || {
            while tcp.accept().is_ok() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        let count = reached.clone();
        std::thread::spawn(move || {
            while udp.recv(&mut [0; 16]).is_ok() {
                count.fetch_add(1, Ordering::SeqCst);
            }
        });
        // An address of the host, the gateway's, and one far away.
        let host = Ipv4Addr::new(192, 0, 2, 1);
        let mut ip = std::process::Command::new("ip");
        assert!(ip.args(["addr", "add", &format!("{host}/32"), "dev", "lo"]).status().unwrap().success());
        let addresses = vec![host, GATEWAY, Ipv4Addr::new(203, 0, 113, 7)];
        Self { addresses, reached }
    }

    pub fn reached(&self) -> u32 {
        self.reached.load(Ordering::SeqCst)
    }
}
