//! The daemon killed with SIGKILL while guests are at something: each attempt is in the audit log once, or counted. The namespace driver
//! stands in for a VM.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::Value;
use std::{
    collections::{HashMap, HashSet},
    io::{BufRead as _, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
    demo::Stage,
    net, sh, sites,
};

/// Nobody writes to the log until this process is told to end: what is recorded waits in the daemon's memory.
fn locked(log: &Path) -> Child {
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1], isolation_level=None); \
                  db.execute('BEGIN IMMEDIATE'); print('held', flush=True); sys.stdin.read()";
    let mut command = Command::new("python3");
    command.args(["-c", script]).arg(log).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "held\n");
    child
}

fn started(world: &World) -> Stage<'_> {
    let settings = Settings::of(Driver::Netns).unwrap();
    let mut stage = Stage::new(world, Daemon::start(world, settings).unwrap()).unwrap();
    stage.boot("box").unwrap();
    stage
}

fn all(stage: &Stage<'_>) -> Vec<Value> {
    stage.api().audit(stage.vm().unwrap(), "").unwrap()
}

fn attempts(events: &[Value]) -> u64 {
    events.iter().map(|event| event["count"].as_u64().unwrap()).sum()
}

/// The log's chain is whole, as the operator's command sees it.
fn verify(stage: &Stage<'_>) {
    let mut verify = stage.world().on_host(daemon::binary().unwrap());
    let data = stage.daemon().data_dir();
    sh::expect(verify.args(["audit", "verify"]).env("TAPGATE_DATA_DIR", data), b"").unwrap();
}

fn eventually(what: &str, mut is: impl FnMut() -> bool) {
    for _ in 0..300 {
        if is() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("{what}: it never comes to that");
}

#[test]
fn what_is_open_and_what_waits_is_on_record_after_a_kill() {
    let world = World::new().unwrap();
    let mut stage = started(&world);
    let (api, echo, other) = (sites::API, sites::ECHO, sites::OTHER);
    let rule = stage.api().rule("host", api.name).unwrap();
    stage.api().rule("host", echo.name).unwrap();
    let placeholder = stage.api().secret("key", "KEY", "sk-live-0a1b2c3d4e5f", &[echo.name]).unwrap();
    let before: HashSet<String> = all(&stage).iter().map(|event| event["id"].to_string()).collect();

    let mut lock = locked(&stage.daemon().data_dir().join("audit.db"));
    // Over, and waiting to be stored.
    let mut told = Vec::new();
    for number in 0..20 {
        let asked = stage
            .sh(&format!(
                "curl -sS --max-time 20 --resolve {0}:80:{1} 'http://{0}/n{number}?q=hush'",
                other.name, other.v4
            ))
            .unwrap();
        let answer: Value = serde_json::from_str(&asked.out).unwrap();
        told.push((answer["error"]["event_id"].as_str().map(str::to_owned), number, asked.out));
    }
    let whole = stage.sh(&format!("curl -sS --cacert {} https://{}/", stage.world_ca(), api.name)).unwrap();
    assert!(whole.ok(), "{whole:?}");
    let send = "python3 -c \"import socket; s = socket.socket(2, 2)\nfor p in range(30): s.sendto(b'x', ('203.0.113.9', 20000 + p % 10))\"";
    assert!(stage.sh(send).unwrap().ok());
    // Open.
    let folder = stage.scratch();
    let ca = stage.world_ca();
    for (name, request) in [
        ("spliced", format!("--cacert {ca} https://{}/endless", api.name)),
        ("opened", format!("-H 'X-Key: {placeholder}' 'https://{}/endless?q=hush'", echo.name)),
    ] {
        let start =
            format!("nohup curl -sSN {request} > {folder}/{name} 2> {folder}/{name}.err < /dev/null &");
        assert!(stage.sh(&start).unwrap().ok());
        eventually(name, || {
            std::fs::metadata(world.folder().join("guest").join(name)).is_ok_and(|file| file.len() > 4096)
        });
    }
    let silent = format!(
        "nohup python3 -c \"import socket, time; s = socket.create_connection(('{}', 443)); print('in', flush=True); time.sleep(60)\" \
         > {folder}/silent 2>&1 < /dev/null &",
        other.v4
    );
    assert!(stage.sh(&silent).unwrap().ok());
    eventually("silent", || {
        std::fs::read_to_string(world.folder().join("guest/silent")).is_ok_and(|said| said == "in\n")
    });
    thread::sleep(Duration::from_millis(300));

    stage.daemon_mut().kill().unwrap();
    drop(lock.stdin.take());
    lock.wait().unwrap();
    stage.daemon_mut().start_again().unwrap();

    let new = |stage: &Stage<'_>| -> Vec<Value> {
        all(stage).into_iter().filter(|event| !before.contains(&event["id"].to_string())).collect()
    };
    let datagrams = |events: &[Value]| {
        let udp: Vec<Value> = events.iter().filter(|event| event["protocol"] == "udp").cloned().collect();
        attempts(&udp)
    };
    eventually("all datagrams", || datagrams(&new(&stage)) >= 30);
    let events = new(&stage);
    let ids: HashSet<String> = events.iter().map(|event| event["id"].to_string()).collect();
    assert_eq!(ids.len(), events.len(), "{events:#?}");
    let of = |wanted: &dyn Fn(&Value) -> bool| -> Vec<&Value> {
        events.iter().filter(|event| wanted(event)).collect()
    };
    for (id, number, answer) in &told {
        let id = id.as_ref().unwrap_or_else(|| panic!("no id in {answer}"));
        let [event] = of(&|event| event["id"] == id.as_str())[..] else { panic!("{id}: {events:#?}") };
        assert_eq!((&event["reason"], &event["status"]), (&"no_rule".into(), &403.into()), "{event}");
        assert_eq!(
            (&event["host"], &event["path"]),
            (&other.name.into(), &format!("/n{number}").into()),
            "{event}"
        );
    }
    let ended = of(&|event| event["reason"] == "daemon_ended");
    let shape = |event: &&Value| {
        format!("{} {} {} {}", event["protocol"], event["host"], event["verdict"], event["allowed"])
    };
    let mut shapes: Vec<String> = ended.iter().map(shape).collect();
    shapes.sort();
    assert_eq!(
        shapes,
        [
            format!("\"http\" \"{}\" \"allowed\" true", echo.name),
            "\"tcp\" null \"denied\" false".to_owned(),
            format!("\"tls\" \"{}\" \"allowed\" true", api.name),
        ],
        "{ended:#?}"
    );
    for event in ended {
        match event["protocol"].as_str().unwrap() {
            "http" => {
                assert_eq!((&event["method"], &event["path"]), (&"GET".into(), &"/endless".into()));
                assert_eq!((&event["secrets"], &event["status"]), (&serde_json::json!(["key"]), &200.into()));
            }
            "tls" => assert_eq!(event["rule_id"], rule),
            _ => assert_eq!((&event["address"], &event["port"]), (&other.v4.to_string().into(), &443.into())),
        }
    }
    let whole = of(&|event| event["protocol"] == "tls" && event["reason"] == "host");
    assert!(whole.len() == 1 && whole[0]["bytes_in"].as_u64().unwrap() > 0, "{whole:#?}");
    assert_eq!(datagrams(&events), 30);
    verify(&stage);
    // Told once, though the next one is killed too.
    stage.daemon_mut().kill().unwrap();
    stage.daemon_mut().start_again().unwrap();
    assert_eq!(new(&stage).len(), events.len());
    verify(&stage);
    let file = std::fs::read(stage.daemon().data_dir().join("audit.journal")).unwrap();
    for never in ["sk-live-0a1b2c3d4e5f", "hush"] {
        assert!(memchr::memmem::find(&file, never.as_bytes()).is_none(), "{never} is in the journal");
    }
    stage.clear().unwrap();
}

/// Just before the transaction that stores an event is over, and just after: in the journal it looks the same.
#[test]
fn what_the_last_transaction_stored_is_told_once() {
    let world = World::new().unwrap();
    let fault = world.folder().join("fault");
    let settings = Settings::of(Driver::Netns).unwrap();
    let environment = [("TAPGATE_FAULT", fault.to_str().unwrap())];
    let daemon = Daemon::start_with(&world, settings, "", &environment).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let other = sites::OTHER;
    for point in ["audit.claimed", "audit.committed", "audit.claimed"] {
        std::fs::write(&fault, point).unwrap();
        let path = format!("/{}", stage.daemon().pid());
        let ask =
            format!("curl -sS --max-time 5 --resolve {0}:80:{1} http://{0}{path}", other.name, other.v4);
        // Whether it is still answered is no matter.
        let _ = stage.sh(&ask).unwrap();
        stage.daemon_mut().wait_for_death().unwrap();
        std::fs::remove_file(&fault).unwrap();
        stage.daemon_mut().start_again().unwrap();
        let events = all(&stage);
        let told: Vec<&Value> = events.iter().filter(|event| event["path"] == path).collect();
        assert!(
            told.len() == 1 && told[0]["count"] == 1 && told[0]["reason"] == "no_rule",
            "{point}: {told:#?}"
        );
        verify(&stage);
    }
    stage.clear().unwrap();
}

/// Asks until it is told to end, each time for a path of its own. Says of each how far it got: connected, answered.
const ASKS: &str = r#"
import socket, sys, threading, time
address, host, name = sys.argv[1:4]
out = threading.Lock()
def say(*words):
    with out: print(*words, flush=True)
def ask(thread):
    number = 0
    while True:
        number += 1
        path = f"/{name}-{thread}-{number}"
        try:
            with socket.create_connection((address, 80), timeout=5) as s:
                say("connected", path)
                s.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode())
                answer = b""
                while more := s.recv(65536): answer += more
                if b" 403 " in answer[:20]: say("answered", path)
        except OSError:
            time.sleep(0.02)
for thread in range(4): threading.Thread(target=ask, args=(thread,), daemon=True).start()
sys.stdin.read()
"#;

#[test]
fn killed_at_any_moment_nothing_that_was_answered_is_missing_and_nothing_is_told_twice() {
    const ROUNDS: u64 = 10;
    let world = World::new().unwrap();
    let mut stage = started(&world);
    let other = sites::OTHER;
    let guest = format!("{}-0", world.names().egress());
    let mut child = net::inside(&guest, "python3");
    child.args(["-c", ASKS, &other.v4.to_string(), other.name, "r"]);
    let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let said = child.stdout.take().unwrap();
    let said = thread::spawn(move || BufReader::new(said).lines().map_while(Result::ok).collect::<Vec<_>>());
    let mut random = 11u64;
    for _ in 0..ROUNDS {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        thread::sleep(Duration::from_millis(100 + (random >> 33) % 700));
        stage.daemon_mut().kill().unwrap();
        stage.daemon_mut().start_again().unwrap();
    }
    drop(child.stdin.take());
    child.wait().unwrap();
    let said = said.join().unwrap();
    let of = |word: &str| -> HashSet<String> {
        said.iter().filter_map(|line| line.strip_prefix(word)).map(|path| path.trim().to_owned()).collect()
    };
    let (connected, answered) = (of("connected"), of("answered"));
    assert!(answered.len() > 100, "{}", answered.len());

    let counters = format!("/v1/vms/{}/egress/counters", stage.vm().unwrap());
    let counted =
        stage.api().get(&counters).unwrap().expect(200).unwrap()["events_dropped"].as_u64().unwrap();
    // Those who ask went away in the middle of the last ones.
    let told = |events: &[Value]| {
        let mut told: HashMap<String, u64> = HashMap::new();
        for event in events.iter().filter(|event| event["path"].is_string()) {
            *told.entry(event["path"].as_str().unwrap().to_owned()).or_default() +=
                event["count"].as_u64().unwrap();
        }
        told
    };
    eventually("each that was answered", || {
        let told = told(&all(&stage));
        answered.iter().all(|path| told.contains_key(path))
    });
    let events = all(&stage);
    let told = told(&events);
    assert!(told.values().all(|times| *times == 1), "told twice: {told:?}");
    assert!(told.keys().all(|path| connected.contains(path)), "told and never tried");
    // Read by nobody yet when the daemon died, or of those who went away.
    let unread = events.iter().filter(|event| event["path"].is_null() && event["protocol"] != "udp");
    let unread = unread.filter(|event| event["port"] == 80).count() as u64;
    let in_all = told.len() as u64 + unread + counted;
    let tried = connected.len() as u64;
    println!(
        "{tried} connections, {} answered; {} told with their path, {unread} without, {counted} counted; {} accepted by nobody",
        answered.len(),
        told.len(),
        tried.saturating_sub(in_all)
    );
    assert!(in_all <= tried + 4, "{in_all} of {tried}");
    // At a death those are missing alone that no daemon had accepted yet: of each who asks, one at most.
    assert!(tried - in_all.min(tried) <= 4 * ROUNDS, "{in_all} of {tried}");
    verify(&stage);
    stage.clear().unwrap();
}

/// A POST with an `Idempotency-Key` whose answer was never kept: sent again to the next daemon it does nothing twice, and says what
/// is not known.
#[test]
fn a_request_with_a_key_is_not_done_again_by_the_next_daemon() {
    let world = World::new().unwrap();
    let mut stage = started(&world);
    let records = stage.daemon().data_dir().join("tapgate.db");
    let change = |sql: &str| {
        let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])";
        sh::expect(Command::new("python3").args(["-c", script]).arg(&records).arg(sql), b"").unwrap();
    };
    let post = |stage: &Stage<'_>, key: &str, name: &str| {
        let body = serde_json::json!({"name": name, "secret": "sk-0123456789abcdef", "env_var": name, "hosts": ["a.example"]});
        let mut curl = stage.world().on_host("curl");
        curl.args(["-sS", "--noproxy", "*", "-H", "Content-Type: application/json"]);
        curl.args(["-H", &format!("Idempotency-Key: {key}"), "-d", &body.to_string()]);
        curl.args(["-H", &format!("Authorization: Bearer {}", stage.api().key().unwrap())]);
        let said = sh::expect(curl.arg(stage.api().url("/v1/secrets")), b"").unwrap();
        serde_json::from_str::<Value>(&said).unwrap()
    };
    let secrets = |stage: &Stage<'_>| {
        let all = stage.api().get("/v1/secrets").unwrap().expect(200).unwrap();
        all["data"].as_array().unwrap().len()
    };
    change(
        "CREATE TRIGGER lost BEFORE UPDATE OF status ON idempotency BEGIN SELECT RAISE(FAIL, 'it is not kept'); END",
    );
    let first = post(&stage, "one", "ONE");
    assert!(first.get("error").is_none(), "{first}");
    stage.daemon_mut().kill().unwrap();
    change("DROP TRIGGER lost");
    stage.daemon_mut().start_again().unwrap();
    for _ in 0..2 {
        let again = post(&stage, "one", "ONE");
        assert_eq!(again["error"]["code"], "outcome_unknown", "{again}");
    }
    assert_eq!(secrets(&stage), 1);
    let other = post(&stage, "two", "TWO");
    assert!(other.get("error").is_none(), "{other}");
    assert_eq!(post(&stage, "two", "TWO"), other);
    assert_eq!(secrets(&stage), 2);
}
