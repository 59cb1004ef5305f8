//! The daemon's front: it never listens where keys could be read on the way, takes a new certificate while it runs, and keeps its
//! audit log to the size that it was told, with clients reading all the while.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;
use tapgate_e2e::daemon::{self, Daemon, Driver, Settings};
use tapgate_e2e::sh::{self, Done, capture};
use tapgate_e2e::{World, sites};
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, Verdict, VmId, VmPolicy};
use tapgate_store::{SealKey, Store, now_us};

/// Tries, ten a second.
const TRIES: usize = 300;

/// A daemon that was started by hand; it ends with its test.
struct Served(Child);

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn config(world: &World, lines: &str) -> PathBuf {
    let file = world.folder().join("front.toml");
    let (data, name) = (world.folder().join("data"), &world.names().world);
    let text = format!(
        "data_dir = {data:?}\ninstance = {name:?}\ndriver = \"netns\"\nresolvers = [\"{}:53\"]\n{lines}\n",
        sites::DNS.v4
    );
    fs::write(&file, text).unwrap();
    file
}

fn start(world: &World, lines: &str) -> Served {
    let mut command = world.on_host(daemon::binary().unwrap());
    command.args(["serve", "--config"]).arg(config(world, lines));
    let log = fs::File::create(world.folder().join("front.log")).unwrap();
    command.env("NO_COLOR", "1").stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
    Served(command.spawn().unwrap())
}

/// One look at the daemon from another machine.
fn look(world: &World, url: &str, ca: Option<&Path>) -> Done {
    let mut curl = world.from_afar("curl");
    curl.args([
        "-sS",
        "--max-time",
        "5",
        "--connect-to",
        &format!("api.example.com:7070:{}:7070", sites::HOST_V4),
    ]);
    if let Some(ca) = ca {
        curl.arg("--cacert").arg(ca);
    }
    capture(curl.arg(url), b"").unwrap()
}

fn wait(world: &World, served: &mut Served, what: &str, done: impl Fn() -> bool) {
    for _ in 0..TRIES {
        if done() {
            return;
        }
        let log = || fs::read_to_string(world.folder().join("front.log")).unwrap_or_default();
        assert!(served.0.try_wait().unwrap().is_none(), "the daemon ended: {}", log());
        std::thread::sleep(Duration::from_millis(100));
    }
    panic!("{what}: {}", fs::read_to_string(world.folder().join("front.log")).unwrap());
}

fn certificate(folder: &Path) -> String {
    let made = rcgen::generate_simple_self_signed(["api.example.com".to_owned()]).unwrap();
    fs::write(folder.join("key.pem"), made.signing_key.serialize_pem()).unwrap();
    fs::write(folder.join("cert.pem"), made.cert.pem()).unwrap();
    made.cert.pem()
}

#[test]
fn keys_never_cross_a_network_in_clear_and_certificates_change_while_it_runs() {
    let world = World::new().unwrap();
    // Every address that is not loopback alone.
    for address in ["0.0.0.0:7070", "[::]:7070", &format!("{}:7070", sites::HOST_V4)] {
        let file = config(&world, &format!("listen = {address:?}"));
        let mut command = world.on_host("timeout");
        command.arg("60").arg(daemon::binary().unwrap()).args(["serve", "--config"]).arg(file);
        let done = capture(command.env("NO_COLOR", "1"), b"").unwrap();
        assert!(done.code != 0 && done.code != 124, "{address}: {done:?}");
        for word in ["not loopback", "tls_cert", "listen_without_tls"] {
            assert!(done.err.contains(word) || done.out.contains(word), "{address}: {done:?}");
        }
        assert!(!world.folder().join("data").exists(), "{address}: it began");
    }

    // Told so, it does.
    let mut served = start(&world, "listen = \"0.0.0.0:7070\"\nlisten_without_tls = true");
    let plain = "http://api.example.com:7070/healthz";
    wait(&world, &mut served, "no plain answer", || look(&world, plain, None).out.contains("ok"));
    drop(served);

    // With a certificate it needs no telling, and answers nothing in clear.
    let folder = world.folder();
    let (first, second) = (folder.join("first.pem"), folder.join("second.pem"));
    fs::write(&first, certificate(folder)).unwrap();
    let lines = format!(
        "listen = \"0.0.0.0:7070\"\ntls_cert = {:?}\ntls_key = {:?}",
        folder.join("cert.pem"),
        folder.join("key.pem")
    );
    let mut served = start(&world, &lines);
    let url = "https://api.example.com:7070/healthz";
    wait(&world, &mut served, "no answer by TLS", || look(&world, url, Some(&first)).out.contains("ok"));
    assert!(!look(&world, plain, None).out.contains("ok"));
    let pid = served.0.id();
    fs::write(&second, certificate(folder)).unwrap();
    wait(&world, &mut served, "the old certificate", || look(&world, url, Some(&second)).out.contains("ok"));
    assert!(!look(&world, url, Some(&first)).ok(), "the old one is no longer shown");
    // Half a certificate changes nothing.
    fs::write(folder.join("cert.pem"), "-----BEGIN CERTIFICATE-----").unwrap();
    for _ in 0..3 {
        assert!(look(&world, url, Some(&second)).ok());
    }
    assert_eq!(served.0.id(), pid);
}

#[test]
fn the_audit_log_keeps_to_its_size_while_clients_read() {
    const EVENTS: i64 = 240_000;
    let world = World::new().unwrap();
    let settings = || Settings::of(Driver::Netns).unwrap();
    let mut daemon = Daemon::start(&world, settings()).unwrap();
    let client = daemon.client().sign_up("ada").unwrap();
    daemon.kill().unwrap();

    // A log of a day, made by the store itself while no daemon runs.
    let data = daemon.data_dir();
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let now = now_us();
    runtime.block_on(async {
        let key = SealKey::load_or_create(&data.join("seal.key")).unwrap();
        let store = Store::open(&data, key).unwrap();
        let (user, _) = store.user_by_email("ada@example.com").await.unwrap().unwrap();
        let vm = VmId::generate();
        for n in 0..EVENTS {
            let policy = VmPolicy {
                vm: vm.clone(),
                user: user.id.clone(),
                generation: 1,
                mode: Mode::Enforce,
                rules: Default::default(),
                secrets: [].into(),
                secrets_over_http: Default::default(),
            };
            let verdict = Verdict::Deny { reason: Reason::NoRule };
            let mut event = AuditEvent::new(&policy, Protocol::Http, verdict, now - EVENTS + n);
            event.path = Some(format!("/{n}"));
            store.audit().record(event);
            if n % 512 == 0 {
                store.audit().flush().await;
            }
        }
        store.audit().flush().await;
    });
    drop(daemon);
    let file = data.join("audit.db");
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); \
                  db.execute('PRAGMA wal_checkpoint(TRUNCATE)').fetchall()";
    sh::run("python3", ["-c", script, file.to_str().unwrap()]).unwrap();
    let filled = fs::metadata(&file).unwrap().len();
    assert!(filled > 16 << 20, "only {filled} octets");

    let mut daemon = Daemon::start_with(&world, settings(), "audit_mib = 4", &[]).unwrap();
    // Readers are answered all the while.
    let mut small = false;
    for _ in 0..TRIES {
        let page = client.get("/v1/audit/egress?limit=500").unwrap().expect(200).unwrap();
        let events = page["data"].as_array().unwrap();
        assert_eq!(events.len(), 500);
        assert_eq!(events[0]["path"], format!("/{}", EVENTS - 1), "the newest stay");
        client.put("/v1/env/K", &serde_json::json!({ "value": "v" })).unwrap().expect(200).unwrap();
        small = fs::metadata(&file).unwrap().len() <= 13 << 20;
        if small {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert!(small, "the file has {} octets; {}", fs::metadata(&file).unwrap().len(), daemon.log());
    let oldest = client.get("/v1/audit/egress?limit=1&order=asc").unwrap().expect(200).unwrap();
    assert_ne!(oldest["data"][0]["path"], "/0", "the oldest are gone");
    let verify = || {
        let mut verify = world.on_host(daemon::binary().unwrap());
        capture(verify.args(["audit", "verify"]).env("TAPGATE_DATA_DIR", &data), b"").unwrap()
    };
    let done = verify();
    assert!(done.ok() && done.out.contains("whole"), "{done:?}");
    // What the daemon has seen is not emptied unnoticed.
    daemon.kill().unwrap();
    for name in ["audit.db", "audit.db-wal", "audit.db-shm"] {
        let _ = fs::remove_file(data.join(name));
    }
    daemon.start_again().unwrap();
    let done = verify();
    assert!(!done.ok() && done.err.contains("was there"), "{done:?}");
}
