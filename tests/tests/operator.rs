//! What an operator can get wrong: one clear sentence that says what to do, and nothing left half done.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::{fs, path::PathBuf};
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
    demo::Stage,
    sh::{self, Done, capture},
    ssh,
};

/// Runs `tapgate serve` with this configuration on the world's host, where it must end by itself.
fn serve(world: &World, config: &str) -> Done {
    let file = world.folder().join("bad.toml");
    fs::write(&file, config).unwrap();
    let mut command = world.on_host("timeout");
    command
        .arg("60")
        .arg(daemon::binary().unwrap())
        .args(["serve", "--config"])
        .arg(&file)
        .env("NO_COLOR", "1");
    capture(&mut command, b"").unwrap()
}

fn settings() -> Settings {
    Settings::of(Driver::Netns).unwrap()
}

/// It failed by itself, and one line says all of these words.
fn refused(done: &Done, words: &[&str]) {
    assert!(done.code != 0 && done.code != 124, "{done:?}");
    assert!(!done.err.contains("panicked"), "{done:?}");
    let line =
        done.err.lines().chain(done.out.lines()).find(|line| words.iter().all(|word| line.contains(word)));
    assert!(line.is_some(), "no line has all of {words:?}: {done:?}");
}

#[test]
fn a_wrong_configuration_is_named_and_starts_nothing() {
    let world = World::new().unwrap();
    let data = world.folder().join("data");
    let with = |line: &str| format!("data_dir = {:?}\ninstance = {:?}\n{line}\n", data, world.names().world);
    refused(&serve(&world, &with("listne = \"127.0.0.1:7070\"")), &["listne", "unknown"]);
    refused(&serve(&world, &with("listen = \"here\"")), &["listen", "here"]);
    refused(&serve(&world, &with("driver = \"xen\"")), &["xen"]);
    refused(&serve(&world, &with("guest_v4 = \"203.0.113.0/24\"")), &["guest_v4", "private"]);
    refused(&serve(&world, "data_dir = \"relative\"\n"), &["data_dir", "absolute"]);
    refused(&serve(&world, "data_dir = [not toml\n"), &["bad.toml"]);
    assert!(!data.exists(), "a daemon that never started made {}", data.display());
    assert!(!sh::ip("netns list").unwrap().contains(&world.names().egress()));
}

#[test]
fn a_port_in_use_is_named_and_the_first_daemon_goes_on() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, settings()).unwrap();
    let other = world.folder().join("other");
    let config =
        format!("data_dir = {other:?}\nlisten = \"127.0.0.1:7070\"\ndriver = \"netns\"\ninstance = \"no\"\n");
    refused(&serve(&world, &config), &["127.0.0.1:7070"]);
    assert!(!sh::ip("netns list").unwrap().contains("tapgate-no\n"), "a namespace was left behind");
    assert_eq!(daemon.client().get("/healthz").unwrap().status, 200);
}

#[test]
fn one_data_folder_has_one_daemon() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, settings()).unwrap();
    let config = fs::read_to_string(world.folder().join("tapgate.toml")).unwrap().replace(":7070", ":7071");
    let data = world.folder().join("data").display().to_string();
    refused(&serve(&world, &config), &[&data]);
    assert_eq!(daemon.client().get("/healthz").unwrap().status, 200);
}

#[test]
fn rubbish_gets_the_error_envelope() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, settings()).unwrap();
    let client = daemon.client().sign_up("ada").unwrap();
    let post = |path: &str, body: &str| {
        let mut curl = world.on_host("curl");
        curl.args(["-sS", "--max-time", "20", "-w", "\n%{http_code}", "-X", "POST", "--data-binary", "@-"]);
        curl.args(["-H", "Content-Type: application/json", "-H"]);
        curl.arg(format!("Authorization: Bearer {}", client.key().unwrap()));
        sh::expect(curl.arg(format!("http://127.0.0.1:7070{path}")), body.as_bytes()).unwrap()
    };
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    for path in ["/v1/vms", "/v1/egress/rules", "/v1/secrets", "/v1/no/such/route", "/v1/vms/%00/stop"] {
        for body in ["", "{", "null", "[]", "{\"name\": 1}", "\u{fffd}", &deep] {
            let text = post(path, body);
            let (json, status) = text.rsplit_once('\n').unwrap();
            let status: u16 = status.parse().unwrap();
            assert!((400..500).contains(&status), "{path} {body:.20}: {text}");
            let json: serde_json::Value = serde_json::from_str(json).unwrap();
            assert!(
                json["error"]["code"].is_string() && json["error"]["message"].is_string(),
                "{path}: {json}"
            );
        }
    }
    assert_eq!(daemon.client().get("/healthz").unwrap().status, 200);
}

#[test]
fn a_daemon_that_is_killed_with_its_guest_leaves_nothing_once_its_world_is_gone() {
    let world = World::new().unwrap();
    let name = world.names().world.clone();
    let mut stage = Stage::new(&world, Daemon::start(&world, settings()).unwrap()).unwrap();
    stage.boot("box").unwrap();
    let left = || {
        let folders = ["/run/netns", "/sys/fs/bpf/tapgate", "/etc/netns", "/tmp"];
        let entries = folders.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten().flatten();
        entries
            .map(|entry| entry.path())
            .filter(|path| path.to_string_lossy().contains(&name))
            .collect::<Vec<_>>()
    };
    assert!(left().len() >= 6, "{:?}", left());
    drop(stage);
    drop(world);
    assert_eq!(left(), Vec::<PathBuf>::new());
}

/// As docs/operations.md has it.
#[test]
fn what_the_manual_says_of_removal_leaves_nothing() {
    let world = World::new().unwrap();
    let mut daemon = Daemon::start(&world, settings()).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    let vm = api.create_vm("vm", &ssh::key(&world).unwrap()).unwrap();
    api.wait_ready(&vm).unwrap();
    api.post(&format!("/v1/vms/{vm}/stop"), &serde_json::json!({})).unwrap();
    api.wait_for(&vm, "stopped").unwrap();
    api.delete(&format!("/v1/vms/{vm}")).unwrap();
    api.wait_for(&vm, "destroyed").unwrap();
    daemon.kill().unwrap();
    let host = |program: &str, words: &[&str]| {
        let done = capture(world.on_host(program).args(words), b"").unwrap();
        assert!(done.ok(), "{program} {words:?}: {done:?}");
        done.out
    };
    let (instance, egress) = (world.names().world.clone(), world.names().egress());
    assert!(host("nft", &["list", "tables"]).contains(&format!("tapgate_{instance}")));
    host("ip", &["netns", "delete", &egress]);
    host("nft", &["delete", "table", "inet", &format!("tapgate_{instance}")]);
    fs::remove_dir_all(format!("/sys/fs/bpf/tapgate/{instance}")).unwrap();
    let left = || {
        let looks: [(&str, &[&str]); 4] =
            [("nft", &["list", "ruleset"]), ("ip", &["link"]), ("ip", &["rule"]), ("ip", &["netns"])];
        let all: String = looks.iter().map(|(program, words)| host(program, words)).collect();
        let ours = [format!("tapgate_{instance}"), format!("tgu-{instance}"), egress.clone()];
        ours.iter().any(|name| all.contains(name)).then_some(all)
    };
    // The kernel takes a namespace's links away after the command has ended.
    let mut found = left();
    for _ in 0..100 {
        if found.is_none() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(100));
        found = left();
    }
    panic!("{found:?}");
}

/// A part that ends by itself (here the engine, which cannot read its records) ends the daemon with a word and a failure, so
/// that systemd starts it again.
#[test]
fn a_part_that_ends_ends_the_daemon() {
    let world = World::new().unwrap();
    let mut daemon = Daemon::start(&world, settings()).unwrap();
    daemon.kill().unwrap();
    let database = world.folder().join("data/tapgate.db");
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); \
                  db.execute('ALTER TABLE vms RENAME COLUMN handle TO gone'); db.commit()";
    sh::run("python3", ["-c", script, database.to_str().unwrap()]).unwrap();
    let config = fs::read_to_string(world.folder().join("tapgate.toml")).unwrap();
    refused(&serve(&world, &config), &["the engine ended", "handle", "started anew"]);
}

/// What the kernel counted reaches the owner and the operator, and nobody else.
#[test]
fn what_is_counted_can_be_read() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, settings()).unwrap();
    let key = world.folder().join("id");
    sh::run("ssh-keygen", ["-q", "-t", "ed25519", "-N", "", "-f", key.to_str().unwrap()]).unwrap();
    let alice = daemon.client().sign_up("alice").unwrap();
    let public = fs::read_to_string(key.with_extension("pub")).unwrap();
    let vm = alice.create_vm("counted", public.trim()).unwrap();
    alice.wait_ready(&vm).unwrap();
    let path = format!("/v1/vms/{vm}/egress/counters");
    let counters = alice.get(&path).unwrap().expect(200).unwrap();
    // SSH has answered, so frames went both ways.
    for field in ["packets_out", "bytes_out", "packets_in", "bytes_in"] {
        assert!(counters[field].as_u64().unwrap() > 0, "{field}: {counters}");
    }
    let bob = daemon.client().sign_up("bob").unwrap();
    bob.get(&path).unwrap().expect(404).unwrap();

    let token = fs::read_to_string(world.folder().join("data/metrics.token")).unwrap();
    let mut curl = world.on_host("curl");
    curl.args([
        "-s",
        "-H",
        &format!("Authorization: Bearer {}", token.trim()),
        "http://127.0.0.1:7070/metrics",
    ]);
    let text = capture(&mut curl, b"").unwrap().out;
    for line in [
        format!("tapgate_vm_packets_total{{vm=\"{vm}\",direction=\"out\"}}"),
        "tapgate_vms{status_detail=\"ready\"} 1".to_owned(),
        "tapgate_http_request_duration_seconds_count{method=\"POST\",route=\"/v1/vms\",status=\"201\"} 1"
            .to_owned(),
        "# EOF".to_owned(),
    ] {
        assert!(text.contains(&line), "{line}\n{text}");
    }
    alice.get("/metrics").unwrap().expect(401).unwrap();
}
