//! SSH through the forwarded port, from out in the internet: several keys, files both ways, a forwarded port.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::json;
use std::{fs, process::Command, thread, time::Duration};
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
    sh,
};

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
    let settings = Settings {
        binary: daemon::binary().unwrap(),
        driver: Driver::Netns,
        images: "/var/cache/tapgate/images".into(),
    };
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
