//! SSH through the forwarded port, from out in the internet: several keys, files both ways, a forwarded port.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::json;
use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
    net::inside,
    sh,
};

/// How many times something is looked for, ten times a second.
const TRIES: usize = 600;

/// A key of its own in the world's folder: the file, and the public half.
fn key(world: &World, name: &str) -> (String, String) {
    let file = world.folder().join(name).to_str().unwrap().to_owned();
    sh::run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-C", name, "-f", &file]).unwrap();
    let public = fs::read_to_string(format!("{file}.pub")).unwrap();
    (file, public)
}

/// `ssh` or `scp` from afar with this key and nothing of the machine's own settings.
fn from_afar(world: &World, program: &str, key: &str) -> Command {
    let mut command = world.from_afar(program);
    command.args(["-F", "/dev/null", "-i", key]);
    for option in [
        "BatchMode=yes",
        "IdentitiesOnly=yes",
        "LogLevel=ERROR",
        "StrictHostKeyChecking=no",
        "UserKnownHostsFile=/dev/null",
    ] {
        command.args(["-o", option]);
    }
    command
}

#[test]
fn several_keys_files_and_forwarded_ports_work_through_the_hosts_port() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let ((ada, ada_pub), (bob, bob_pub), (eve, _)) =
        (key(&world, "ada"), key(&world, "bob"), key(&world, "eve"));
    let body = json!({"name": "box", "public_key": format!("{ada_pub}\n{bob_pub}")});
    let vm = api.post("/v1/vms", &body).unwrap().expect(201).unwrap()["id"].as_str().unwrap().to_owned();
    api.wait_ready(&vm).unwrap();
    let info = api.get(&format!("/v1/vms/{vm}/ssh")).unwrap().expect(200).unwrap();
    let (host, port) = (info["host"].as_str().unwrap(), info["port"].to_string());
    let target = format!("root@{host}");
    for (key, lets_in) in [(&ada, true), (&bob, true), (&eve, false)] {
        let done =
            sh::capture(from_afar(&world, "ssh", key).args(["-p", &port, &target, "echo in"]), b"").unwrap();
        assert_eq!(done.out.trim() == "in", lets_in, "{key}: {done:?}");
    }

    // A namespace's guest has the host's files, so the folder is the world's.
    let folder = world.folder().join("guest");
    fs::create_dir_all(&folder).unwrap();
    let (here, there, back) =
        (world.folder().join("here"), folder.join("there"), world.folder().join("back"));
    let content: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    fs::write(&here, &content).unwrap();
    let remote = format!("{target}:{}", there.display());
    sh::expect(from_afar(&world, "scp", &bob).args(["-P", &port]).arg(&here).arg(&remote), b"").unwrap();
    sh::expect(from_afar(&world, "scp", &bob).args(["-P", &port]).arg(&remote).arg(&back), b"").unwrap();
    assert!(fs::read(&back).unwrap() == content);

    // What only the guest reaches, reached through it.
    let mut tunnel = from_afar(&world, "ssh", &ada)
        .args([
            "-N",
            "-o",
            "ExitOnForwardFailure=yes",
            "-L",
            "127.0.0.1:18080:169.254.169.254:80",
            "-p",
            &port,
            &target,
        ])
        .spawn()
        .unwrap();
    let ask = || {
        sh::capture(world.from_afar("curl").args(["-sS", "-m", "10", "http://127.0.0.1:18080/v1/vm"]), b"")
            .unwrap()
    };
    let mut answer = ask();
    for _ in 0..100 {
        if answer.ok() {
            break;
        }
        thread::sleep(Duration::from_millis(100));
        answer = ask();
    }
    let _ = tunnel.kill();
    let _ = tunnel.wait();
    assert_eq!(answer.out, json!({ "id": vm }).to_string(), "{answer:?}");
}

/// Takes connections in the guest where its SSH server would, says something to each and keeps it, whatever its peer does.
const KEEPER: &str = "import socket\ns = socket.socket()\ns.bind(('0.0.0.0', 2222))\ns.listen(512)\nprint('held', flush=True)\n\
    kept = []\nwhile True:\n    kept.append(s.accept()[0])\n    kept[-1].send(b'x')";
/// So many connections to an address, all at once; how many were taken.
const CALLER: &str = "import socket, sys\nhost, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])\n\
    calls = [socket.create_connection((host, port), 30) for _ in range(count)]\n\
    print(sum(1 for call in calls if call.recv(1) == b'x'), flush=True)\nsys.stdin.read()";

struct Script(Child, String);

impl Script {
    /// Starts it and waits for its first line.
    fn start(mut command: Command, words: &[&str]) -> Self {
        command.args(["python3", "-c"]).args(words).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        Self(child, line.trim().to_owned())
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn no_source_takes_all_places_and_whoever_is_gone_is_looked_for() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let vm = api.create_vm("box", &key(&world, "ada").1).unwrap();
    api.wait_ready(&vm).unwrap();
    let info = api.get(&format!("/v1/vms/{vm}/ssh")).unwrap().expect(200).unwrap();
    let (host, port) = (info["host"].as_str().unwrap(), info["port"].to_string());

    // The guest's SSH server would keep no such number.
    let guest = format!("{}-0", world.names().egress());
    let rules = "table ip t { chain c { type nat hook prerouting priority -100; tcp dport 22 redirect to :2222\n}\n}\n";
    sh::expect(inside(&guest, "nft").args(["-f", "-"]), rules.as_bytes()).unwrap();
    let keeper = Script::start(inside(&guest, "env"), &[KEEPER]);
    assert_eq!(keeper.1, "held");
    let many = Script::start(world.from_afar("env"), &[CALLER, host, &port, "70"]);
    assert_eq!(many.1, "64", "of seventy from one source");
    assert_eq!(daemon.log().matches("ssh.source_refused").count(), 1, "{}", daemon.log());
    let other = Script::start(world.on_host("env"), &[CALLER, host, &port, "1"]);
    assert_eq!(other.1, "1", "another source comes in");

    // A client that says nothing is asked whether it is there.
    let of = format!("sport = :{port}");
    let mut ss = inside(&world.names().host(), "ss");
    let sockets = sh::expect(ss.args(["-H", "-t", "-n", "-o", "state", "established", &of]), b"").unwrap();
    let asked = sockets.lines().filter(|line| line.contains("timer:(keepalive,")).count();
    assert_eq!((asked, sockets.lines().count()), (65, 65), "{sockets}");
    // A peer that ends gives its place back, though the guest keeps its half.
    drop(many);
    let mut got = String::new();
    for _ in 0..TRIES {
        got = Script::start(world.from_afar("env"), &[CALLER, host, &port, "2"]).1.clone();
        if got == "2" {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("of two more {got} came in");
}
