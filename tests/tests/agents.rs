//! Agents from end to end: a real guest that clones with a placeholder, runs its harness, pushes, and reports; and what a
//! guest may not report.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{thread, time::Duration};
use tapgate_e2e::{
    World,
    api::Client,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    raw, sh, sites,
    ssh::{self, Guest},
    world::{AGENT_BRANCH, GIT_TOKEN},
};

const LLM_KEY: &str = "sk-llm-5c1d77aa0b9e4e3f";
/// What a shell would trip over: each must arrive as one argument.
const PROMPT: &str = "-- it's \"two\" lines;\n$(touch /root/pwned) `id` \\ %s *";
const ARGS: &str = r#"--model 'a b' "$HOME" -x=1"#;

fn agent(world: &World, name: &str, harness: &str) -> Value {
    json!({
        "name": name, "repo": "git.example.com/project.git", "branch": AGENT_BRANCH, "harness": harness,
        "prompt": PROMPT, "agent_args": ARGS, "public_key": ssh::key(world).unwrap(), "memory_mib": 384,
    })
}

fn account(stage: &Stage<'_>) {
    let api = stage.api();
    api.rule("host", sites::GIT.name).unwrap();
    api.rule("host", sites::ECHO.name).unwrap();
    api.secret("git", "GIT_TOKEN", GIT_TOKEN, &[sites::GIT.name]).unwrap();
    api.secret("llm", "LLM_API_KEY", LLM_KEY, &[sites::ECHO.name]).unwrap();
}

fn show(api: &Client<'_>, agent: &str) -> Value {
    api.get(&format!("/v1/agents/{agent}")).unwrap().expect(200).unwrap()
}

/// Everything that the harness's terminal showed last.
fn log(api: &Client<'_>, agent: &str, wanted: &str) -> String {
    let mut text = String::new();
    for _ in 0..60 {
        let body = api.get(&format!("/v1/agents/{agent}/log?tail=50")).unwrap().expect(200).unwrap();
        text = body["log"].as_str().unwrap().to_owned();
        if text.contains(wanted) {
            break;
        }
        thread::sleep(Duration::from_millis(500));
    }
    text
}

/// Neither secret is in the VM's disk or memory; the placeholders are, so the search would have found them.
fn no_secret_inside(stage: &Stage<'_>, vm: &str) {
    let folder = stage.daemon().vm_folder(vm);
    let pid = stage.daemon().vmm(vm).unwrap();
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let basic = STANDARD.encode(format!("x-access-token:{GIT_TOKEN}"));
    let needles =
        [GIT_TOKEN, LLM_KEY, basic.as_str(), "IRONSH_PROXY_git", "IRONSH_PROXY_llm"].map(str::as_bytes);
    let wanted = [false, false, false, true, true];
    assert_eq!(raw::in_memory(pid, &needles).unwrap(), wanted, "in memory");
    let disks = ["disk.raw", "disk.qcow2"].map(|name| folder.join(name));
    let disk = disks.iter().find(|disk| disk.exists()).unwrap();
    assert_eq!(raw::in_file(disk, &needles).unwrap(), wanted, "in {}", disk.display());
}

#[test]
fn real_vm_agent_clones_works_pushes_and_is_not_run_twice() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Qemu).unwrap()).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    account(&stage);
    let journal = world.journal().mark();
    let (id, vm) = stage.api().create_agent(&agent(&world, "works", "scripted")).unwrap();
    // These two are to fail, each in its own way, while the first one works.
    let (lost, lost_vm) = stage.api().create_agent(&agent(&world, "rebooted", "scripted")).unwrap();
    let (absent, _) = stage.api().create_agent(&agent(&world, "absent", "claude")).unwrap();
    assert_eq!(show(stage.api(), &id)["status"], "provisioning");
    stage.api().wait_agent(&id, "running").unwrap();
    assert!(log(stage.api(), &id, "the model has answered").contains("the model has answered"));

    // The daemon may come and go; the harness works on.
    stage.daemon_mut().kill().unwrap();
    stage.daemon_mut().start_again().unwrap();
    stage.api().wait_ready(&vm).unwrap();
    let guest = Guest::of(&world, stage.api(), &vm).unwrap();
    let argv = guest.expect("tr '\\0' '\\001' < /root/argv | base64 -w0; test ! -e /root/pwned").unwrap();
    let given: Vec<String> = {
        use base64::{Engine as _, engine::general_purpose::STANDARD};
        let text = String::from_utf8(STANDARD.decode(argv.trim()).unwrap()).unwrap();
        text.split_terminator('\u{1}').map(str::to_owned).collect()
    };
    assert_eq!(given, ["--model", "a b", "$HOME", "-x=1", "--", PROMPT]);
    assert!(guest.expect("tmux list-sessions").unwrap().starts_with("main:"));
    guest.expect("sync; touch /root/go").unwrap();
    let done = stage.api().wait_agent(&id, "idle").unwrap();
    assert_eq!(done["failure_reason"], Value::Null, "{done}\n{}", log(stage.api(), &id, ""));
    assert!(log(stage.api(), &id, "pushed").contains("pushed"));
    let bare = world.folder().join("git/project.git");
    let last =
        sh::run("git", ["-C", bare.to_str().unwrap(), "log", "-1", "--format=%s by %an", AGENT_BRANCH])
            .unwrap();
    assert_eq!(last.trim(), "Done by the agent by works");
    let asked = journal.http(sites::ECHO.name).unwrap();
    assert!(asked.iter().any(|entry| entry["headers"].to_string().contains(&format!("Bearer {LLM_KEY}"))));
    let pushes = journal.http(sites::GIT.name).unwrap();
    let pushed = |entry: &&Value| entry["target"].as_str().unwrap().ends_with("git-receive-pack");
    assert!(
        pushes.iter().filter(pushed).any(|entry| entry["basic"] == format!("x-access-token:{GIT_TOKEN}"))
    );
    no_secret_inside(&stage, &vm);

    // A guest that is restarted in the middle says so and does not begin again; one that had ended stays ended.
    stage.api().wait_agent(&lost, "running").unwrap();
    let other = Guest::of(&world, stage.api(), &lost_vm).unwrap();
    other.expect("sync").unwrap();
    let _ = other.sh("systemctl reboot --force --force");
    other.hang_up();
    let ended = stage.api().wait_agent(&lost, "idle").unwrap();
    assert!(ended["failure_reason"].as_str().unwrap().contains("restarted"), "{ended}");
    stage.api().wait_ready(&lost_vm).unwrap();
    assert_eq!(
        other.expect("cat /root/runs; tmux has-session -t main 2>/dev/null && echo twice; true").unwrap(),
        "run"
    );
    let ended = stage.api().wait_agent(&absent, "idle").unwrap();
    assert!(ended["failure_reason"].as_str().unwrap().contains("no program `claude`"), "{ended}");

    for agent in [&id, &lost, &absent] {
        stage.api().delete(&format!("/v1/agents/{agent}")).unwrap().expect(204).unwrap();
    }
    for vm in [&vm, &lost_vm] {
        stage.api().wait_for(vm, "destroyed").unwrap();
        assert!(!stage.daemon().vm_folder(vm).exists());
    }
}

/// What curl in the guest got from the guest service: status and body.
fn service(guest: &Guest<'_>, arguments: &str) -> (u16, String) {
    let command = format!("curl -sS -m 20 -w '\\n%{{http_code}}' {arguments}");
    let text = guest.expect(&command).unwrap();
    let (body, status) = text.rsplit_once('\n').unwrap_or(("", &text));
    (status.parse().unwrap(), body.to_owned())
}

#[test]
fn a_guest_reports_for_itself_alone_and_only_forwards() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let stage = Stage::new(&world, daemon).unwrap();
    account(&stage);
    let api = stage.api();
    let (id, vm) = api.create_agent(&agent(&world, "one", "scripted")).unwrap();
    let other = api.create_vm("other", &ssh::key(&world).unwrap()).unwrap();
    for vm in [&vm, &other] {
        api.wait_ready(vm).unwrap();
    }
    assert!(show(api, &id)["failure_reason"].as_str().unwrap().contains("namespace driver"));
    let (guest, other) = (Guest::of(&world, api, &vm).unwrap(), Guest::of(&world, api, &other).unwrap());
    let base = "http://169.254.169.254/v1";
    let status =
        |guest: &Guest<'_>, body: &str| service(guest, &format!("-X PUT -d '{body}' {base}/agent/status")).0;

    let task: Value = serde_json::from_str(&service(&guest, &format!("{base}/agent")).1).unwrap();
    assert_eq!(task["id"], id);
    assert_eq!(task["url"], "https://git.example.com/project.git");
    assert_eq!(
        task["argv"],
        json!(["/bin/bash", "./harness.sh", "--model", "a b", "$HOME", "-x=1", "--", PROMPT])
    );
    assert!(!task.to_string().contains(GIT_TOKEN) && !task.to_string().contains(LLM_KEY));
    let credential = service(&guest, &format!("'{base}/git-credential?host=git.example.com:443'"));
    assert_eq!((credential.0, credential.1.contains("IRONSH_PROXY_git")), (200, true));
    assert_eq!(service(&guest, &format!("'{base}/git-credential?host=www.example.org'")).0, 404);

    // A VM that is no agent's has no task, no credential and nothing to report.
    for path in ["agent", "git-credential?host=git.example.com"] {
        assert_eq!(service(&other, &format!("'{base}/{path}'")).0, 404, "{path}");
    }
    assert_eq!(status(&other, r#"{"status":"idle"}"#), 404);
    assert_eq!(service(&other, &format!("-X PUT -d x {base}/agent/log")).0, 404);
    assert_eq!(show(api, &id)["status"], "provisioning");

    for wrong in ["", "x", r#"{"status":"done"}"#, r#"{"status":"idle","id":"x"}"#] {
        assert_eq!(status(&guest, wrong), 422, "{wrong}");
    }
    assert_eq!(status(&guest, r#"{"status":"running"}"#), 204);
    assert_eq!(show(api, &id)["status"], "running");
    assert_eq!(status(&guest, r#"{"status":"provisioning"}"#), 409);
    let too_large = format!(
        "head -c 20000 /dev/zero | curl -sS -m 20 -o /dev/null -w '%{{http_code}}' -T - {base}/agent/status"
    );
    assert_eq!(guest.expect(&too_large).unwrap(), "413");

    assert_eq!(service(&guest, &format!("-X PUT --data-binary \"$(seq 1 300)\" {base}/agent/log")).0, 204);
    let read = api.get(&format!("/v1/agents/{id}/log?tail=2")).unwrap().expect(200).unwrap();
    assert_eq!(read, json!({"log": "299\n300", "truncated": true}));
    let flood = format!(
        "for i in 1 2 3 4 5 6; do curl -sS -m 20 -o /dev/null -w '%{{http_code}} ' -X PUT -d x {base}/agent/log; done"
    );
    assert!(guest.expect(&flood).unwrap().contains("429"));
    let too_large = format!(
        "head -c 200000 /dev/zero | curl -sS -m 20 -o /dev/null -w '%{{http_code}}' -T - {base}/agent/log"
    );
    assert_eq!(guest.expect(&too_large).unwrap(), "413");

    assert_eq!(status(&guest, r#"{"status":"idle","failure_reason":"a\u0007\nb"}"#), 204);
    assert_eq!(show(api, &id)["failure_reason"], "a  b");
    assert_eq!(status(&guest, r#"{"status":"running"}"#), 409);
    api.delete(&format!("/v1/agents/{id}")).unwrap().expect(204).unwrap();
    api.wait_for(&vm, "destroyed").unwrap();
}

/// Asks for the task on as many connections as a guest may have, reads no answer's body, and prints how many KiB the daemon took for
/// that. (A namespace sees the host's processes.)
const HOARD: &str = r#"
import socket, sys, time

def taken():
    lines = open(f"/proc/{sys.argv[1]}/status")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))

def ask():
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(60)
    connection.connect(("169.254.169.254", 80))
    connection.sendall(b"GET /v1/agent HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n\r\n")
    assert connection.recv(12) == b"HTTP/1.1 200"
    return connection

# What one answer takes is there before.
first = ask()
while first.recv(65536):
    pass
first.close()
before = taken()
held = [ask() for _ in range(15)]
time.sleep(0.5)
print(taken() - before)
"#;

#[test]
fn a_guest_that_reads_its_task_slowly_has_one_copy_of_it() {
    let world = World::new().unwrap();
    let daemon = Daemon::start(&world, Settings::of(Driver::Netns).unwrap()).unwrap();
    let stage = Stage::new(&world, daemon).unwrap();
    account(&stage);
    let api = stage.api();
    // As JSON each of these octets is six.
    let value = "\u{1}".repeat(32_000);
    for name in ["A", "B", "C", "D", "E", "F", "G"] {
        api.put(&format!("/v1/env/{name}"), &json!({ "value": value })).unwrap().expect(200).unwrap();
    }
    let (_, vm) = api.create_agent(&agent(&world, "one", "scripted")).unwrap();
    api.wait_ready(&vm).unwrap();
    let guest = Guest::of(&world, api, &vm).unwrap();
    let command = format!("python3 - {} <<'END'\n{HOARD}\nEND", stage.daemon().pid());
    let taken: i64 = guest.expect(&command).unwrap().parse().unwrap();
    // An answer is 1.3 MiB.
    println!("{taken} KiB for fifteen answers");
    assert!(taken < 10 << 10, "{taken} KiB for fifteen answers");
}
