//! Measures the life of VMs: each phase of creation, snapshots, restoring, the memory of an idle VM. Prints Markdown.
//!
//! Real guests in a world of their own. Without KVM they are emulated: the guest's own boot is then the machine's, not
//! tapgate's, and stands in a column of its own.

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use std::{
    collections::BTreeMap,
    fs, thread,
    time::{Duration, Instant},
};
use tapgate_e2e::{
    World,
    api::Client,
    daemon::{self, Daemon, Driver, Settings},
    ssh,
};

/// Of the design.
const BAR_MS: f64 = 50.0;

fn main() -> Result<()> {
    let long = std::env::args().any(|word| word == "--long");
    let (vms, namespaces) = if long { (5, 100) } else { (2, 10) };
    real(vms)?;
    println!();
    many(namespaces)
}

fn start(world: &World, driver: Driver) -> Result<Daemon<'_>> {
    let images = "/var/cache/tapgate/images".into();
    let settings = Settings { binary: daemon::binary()?, driver, images };
    // The parts of a snapshot's hold are told on the driver's finer level.
    let environment = [("TAPGATE_LOG", "info,tapgate_vmm=debug")];
    Daemon::start_with(world, settings, "memory_reserve_mib = 0\n", &environment)
}

/// The fields of a log's line of this event about this VM.
fn fields(daemon: &Daemon<'_>, event: &str, about: &str) -> Result<BTreeMap<String, f64>> {
    let log = daemon.log();
    let line = log.lines().rfind(|line| line.contains(event) && line.contains(about));
    let line = line.with_context(|| format!("the log has no {event} of {about}"))?;
    let pair = |word: &str| {
        let (name, value) = word.split_once('=')?;
        Some((name.to_owned(), value.trim_end_matches(',').parse().ok()?))
    };
    Ok(line.split_whitespace().filter_map(pair).collect())
}

/// One VM's way to `ready`: milliseconds of the call and of each phase.
struct Made {
    vm: String,
    call: f64,
    phases: BTreeMap<String, f64>,
    ready: f64,
}

fn make(daemon: &Daemon<'_>, api: &Client<'_>, body: &Value) -> Result<Made> {
    let began = Instant::now();
    let vm = api.post("/v1/vms", body)?.expect(201)?;
    let call = began.elapsed().as_secs_f64() * 1e3;
    let vm = vm["id"].as_str().context("no id")?.to_owned();
    loop {
        let body = api.get(&format!("/v1/vms/{vm}"))?.expect(200)?;
        ensure!(body["status"] != "failed", "{body}");
        if body["status_detail"] == "ready" {
            break;
        }
        thread::sleep(Duration::from_millis(20));
    }
    let ready = began.elapsed().as_secs_f64() * 1e3;
    Ok(Made { phases: fields(daemon, "vm.started", &vm)?, vm, call, ready })
}

fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get(numbers.len() / 2).copied().unwrap_or(f64::NAN)
}

fn phases(made: &[Made]) -> [f64; 5] {
    let phase = |name: &str| {
        median(made.iter().map(|one| one.phases.get(name).map_or(f64::NAN, |us| us / 1e3)).collect())
    };
    let all = ["records_us", "gate_us", "vmm_us", "rest_us"].map(phase);
    let ours = |one: &Made| all_of(one);
    [all[0], all[1], all[2], all[3], median(made.iter().map(ours).collect())]
}

fn all_of(one: &Made) -> f64 {
    ["records_us", "gate_us", "vmm_us", "rest_us"]
        .iter()
        .filter_map(|name| one.phases.get(*name))
        .sum::<f64>()
        / 1e3
}

fn table(title: &str, made: &[Made]) {
    let [records, gate, vmm, rest, sum] = phases(made);
    println!("### {title}\n\n| phase | median of {}, ms |\n| --- | --- |", made.len());
    println!(
        "| `POST /v1/vms` until its answer (curl included) | {:.1} |",
        median(made.iter().map(|one| one.call).collect())
    );
    println!(
        "| records, CA, seed's content | {records:.1} |\n| tap, programs, maps, route, proxy | {gate:.1} |"
    );
    println!("| disk, seed, VMM until it answers | {vmm:.1} |\n| record, SSH port | {rest:.1} |");
    let verdict = if sum < BAR_MS { "met".to_owned() } else { format!("missed by {:.0} ms", sum - BAR_MS) };
    println!("| **all but the guest's boot** (bar: under {BAR_MS} ms) | **{sum:.1}**, {verdict} |");
    println!(
        "| from the call until SSH answers | {:.0} |\n",
        median(made.iter().map(|one| one.ready).collect())
    );
}

fn proportional_kib(pid: u32) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).context("no Pss")?;
    Ok(line.split_whitespace().next().context("no number")?.parse()?)
}

fn real(count: usize) -> Result<()> {
    let world = World::new()?;
    let daemon = start(&world, Driver::Qemu)?;
    let api = daemon.client().sign_up("ada")?;
    let key = ssh::key(&world)?;
    let body = |name: String| json!({"name": name, "public_key": key, "memory_mib": 256});
    let made =
        (0..count).map(|n| make(&daemon, &api, &body(format!("vm-{n}")))).collect::<Result<Vec<_>>>()?;
    println!("## Real guests (QEMU, 1 vCPU, 256 MiB)\n");
    table("Creation, one after another", &made);

    let first = &made[0].vm;
    let began = Instant::now();
    let (id, stored) = snapshot(&api, first)?;
    let whole = began.elapsed().as_secs_f64();
    let taken = fields(&daemon, "snapshot.taken", &id)?;
    let idle = held(&daemon, first)?;
    let mut restored = body("restored".into());
    restored["snapshot_id"] = json!(id);
    let copy = make(&daemon, &api, &restored)?;
    let fetch = fields(&daemon, "snapshot.fetched", &id)?;
    let mib = |octets: f64| octets / f64::from(1 << 20);
    println!("### Snapshot and restore (local folder)\n\n| | |\n| --- | --- |");
    println!("| guest held, idle | {idle} |");
    println!("| from the call until it is stored | {whole:.1} s |");
    println!(
        "| copy, stored | {:.0} MiB, {:.0} MiB |",
        mib(taken["bytes"]),
        mib(stored["size_bytes"].as_f64().unwrap_or(0.0))
    );
    println!("| restore: fetched, verified, unpacked | {:.2} s |", fetch["fetch_us"] / 1e6);
    println!("| restore: then, all but the guest's boot | {:.1} ms |", all_of(&copy));
    println!("| restore: from the call until SSH answers | {:.1} s |\n", copy.ready / 1e3);

    under_load(&world, &daemon, &api, first)?;
    thread::sleep(Duration::from_secs(10));
    let pids: Vec<u32> = made.iter().filter_map(|one| daemon.vmm(&one.vm)).collect();
    let vmms = pids.iter().map(|pid| proportional_kib(*pid)).collect::<Result<Vec<_>>>()?;
    println!("### Memory\n\n| | MiB |\n| --- | --- |");
    println!(
        "| an idle VM's VMM, guest's memory included (proportional set) | {:.0} |",
        median(vmms) / 1024.0
    );
    println!("| the daemon with {} VMs | {:.0} |", made.len() + 1, proportional_kib(daemon.pid())? / 1024.0);
    Ok(())
}

/// Takes one and waits until it is stored.
fn snapshot(api: &Client<'_>, vm: &str) -> Result<(String, Value)> {
    let snapshot = api.post(&format!("/v1/vms/{vm}/snapshots"), &json!({}))?.expect(201)?;
    let id = snapshot["data"]["id"].as_str().context("no id")?.to_owned();
    loop {
        let now = api.get(&format!("/v1/snapshots/{id}"))?.expect(200)?["data"].clone();
        ensure!(now["status"] != "failed", "{now}");
        if now["status"] == "ready" {
            return Ok((id, now));
        }
        thread::sleep(Duration::from_millis(50));
    }
}

/// How long the guest was held for its last snapshot, and for what.
fn held(daemon: &Daemon<'_>, vm: &str) -> Result<String> {
    let log = daemon.log();
    let line = log.lines().rfind(|line| line.contains("froze=") && line.contains(vm));
    let line = line.context("the log has nothing about the hold")?;
    let part = |name: &str| -> f64 {
        let text = line.split_whitespace().find_map(|word| word.strip_prefix(name)).unwrap_or_default();
        let (number, unit) = text.split_at(text.find(|c: char| c.is_alphabetic() || c == 'µ').unwrap_or(0));
        let times = match unit {
            "s" => 1e3,
            "ms" => 1.0,
            _ => 1e-3,
        };
        number.parse::<f64>().unwrap_or(f64::NAN) * times
    };
    let (froze, began, thawed) = (part("froze="), part("began="), part("thawed="));
    Ok(format!(
        "{:.1} ms: file systems frozen {froze:.1}, copy begun {began:.1}, thawed {thawed:.1}",
        froze + began + thawed
    ))
}

/// Snapshots while the guest writes without pause.
fn under_load(world: &World, daemon: &Daemon<'_>, api: &Client<'_>, vm: &str) -> Result<()> {
    let guest = ssh::Guest::of(world, api, vm)?;
    let write = "while :; do dd if=/dev/zero of=/root/load bs=64k count=256 conv=fsync 2>/dev/null; done";
    guest.expect(&format!("nohup sh -c '{write}' >/dev/null 2>&1 & echo $! > /run/load"))?;
    println!("### Snapshots of a guest that writes and syncs without pause\n\n| guest held |\n| --- |");
    for _ in 0..3 {
        snapshot(api, vm)?;
        println!("| {} |", held(daemon, vm)?);
    }
    println!();
    guest.expect("kill $(cat /run/load); sleep 1; rm -f /root/load")?;
    guest.hang_up();
    Ok(())
}

/// As many as are asked for at once: namespaces, because what is measured is the daemon.
fn many(count: usize) -> Result<()> {
    let world = World::new()?;
    let daemon = start(&world, Driver::Netns)?;
    let api = daemon.client().sign_up("ada")?;
    let key = ssh::key(&world)?;
    let before = proportional_kib(daemon.pid())?;
    let began = Instant::now();
    for n in 0..count {
        api.create_vm(&format!("vm-{n}"), &key)?;
    }
    let called = began.elapsed().as_secs_f64();
    loop {
        let ready = api.get("/v1/vms?status_detail=ready&limit=100")?.expect(200)?;
        let pending = api.get("/v1/vms?status=failed&limit=1")?.expect(200)?;
        ensure!(pending["data"].as_array().is_some_and(Vec::is_empty), "one failed: {pending}");
        if ready["data"].as_array().is_some_and(|all| all.len() == count) {
            break;
        }
        thread::sleep(Duration::from_millis(100));
    }
    println!("## {count} namespace VMs side by side\n\n| | |\n| --- | --- |");
    println!("| all created (calls one after another) | {called:.1} s |");
    println!("| all ready | {:.1} s |", began.elapsed().as_secs_f64());
    println!(
        "| the daemon, for each VM | {:.0} KiB |",
        (proportional_kib(daemon.pid())? - before) / count as f64
    );
    Ok(())
}
