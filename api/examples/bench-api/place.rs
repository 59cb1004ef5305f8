//! A daemon in a network namespace of its own: started, filled, asked, and taken away again with all that it made.

use crate::{bar, load};
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

/// Where the daemon listens, in its namespace.
const LISTEN: &str = "127.0.0.1:7070";
/// Accounts that share the load: one key may ask 500 times a second.
const ACCOUNTS: usize = 6;
const BAR_DAEMON_KIB: u64 = 64 * 1024;
const BAR_VM_KIB: u64 = 200;
/// VMs that are not counted.
const FIRST: usize = 10;
/// Threads that are no longer needed end after ten seconds.
const IDLE: Duration = Duration::from_secs(13);

struct Place {
    name: String,
    folder: tempfile::TempDir,
    daemon: Option<Child>,
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        let ours = |name: &String| *name == self.name || name.starts_with(&format!("tapgate-{}", self.name));
        let names = std::fs::read_dir("/run/netns").into_iter().flatten().flatten();
        let names: Vec<String> =
            names.filter_map(|entry| entry.file_name().into_string().ok()).filter(ours).collect();
        for name in &names {
            for pid in run("ip", &["netns", "pids", name]).split_whitespace() {
                run("kill", &["-KILL", pid]);
            }
        }
        std::thread::sleep(Duration::from_millis(300));
        for name in &names {
            run("ip", &["netns", "delete", name]);
        }
        let _ = std::fs::remove_dir_all(Path::new("/sys/fs/bpf/tapgate").join(&self.name));
    }
}

impl Place {
    fn new() -> Self {
        let name = format!("b{:07x}", rand::random::<u32>() >> 4);
        run("ip", &["netns", "add", &name]);
        run("ip", &["-n", &name, "link", "set", "lo", "up"]);
        Self { name, folder: tempfile::tempdir().unwrap(), daemon: None }
    }

    fn inside(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    fn data(&self) -> PathBuf {
        self.folder.path().join("data")
    }

    fn start(&mut self) {
        let config = self.folder.path().join("tapgate.toml");
        let text = format!(
            "data_dir = {:?}\nlisten = {LISTEN:?}\ndriver = \"netns\"\ninstance = {:?}\nresolvers = [\"127.0.0.1:53\"]\n\
             log = \"warn\"\n",
            self.data(),
            self.name
        );
        std::fs::write(&config, text).unwrap();
        let log = std::fs::File::create(self.folder.path().join("log")).unwrap();
        let mut command = self.inside(binary());
        command.args(["serve", "--config"]).arg(&config).stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log);
        self.daemon = Some(command.spawn().unwrap());
        for _ in 0..600 {
            if self.ask("GET", "/healthz", "", None)["status"] == "ok" {
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
        panic!("{}", std::fs::read_to_string(self.folder.path().join("log")).unwrap());
    }

    /// One request by curl: slow, but from where the daemon is.
    fn ask(&self, method: &str, path: &str, key: &str, body: Option<Value>) -> Value {
        let mut curl = self.inside("curl");
        curl.args(["-s", "--max-time", "60", "-X", method, "-H", &format!("Authorization: Bearer {key}")]);
        if let Some(body) = body {
            curl.args(["-H", "Content-Type: application/json", "-d", &body.to_string()]);
        }
        let output = curl.arg(format!("http://{LISTEN}{path}")).output().unwrap();
        serde_json::from_slice(&output.stdout).unwrap_or_default()
    }

    /// An account with something of everything; its key.
    fn account(&self, number: usize) -> String {
        use std::io::Write as _;
        let mut make = self.inside(binary());
        make.args(["admin", "user", "create", &format!("a{number}@example.com"), "--data-dir"]);
        make.arg(self.data()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = make.spawn().unwrap();
        child.stdin.take().unwrap().write_all(b"correct horse battery\n").unwrap();
        let key = String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap().trim().to_owned();
        for n in 0..20 {
            self.ask("POST", "/v1/egress/rules", &key, Some(json!({ "host": format!("h{n}.example.com") })));
            self.ask("PUT", &format!("/v1/env/K{n}"), &key, Some(json!({ "value": "v" })));
        }
        key
    }

    /// Resident memory of the daemon in KiB. `ip netns exec` becomes the program that it runs.
    fn resident(&self) -> u64 {
        let pid = self.daemon.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// Makes so many VMs and comes back when they all are ready and the daemon has been idle for a while.
    fn fill(&self, key: &str, public: &Value, from: usize, count: usize) {
        for n in from..from + count {
            self.ask("POST", "/v1/vms", key, Some(json!({ "name": format!("v{n}"), "public_key": public })));
        }
        let ready = || {
            let listed = self.ask("GET", "/v1/vms?status_detail=ready&limit=100", key, None);
            listed["data"].as_array().map_or(0, Vec::len)
        };
        for _ in 0..300 {
            if ready() == from + count {
                std::thread::sleep(IDLE);
                return;
            }
            std::thread::sleep(Duration::from_secs(1));
        }
        panic!("of {} VMs {} are ready", from + count, ready());
    }

    fn load(&self, rate: u32, kind: &str, time: Duration, keys: &[String]) -> load::Figures {
        let me = std::env::current_exe().unwrap();
        let mut command = self.inside(me);
        command.args(["load", LISTEN, &rate.to_string(), kind, &time.as_secs().to_string()]);
        let output = command.args(keys).stderr(Stdio::inherit()).output().unwrap();
        assert!(output.status.success());
        serde_json::from_slice(&output.stdout).unwrap()
    }
}

fn binary() -> PathBuf {
    std::env::var_os("TAPGATE_BIN").map_or_else(|| "target/release/tapgate".into(), PathBuf::from)
}

/// Everything that is measured on a daemon.
pub fn measure(time: Duration, vms: usize) {
    let mut place = Place::new();
    place.start();
    let empty = place.resident();
    let keys: Vec<String> = (0..ACCOUNTS).map(|number| place.account(number)).collect();
    println!("Requests at a fixed rate over 32 connections, each timed from the moment when it was due.\n");
    println!("| load | a second | p50 | p99 | worst | failed |\n| --- | --- | --- | --- | --- | --- |");
    let show = |name: &str, figures: &load::Figures| {
        let ms = |us: u64| format!("{:.2} ms", us as f64 / 1000.0);
        let load::Figures { rate, p50, p99, worst, failed } = figures;
        println!("| {name} | {rate} | {} | {} | {} | {failed} |", ms(*p50), ms(*p99), ms(*worst));
    };
    let reads = place.load(1000, "read", time, &keys);
    show("GET: lists and single resources", &reads);
    show("PUT: environment variables, each synced to disk", &place.load(200, "write", time, &keys));
    let mixed = place.load(1000, "mixed", time, &keys);
    show("nine GETs to one PUT", &mixed);
    let loaded = place.resident();

    let key = &keys[0];
    let public = json!("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAILM+rvN+ot98qgEN796jTiQfZfG1KaT0PtFDJ/XFSqti a");
    // The first ones bring what all share: threads, caches, buffers of the datapath.
    let before = place.resident();
    place.fill(key, &public, 0, FIRST);
    let first = place.resident();
    place.fill(key, &public, FIRST, vms);
    let each = place.resident().saturating_sub(first) / vms as u64;
    println!("\n| what | measured | bar | met |\n| --- | --- | --- | --- |");
    let p99 = format!("{:.2} ms", reads.p99 as f64 / 1000.0);
    bar("p99 of a GET at 1,000 a second", &p99, "5 ms", reads.p99 < 5000 && reads.failed == 0);
    let mib = |kib: u64| format!("{:.1} MiB", kib as f64 / 1024.0);
    bar("daemon, resident, no VM", &mib(empty), "64 MiB", empty < BAR_DAEMON_KIB);
    bar("the same after the loads above", &mib(loaded), "64 MiB", loaded < BAR_DAEMON_KIB);
    let shared = first.saturating_sub(before);
    let of = format!(
        "each idle VM (namespace driver, {vms} more after the first {FIRST}, which took {shared} KiB)"
    );
    bar(&of, &format!("{each} KiB"), "200 KiB", each < BAR_VM_KIB);
    println!();
}
