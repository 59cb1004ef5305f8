//! Random lives of VMs under random deaths: calls of the API, and kill -9 of the daemon and of VMMs at any moment, while every
//! guest tries to get out. What must hold is looked at in between and at the end.
//!
//! The same seed makes the same calls; what the machine makes of their timing is its own.

use crate::{World, api::Client, daemon::Daemon, net, reaper, sh, sites, ssh};
use anyhow::{Context as _, Result, anyhow, bail, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs,
    process::{Command, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

/// VMs at a time.
const VMS: usize = 5;
/// How long a death may go unnoticed.
const NOTICE: Duration = Duration::from_secs(20);
/// What the names of taps begin with that are made ahead of VMs; one is there at most, and it is down.
const SPARE: &str = "tgs";
/// For a VM to come to rest.
const REST: Duration = Duration::from_secs(240);

/// A reproducible source of choices.
pub struct Choices(u64);

impl Choices {
    /// With this seed.
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    /// A number below `limit`.
    pub fn below(&mut self, limit: usize) -> usize {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        usize::try_from(self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33).unwrap_or(0) % limit.max(1)
    }
}

/// What was done, by kind.
pub type Tally = BTreeMap<&'static str, u32>;

/// Runs in every guest's namespace, over and over, until dropped: tries to reach a host that no rule allows.
pub struct Probe {
    stop: Arc<AtomicBool>,
    tries: Arc<AtomicU64>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Probe {
    /// Starts it; for guests that are namespaces.
    pub fn start(world: &World) -> Self {
        let (stop, tries) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, counted) = (stop.clone(), tries.clone());
        let prefix = format!("{}-", world.names().egress());
        let evil = sites::EVIL.v4;
        let script = format!(
            "echo x > /dev/udp/{evil}/7; echo x > /dev/udp/{evil}/443; \
             timeout 0.4 bash -c 'echo x > /dev/tcp/{evil}/80' & timeout 0.4 bash -c 'echo x > /dev/tcp/{evil}/443' & \
             ping -c1 -W1 {evil}; wait"
        );
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
                let guests = entries.filter_map(|entry| entry.file_name().into_string().ok());
                let mut running: Vec<_> = guests
                    .filter(|name| name.starts_with(&prefix))
                    .filter_map(|guest| {
                        let mut bash = net::inside(&guest, "bash");
                        bash.args(["-c", &script])
                            .stdin(Stdio::null())
                            .stdout(Stdio::null())
                            .stderr(Stdio::null());
                        bash.spawn().ok()
                    })
                    .collect();
                counted.fetch_add(running.len() as u64, Ordering::Relaxed);
                for child in &mut running {
                    let _ = child.wait();
                }
                thread::sleep(Duration::from_millis(100));
            }
        });
        Self { stop, tries, thread: Some(thread) }
    }

    /// How often a guest tried.
    pub fn tries(&self) -> u64 {
        self.tries.load(Ordering::Relaxed)
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The campaign.
pub struct Chaos<'a, 'world> {
    world: &'world World,
    daemon: &'a mut Daemon<'world>,
    api: Client<'world>,
    choices: Choices,
    names: u32,
    rules: Vec<String>,
    /// What was done.
    pub tally: Tally,
}

impl<'a, 'world> Chaos<'a, 'world> {
    /// On this daemon, for this account.
    pub fn new(world: &'world World, daemon: &'a mut Daemon<'world>, api: Client<'world>, seed: u64) -> Self {
        Self {
            world,
            daemon,
            api,
            choices: Choices::new(seed),
            names: 0,
            rules: Vec::new(),
            tally: Tally::new(),
        }
    }

    /// One round: a call, and perhaps a death.
    pub fn round(&mut self) -> Result<()> {
        let vms = self.living()?;
        let any = |choices: &mut Choices| (!vms.is_empty()).then(|| vms[choices.below(vms.len())].clone());
        let vm = any(&mut self.choices);
        match (self.choices.below(14), vm) {
            (0 | 1, _) if vms.len() < VMS => self.create()?,
            (2 | 3, Some(vm)) => self.call("stop", "POST", &format!("/v1/vms/{vm}/stop"), None)?,
            (4 | 5, Some(vm)) => self.start(&vm)?,
            (6, Some(vm)) => self.call("destroy", "DELETE", &format!("/v1/vms/{vm}"), None)?,
            (7, Some(vm)) => {
                self.call("snapshot", "POST", &format!("/v1/vms/{vm}/snapshots"), Some(&json!({})))?
            }
            (8, _) if vms.len() < VMS => self.agent()?,
            (9, _) => self.rules()?,
            (10, _) => self.end_agent()?,
            (11..=13, _) => self.kill_vmm(&vms)?,
            _ => self.create_if_none(vms.is_empty())?,
        }
        match self.choices.below(8) {
            0 | 1 => self.kill_daemon(),
            2 => {
                thread::sleep(Duration::from_millis(self.choices.below(400) as u64));
                self.kill_daemon()
            }
            _ => {
                thread::sleep(Duration::from_millis(self.choices.below(300) as u64));
                Ok(())
            }
        }
    }

    fn count(&mut self, what: &'static str) {
        *self.tally.entry(what).or_default() += 1;
    }

    fn living(&self) -> Result<Vec<String>> {
        Ok(self
            .records()?
            .into_iter()
            .filter(|(_, detail)| detail != "destroyed")
            .map(|(id, _)| id)
            .collect())
    }

    /// Every VM of the account and its `status_detail`.
    fn records(&self) -> Result<Vec<(String, String)>> {
        let (mut all, mut cursor) = (Vec::new(), String::new());
        loop {
            let page = self.api.get(&format!("/v1/vms?limit=100{cursor}"))?.expect(200)?;
            let text = |vm: &Value, name: &str| vm[name].as_str().unwrap_or_default().to_owned();
            let found = page["data"].as_array().context("no list of VMs")?;
            all.extend(found.iter().map(|vm| (text(vm, "id"), text(vm, "status_detail"))));
            match page["cursor"].as_str() {
                Some(next) if page["has_more"] == true => cursor = format!("&cursor={next}"),
                _ => return Ok(all),
            }
        }
    }

    /// A call may be refused for what the VM is doing; it never is the server's fault.
    fn call(&mut self, what: &'static str, method: &str, path: &str, body: Option<&Value>) -> Result<()> {
        let reply = self.api.call(method, path, body)?;
        ensure!(
            reply.status < 500 || reply.status == 503,
            "{method} {path}: {} {}",
            reply.status,
            reply.body
        );
        self.count(if reply.status < 300 { what } else { "refused" });
        Ok(())
    }

    fn create_if_none(&mut self, none: bool) -> Result<()> {
        if none { self.create() } else { Ok(()) }
    }

    fn create(&mut self) -> Result<()> {
        self.names += 1;
        let body = json!({"name": format!("vm-{}", self.names), "public_key": ssh::key(self.world)?, "memory_mib": 256});
        self.call("create", "POST", "/v1/vms", Some(&body))
    }

    /// Not waited for: the answer would come when it runs.
    fn start(&mut self, vm: &str) -> Result<()> {
        let key = self.api.key().context("no key")?.to_owned();
        let mut curl = self.world.on_host("curl");
        curl.args([
            "-sS",
            "-m",
            "1",
            "-o",
            "/dev/null",
            "-X",
            "POST",
            "-H",
            &format!("Authorization: Bearer {key}"),
        ]);
        curl.arg(self.api.url(&format!("/v1/vms/{vm}/start")));
        sh::capture(&mut curl, b"")?;
        self.count("start");
        Ok(())
    }

    fn agent(&mut self) -> Result<()> {
        self.names += 1;
        let body =
            json!({"name": format!("agent-{}", self.names), "repo": "o/r", "prompt": "p", "memory_mib": 256});
        self.call("agent", "POST", "/v1/agents", Some(&body))
    }

    fn end_agent(&mut self) -> Result<()> {
        let agents = self.api.get("/v1/agents?limit=100")?.expect(200)?;
        match agents["data"].as_array().and_then(|all| all.first()).and_then(|agent| agent["id"].as_str()) {
            Some(agent) => self.call("end agent", "DELETE", &format!("/v1/agents/{agent}"), None),
            None => Ok(()),
        }
    }

    /// Rules come and go; none of them leads to the host that must stay out of reach.
    fn rules(&mut self) -> Result<()> {
        self.count("rule");
        if !self.rules.is_empty() && self.choices.below(2) == 0 {
            return self.api.remove_rule(&self.rules.remove(0));
        }
        let rule = match self.choices.below(3) {
            0 => self.api.rule("host", sites::API.name)?,
            1 => self.api.rule("host", "*.example.com")?,
            _ => self.api.rule("cidr", "203.0.113.0/24")?,
        };
        self.rules.push(rule);
        Ok(())
    }

    fn kill_daemon(&mut self) -> Result<()> {
        self.daemon.kill()?;
        thread::sleep(Duration::from_millis(self.choices.below(200) as u64));
        self.daemon.start_again()?;
        self.count("daemon killed");
        Ok(())
    }

    fn kill_vmm(&mut self, vms: &[String]) -> Result<()> {
        let pids: Vec<_> = vms.iter().filter_map(|vm| self.daemon.vmm(vm)).collect();
        if !pids.is_empty() {
            let pid = pids[self.choices.below(pids.len())];
            sh::run("kill", ["-KILL", &pid.to_string()])?;
            self.count("vmm killed");
        }
        Ok(())
    }

    /// A VM that the account has, in whatever state; its id.
    pub fn vm(&mut self) -> Result<String> {
        self.create()?;
        self.records()?
            .into_iter()
            .find(|(_, detail)| detail != "destroyed")
            .map(|(id, _)| id)
            .context("no VM")
    }

    /// Makes the call of a daemon that dies where the file says, and starts the next one.
    pub fn die_at(
        &mut self,
        fault: &std::path::Path,
        point: &str,
        call: impl FnOnce(&Client<'world>) -> Result<()>,
    ) -> Result<()> {
        fs::write(fault, point)?;
        // The answer may be lost with the daemon.
        let _ = call(&self.api);
        let died = self.daemon.wait_for_death();
        fs::remove_file(fault)?;
        died.with_context(|| format!("it never came to {point}; a release build has no such points"))?;
        self.daemon.start_again()?;
        self.count("died at a point");
        Ok(())
    }

    /// The account's client.
    pub fn api(&self) -> &Client<'world> {
        &self.api
    }

    /// The daemon.
    pub fn daemon(&self) -> &Daemon<'world> {
        self.daemon
    }

    /// As if the host had been restarted: daemon, VMMs, namespaces and programs are gone, the disk is there.
    pub fn reboot(&mut self) -> Result<()> {
        self.daemon.kill()?;
        for vm in fs::read_dir(self.daemon.data_dir().join("vms")).into_iter().flatten().flatten() {
            if let Some(pid) = self.daemon.vmm(&vm.file_name().to_string_lossy()) {
                let _ = sh::run("kill", ["-KILL", &pid.to_string()]);
            }
        }
        let egress = self.world.names().egress();
        let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        for name in entries.filter_map(|entry| entry.file_name().into_string().ok()) {
            if name == egress || name.starts_with(&format!("{egress}-")) {
                sh::run("ip", ["netns", "delete", &name])?;
            }
        }
        fs::remove_dir_all(self.pins())?;
        self.daemon.start_again()?;
        self.count("host restarted");
        Ok(())
    }

    fn pins(&self) -> std::path::PathBuf {
        std::path::Path::new("/sys/fs/bpf/tapgate").join(&self.world.names().world)
    }

    /// Waits until every VM rests in a state that is true. A VMM's death is noticed a moment after it, so what is not true yet
    /// is asked again; what stays untrue fails.
    pub fn settle(&self) -> Result<Vec<(String, String)>> {
        let end = Instant::now() + REST;
        let mut untrue_since = None;
        let rests = |detail: &str| matches!(detail, "ready" | "stopped" | "failed" | "destroyed");
        loop {
            let records = self.records()?;
            let untrue = if records.iter().all(|(_, detail)| rests(detail)) {
                match records.iter().try_for_each(|(vm, detail)| self.is_true(vm, detail)) {
                    Ok(()) => return Ok(records),
                    Err(untrue) if untrue_since.get_or_insert_with(Instant::now).elapsed() > NOTICE => {
                        return Err(untrue);
                    }
                    Err(untrue) => untrue,
                }
            } else {
                untrue_since = None;
                anyhow!("these do not come to rest: {records:?}")
            };
            if Instant::now() > end {
                return Err(untrue);
            }
            thread::sleep(Duration::from_millis(300));
        }
    }

    /// Has each real guest that is ready try to get out without pause, from now on and after each of its starts. Answers how many
    /// attempts they made since it was asked last.
    pub fn incite(&self) -> Result<u64> {
        let evil = sites::EVIL.v4;
        let unit = format!(
            "[Service]\nExecStart=/bin/bash -c 'while :; do echo x > /dev/udp/{evil}/7; echo x > /dev/udp/{evil}/443; \
             timeout 1 bash -c \"echo x > /dev/tcp/{evil}/80\"; timeout 1 bash -c \"echo x > /dev/tcp/{evil}/443\"; \
             ping -c1 -W1 {evil}; echo >> /root/tries; sleep 0.2; done'\nRestart=always\n[Install]\nWantedBy=multi-user.target\n"
        );
        let script = format!(
            "cat /root/tries 2>/dev/null | wc -l; : > /root/tries; systemctl -q is-active tries && exit; \
             cat > /etc/systemd/system/tries.service <<'EOF'\n{unit}EOF\n\
             systemctl enable -q tries && sync && systemctl start tries"
        );
        let mut tries = 0;
        for (vm, detail) in self.records()? {
            if detail == "ready" {
                let guest = ssh::Guest::of(self.world, &self.api, &vm)?;
                let done = guest.sh(&script)?;
                guest.hang_up();
                // An agent's VM has no key of ours.
                if !done.err.contains("Permission denied") {
                    ensure!(done.ok(), "{vm}: {done:?}");
                    tries += done.out.trim().parse::<u64>()?;
                }
            }
        }
        Ok(tries)
    }

    /// Whether the VM is what its record says.
    fn is_true(&self, vm: &str, detail: &str) -> Result<()> {
        let alive = self.daemon.vmm(vm).is_some_and(is_alive);
        ensure!(
            alive == (detail == "ready"),
            "{vm} is {detail}, its VMM {}",
            if alive { "lives" } else { "is gone" }
        );
        if detail == "ready" {
            let port = self.api.get(&format!("/v1/vms/{vm}/ssh"))?.expect(200)?["port"].to_string();
            let banner =
                format!("timeout 20 bash -c 'exec 3<>/dev/tcp/{}/{port}; head -c 4 <&3'", sites::HOST_V4);
            let said = sh::expect(self.world.from_afar("bash").args(["-c", &banner]), b"")?;
            ensure!(said == "SSH-", "{vm} is ready, but its SSH says {said:?}");
        }
        if detail == "destroyed" {
            ensure!(!self.daemon.vm_folder(vm).exists(), "{vm} is destroyed, but its folder is there");
        }
        Ok(())
    }

    /// Ends every VM; then nothing of any may be left.
    pub fn clear(&mut self) -> Result<()> {
        let agents = self.api.get("/v1/agents?limit=100")?.expect(200)?;
        for agent in agents["data"].as_array().context("no list of agents")? {
            let id = agent["id"].as_str().context("no id")?;
            self.api.delete(&format!("/v1/agents/{id}"))?.expect(204)?;
        }
        for vm in self.living()? {
            let _ = self.api.post(&format!("/v1/vms/{vm}/stop"), &json!({}))?;
            let end = Instant::now() + REST;
            loop {
                let reply = self.api.delete(&format!("/v1/vms/{vm}"))?;
                match reply.status {
                    204 => break,
                    409 if Instant::now() < end => thread::sleep(Duration::from_millis(200)),
                    status => bail!("{vm} cannot be destroyed: {status} {}", reply.body),
                }
            }
        }
        self.settle()?;
        self.nothing_left()
    }

    fn nothing_left(&self) -> Result<()> {
        let names = |folder: &std::path::Path| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        let egress = self.world.names().egress();
        let guests: Vec<_> = names("/run/netns".as_ref())
            .into_iter()
            .filter(|name| name.starts_with(&format!("{egress}-")))
            .collect();
        ensure!(guests.is_empty(), "namespaces are left: {guests:?}");
        let folders = names(&self.daemon.data_dir().join("vms"));
        ensure!(folders.is_empty(), "VMs' folders are left: {folders:?}");
        let links = sh::ip(&format!("-n {egress} -br link"))?;
        let (spares, taps): (Vec<&str>, Vec<&str>) =
            links.lines().filter(|line| line.starts_with("tg")).partition(|line| line.starts_with(SPARE));
        ensure!(taps.is_empty(), "taps are left: {links}");
        let closed = spares.len() <= 1 && spares.iter().all(|line| line.contains(" DOWN "));
        ensure!(closed, "there is more than one spare tap, or it is up: {links}");
        let (spares, pins): (Vec<_>, Vec<_>) =
            names(&self.pins().join("links")).into_iter().partition(|name| name.starts_with(SPARE));
        ensure!(pins.is_empty(), "links are left: {pins:?}");
        ensure!(spares.len() <= 2, "pins of former spare taps are left: {spares:?}");
        let ids: Vec<String> = self.records()?.into_iter().map(|(id, _)| id).collect();
        let groups: Vec<_> = reaper::CGROUPS.iter().flat_map(|groups| names(groups.as_ref())).collect();
        let ours: Vec<_> = ids.iter().filter(|id| groups.iter().any(|g| g.contains(id.as_str()))).collect();
        ensure!(ours.is_empty(), "control groups are left: {ours:?}");
        let processes = reaper::processes_with(&ids);
        ensure!(processes.is_empty(), "VMMs are left: {processes:?}");
        let staged = names(&self.daemon.data_dir().join("staging"));
        ensure!(staged.iter().all(|name| !name.ends_with(".part")), "half snapshots are left: {staged:?}");
        let folder = self.daemon.data_dir().join("vms");
        let processes = Command::new("pgrep").arg("-f").arg(&folder).output()?;
        ensure!(
            processes.stdout.is_empty(),
            "processes are left: {}",
            String::from_utf8_lossy(&processes.stdout)
        );
        Ok(())
    }
}

fn is_alive(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}
