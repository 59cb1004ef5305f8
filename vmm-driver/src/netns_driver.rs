//! The namespace driver: a process in a network namespace in a VM's stead, for tests, benchmarks and trying things out.
//!
//! It isolates NOTHING BUT THE NETWORK: what runs "in" such a VM is root on the host. It says so at every start. The
//! gate is real, so everything about egress can be tried with it.

use crate::driver::{BoxFuture, Running, Vmm};
use crate::process::{Ended, Process, ProcessRef};
use crate::qemu::{end, file, fits, remember};
use crate::spec::{Exit, Handle, Observed, Place, VmSpec, VmmError};
use nix::mount::{MsFlags, mount};
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;
use tapgate_datapath::Gate;
use tapgate_ebpf_common::net::GATEWAY_V4;
use tapgate_fault::point;
use tapgate_netns::Netns;
use tokio::sync::watch;
use tokio::time::timeout;

const NAME: &str = "netns";
const SSHD: &str = "/usr/sbin/sshd";
const HOST_BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const END: Duration = Duration::from_secs(10);

/// The driver.
#[derive(Clone, Debug, Default)]
pub struct NetnsDriver {}

impl NetnsDriver {
    /// The driver; uses the host's OpenSSH server if it is installed.
    pub fn new() -> Self {
        Self::default()
    }

    fn start(&self, spec: &VmSpec, gate: Gate) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        let guest = namespace(spec)?;
        tracing::warn!(vm = %spec.id, "this VM is a namespace: it isolates NOTHING but the network");
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&spec.dir)
            .map_err(VmmError::io(spec.dir.display().to_string()))?;
        write_files(spec)?;
        let sshd = Path::new(SSHD).exists();
        let mut command = if sshd {
            prepare_sshd(spec)?;
            let mut command = Command::new(SSHD);
            command.args(["-D", "-e", "-f"]).arg(spec.dir.join("sshd_config"));
            command
        } else {
            tracing::warn!(vm = %spec.id, "no SSH server on this host (apt-get install openssh-server): commands only");
            let mut command = Command::new("/usr/bin/sleep");
            command.arg("infinity");
            command
        };
        let log = fs::File::create(spec.dir.join(file::VMM)).map_err(VmmError::io("log"))?;
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        let pid = spawn(&guest, command, &spec.dir)?;
        point("vmm.spawned");
        let process = ProcessRef::of(pid).map_err(|e| VmmError::Start(format!("it ended at once ({e})")))?;
        let notes = vec!["isolates nothing but the network".into(), format!("sshd={sshd}")];
        let handle = Handle { driver: NAME.into(), process, control: None, notes };
        remember(&spec.dir, &handle)?;
        point("vmm.noted");
        self.take_over(spec, &handle, gate)
    }

    fn take_over(&self, spec: &VmSpec, handle: &Handle, gate: Gate) -> Result<Box<dyn Running>, VmmError> {
        fits(spec, &gate)?;
        let process = Process::open(&handle.process).map_err(VmmError::io("pidfd"))?.ok_or(VmmError::Gone)?;
        let process = Arc::new(process);
        let (observe, observed) = watch::channel(Observed::default());
        let (intent, intended) = watch::channel(false);
        let (watched, dir) = (process.clone(), spec.dir.clone());
        tokio::spawn(async move {
            let ended = watched.wait().await.unwrap_or(Ended::Unknown);
            let exit = match ended {
                _ if *intended.borrow() => Exit::Stopped,
                ended => Exit::Crashed(format!("{ended:?}: {}", last_line(&dir.join(file::VMM)))),
            };
            let _ = fs::remove_file(dir.join(file::HANDLE));
            observe.send_modify(|seen| seen.exit = Some(Arc::new(exit)));
        });
        let (guest, spec) = (namespace(spec)?, spec.clone());
        Ok(Box::new(NetnsRunning { spec, guest, handle: handle.clone(), process, gate, observed, intent }))
    }
}

fn namespace(spec: &VmSpec) -> Result<Netns, VmmError> {
    spec.guest_ns.clone().ok_or_else(|| VmmError::Start("the VM has no network namespace".into()))
}

/// A namespace that stands for a VM.
pub struct NetnsRunning {
    spec: VmSpec,
    guest: Netns,
    handle: Handle,
    process: Arc<Process>,
    gate: Gate,
    observed: watch::Receiver<Observed>,
    intent: watch::Sender<bool>,
}

impl NetnsRunning {
    async fn end(&self) -> Result<Exit, VmmError> {
        self.intent.send_replace(true);
        // The whole session: sshd's children too.
        let group = nix::unistd::Pid::from_raw(self.handle.process.pid);
        let _ = self.process.signal(libc::SIGTERM);
        end_all(&self.guest, group);
        self.process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
        timeout(END, self.wait())
            .await
            .map_err(|_| VmmError::Control("it does not end, although it was killed".into()))
    }
}

/// Runs a command "in" the VM: in its namespace, with its environment and its view of the resolver. The process has the
/// host's file system and root's rights.
pub fn exec(spec: &VmSpec, program: &str, args: &[&str]) -> Result<std::process::Output, VmmError> {
    let guest = namespace(spec)?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(environment(spec)).current_dir("/").stdin(Stdio::null());
    view(&mut command, &spec.dir);
    guest
        .run(move || command.output())
        .map_err(|e| VmmError::Start(e.to_string()))?
        .map_err(VmmError::io(program.to_owned()))
}

fn spawn(guest: &Netns, mut command: Command, dir: &Path) -> Result<i32, VmmError> {
    view(&mut command, dir);
    let child = guest
        .run(move || command.spawn())
        .map_err(|e| VmmError::Start(e.to_string()))?
        .map_err(VmmError::io("starting the namespace's process"))?;
    Ok(child.id() as i32)
}

/// The child gets a session and a mount view of its own, in which `/etc/resolv.conf` names the gateway.
#[expect(unsafe_code, reason = "pre_exec has no safe form")]
fn view(command: &mut Command, dir: &Path) {
    let resolver = dir.join("resolv.conf");
    let prepare = move || -> io::Result<()> {
        nix::unistd::setsid()?;
        crate::confine::inherit_nothing()?;
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
        mount(Some(&resolver), "/etc/resolv.conf", None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
        Ok(())
    };
    // SAFETY: the closure only makes system calls; paths are turned into C strings on the stack.
    unsafe { command.pre_exec(prepare) };
}

/// Kills what runs in the namespace of the guest: every process whose network namespace it is.
fn end_all(guest: &Netns, leader: nix::unistd::Pid) {
    use std::os::unix::fs::MetadataExt as _;
    let Ok(wanted) = fs::metadata(Path::new("/run/netns").join(guest.name())) else { return };
    let Ok(processes) = fs::read_dir("/proc") else { return };
    for entry in processes.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let inside = fs::metadata(entry.path().join("ns/net"))
            .is_ok_and(|own| own.ino() == wanted.ino() && own.dev() == wanted.dev());
        if inside && pid != leader.as_raw() && pid != nix::unistd::getpid().as_raw() {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL);
        }
    }
}

fn environment(spec: &VmSpec) -> Vec<(String, String)> {
    let place = |name: &str| spec.dir.join(name).display().to_string();
    let mut env = spec.seed.environment_with(&place("ca-bundle.crt"), &place("ca.crt"));
    for (name, value) in
        [("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", "/root")]
    {
        if !env.iter().any(|(known, _)| known == name) {
            env.push((name.into(), value.into()));
        }
    }
    env
}

fn write_files(spec: &VmSpec) -> Result<(), VmmError> {
    let put = |name: &str, content: &str| {
        let path = spec.dir.join(name);
        fs::write(&path, content).map_err(VmmError::io(path.display().to_string()))
    };
    spec.seed.user_data()?;
    put("resolv.conf", &format!("nameserver {}\n", Ipv4Addr::from(GATEWAY_V4)))?;
    put("ca.crt", &spec.seed.ca_pem)?;
    let mut bundle = fs::read_to_string(HOST_BUNDLE).unwrap_or_default();
    bundle.push_str(&spec.seed.ca_pem);
    put("ca-bundle.crt", &bundle)
}

fn prepare_sshd(spec: &VmSpec) -> Result<(), VmmError> {
    let key = spec.dir.join("ssh_host_ed25519_key");
    if !key.exists() {
        let status = Command::new("/usr/bin/ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "", "-f"])
            .arg(&key)
            .stdin(Stdio::null())
            .status()
            .map_err(|source| VmmError::Missing {
                program: "ssh-keygen".into(),
                package: "openssh-client",
                source,
            })?;
        if !status.success() {
            return Err(VmmError::Start("ssh-keygen made no host key".into()));
        }
    }
    let authorized = spec.dir.join("authorized_keys");
    let text: String = spec.seed.ssh_keys.iter().map(|key| format!("{key}\n")).collect();
    let io = |path: &Path| VmmError::io(path.display().to_string());
    fs::write(&authorized, text).map_err(io(&authorized))?;
    fs::set_permissions(&authorized, fs::Permissions::from_mode(0o600)).map_err(io(&authorized))?;
    fs::create_dir_all("/run/sshd").map_err(VmmError::io("/run/sshd"))?;
    let config = spec.dir.join("sshd_config");
    fs::write(&config, sshd_config(spec, &key, &authorized)).map_err(io(&config))
}

fn sshd_config(spec: &VmSpec, key: &Path, authorized: &Path) -> String {
    let mut text = String::from(
        "Port 22\nUsePAM no\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\n\
         StrictModes no\nUseDNS no\nPidFile none\nSubsystem sftp internal-sftp\n",
    );
    let _ = writeln!(text, "HostKey {}\nAuthorizedKeysFile {}", key.display(), authorized.display());
    let mut variables = String::new();
    for (name, value) in environment(spec).iter().filter(|(_, value)| !value.contains(['\n', '\r'])) {
        let _ = write!(variables, " \"{name}={}\"", value.replace('\\', r"\\").replace('"', "\\\""));
    }
    let _ = writeln!(text, "SetEnv{variables}");
    text
}

fn last_line(log: &PathBuf) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    text.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default().chars().take(300).collect()
}

impl Vmm for NetnsDriver {
    fn name(&self) -> &'static str {
        NAME
    }

    fn boot<'a>(&'a self, spec: &'a VmSpec, gate: Gate) -> BoxFuture<'a, Result<Box<dyn Running>, VmmError>> {
        Box::pin(async move { self.start(spec, gate) })
    }

    fn adopt<'a>(
        &'a self,
        spec: &'a VmSpec,
        handle: &'a Handle,
        gate: Gate,
    ) -> BoxFuture<'a, Result<Box<dyn Running>, VmmError>> {
        Box::pin(async move { self.take_over(spec, handle, gate) })
    }

    fn discard<'a>(&'a self, place: &'a Place, handle: &'a Handle) -> BoxFuture<'a, Result<(), VmmError>> {
        Box::pin(async move {
            end(&handle.process).await?;
            if let Some(guest) = &place.guest_ns {
                end_all(guest, nix::unistd::Pid::from_raw(handle.process.pid));
            }
            let _ = fs::remove_file(place.dir.join(file::HANDLE));
            Ok(())
        })
    }

    fn sweep<'a>(&'a self, place: &'a Place) -> BoxFuture<'a, Result<(), VmmError>> {
        if let Some(guest) = &place.guest_ns {
            end_all(guest, nix::unistd::Pid::from_raw(0));
        }
        Box::pin(async { Ok(()) })
    }
}

impl Running for NetnsRunning {
    fn handle(&self) -> &Handle {
        &self.handle
    }

    fn gate(&self) -> &Gate {
        &self.gate
    }

    fn observed(&self) -> watch::Receiver<Observed> {
        self.observed.clone()
    }

    fn ready<'a>(&'a self, egress: &'a Netns) -> BoxFuture<'a, ()> {
        Box::pin(async move {
            if self.handle.notes.iter().any(|note| note == "sshd=true") {
                crate::ready::ssh(egress, &self.spec.net).await;
            }
        })
    }

    fn shutdown(&self, _grace: Duration) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.end())
    }

    fn kill(&self) -> BoxFuture<'_, Result<Exit, VmmError>> {
        Box::pin(self.end())
    }
}
