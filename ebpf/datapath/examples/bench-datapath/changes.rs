//! What many VMs cost: attaching, memory, and above all a change of rules, from the records until it is in force on every
//! tap.

use crate::{common::*, median};
use aya::maps::MapData;
use std::{
    collections::HashMap,
    os::fd::{AsFd as _, AsRawFd as _},
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use tapgate_datapath::Datapath;
use tapgate_model::{
    GuestNet, Mode, Rule, RuleId, RuleLayer, RuleSet, RuleTarget, UserId, VmId, VmPolicy,
    policy::SecretsOverHttp,
};
use tapgate_store::{
    CaPem, Capacity, Expected, NewRule, NewUser, NewVm, Resources, SealKey, SshPorts, Store,
};

const BAR: f64 = 50.0;
const RULES: u32 = 200;

pub fn measure(long: bool) {
    let (vms, rounds) = if long { (1000u32, 5) } else { (20, 2) };
    in_world(|world| async move {
        let folder = tempfile::tempdir().unwrap();
        let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
        let store = Store::open(&folder.path().join("db"), key).unwrap();
        let account = records(&store, &folder.path().join("db"), vms).await;
        let datapath = world.open().await;
        let before = memory(&world);
        let mut known: HashMap<VmId, Arc<VmPolicy>> = account.read(&store, None, HashMap::new()).await;
        let mut gates = Vec::new();
        // As VMs come one at a time: the first few, with time for a spare tap to be made in between.
        let (first, rest) = account.vms.split_at(10);
        let mut alone = Vec::new();
        for (vm, net) in first {
            tokio::time::sleep(Duration::from_millis(300)).await;
            let began = Instant::now();
            gates.push(datapath.attach_tap(vm, *net, &known[vm]).await.unwrap());
            alone.push(began.elapsed().as_secs_f64() * 1e3);
        }
        let began = Instant::now();
        for (vm, net) in rest {
            gates.push(datapath.attach_tap(vm, *net, &known[vm]).await.unwrap());
        }
        let attached = began.elapsed().as_secs_f64() * 1e3 / rest.len() as f64;

        println!("## Rule changes\n");
        println!(
            "{vms} VMs of one account with {RULES} rules of their own each and the account's {RULES} besides. Milliseconds from \
             the commit of the change until it is in force on every tap: reading the records included, the middle of \
             {rounds}.\n"
        );
        println!("| change | ms | bar |\n| --- | ---: | --- |");
        let mut times = [(); 4].map(|()| Vec::new());
        for round in 0..rounds {
            let added =
                store.rule_create(&account.user, None, cidr("198.51.100.0/24"), u32::MAX).await.unwrap();
            times[0].push(account.put(&store, &datapath, None, &mut known).await);
            store.rule_delete(&account.user, None, &added.id).await.unwrap();
            times[1].push(account.put(&store, &datapath, None, &mut known).await);
            let mode = if round % 2 == 0 { Mode::Warn } else { Mode::Enforce };
            store.policy_set(&account.user, mode, Expected::any()).await.unwrap();
            times[2].push(account.put(&store, &datapath, None, &mut known).await);
            let one = &account.vms[round as usize % account.vms.len()].0;
            store.rule_create(&account.user, Some(one), cidr("203.0.113.0/24"), u32::MAX).await.unwrap();
            times[3].push(account.put(&store, &datapath, Some(one), &mut known).await);
        }
        let names = [
            "a rule of the account's more, for all VMs",
            "a rule of the account's less, for all VMs",
            "the account's mode, for all VMs",
            "a rule of one VM's own more",
        ];
        for (name, times) in names.into_iter().zip(times) {
            row(name, median(times), true);
        }
        println!("\nThe kernel's part alone, where every VM has other rules of its own:\n");
        println!("| change | ms | bar |\n| --- | ---: | --- |");
        let all = |first: u32, more: bool| -> Vec<(GuestNet, VmPolicy)> {
            let own = |(vm, net): &(VmId, GuestNet)| {
                let texts = ranges(net.slot, first).chain(more.then(|| "198.51.100.0/24".to_owned()));
                let rules = texts.map(|text| Rule { id: RuleId::generate(), target: cidr(&text).target });
                let own = Arc::new(RuleLayer::new(rules));
                let known = &*known[vm];
                let rules = RuleSet::layered(own, Arc::clone(known.rules.account()));
                (*net, VmPolicy { rules, ..known.clone() })
            };
            account.vms.iter().map(own).collect()
        };
        let mut times = [(); 3].map(|()| Vec::new());
        for _ in 0..rounds {
            for (at, policies) in [all(0, true), all(0, false), all(1, false)].into_iter().enumerate() {
                let policies: Vec<_> = policies.iter().map(|(net, policy)| (*net, policy)).collect();
                let began = Instant::now();
                assert!(datapath.set_policies(&policies).iter().all(Result::is_ok));
                times[at].push(began.elapsed().as_secs_f64() * 1e3);
                // What it retired is removed before the next begins.
                tokio::time::sleep(Duration::from_millis(400)).await;
            }
            let back = all(0, false);
            let back: Vec<_> = back.iter().map(|(net, policy)| (*net, policy)).collect();
            datapath.set_policies(&back);
            tokio::time::sleep(Duration::from_millis(400)).await;
        }
        let names = [
            ("one rule more in each VM's own", true),
            ("one rule less in each VM's own", true),
            ("all rules of each VM's own replaced", false),
        ];
        for ((name, bar), times) in names.into_iter().zip(times) {
            row(name, median(times), bar);
        }

        println!("\n## Taps and memory\n\n| with {vms} taps | |\n| --- | ---: |");
        println!(
            "| attaching a tap, one VM at a time (the middle of {}) | {:.1} ms |",
            first.len(),
            median(alone)
        );
        println!("| attaching a tap, all one right after the other | {attached:.1} ms |");
        let after = memory(&world);
        println!("| maps in the kernel, empty | {:.1} MiB |", before.0 / 1024.0);
        println!("| maps in the kernel, a VM | {:.1} KiB |", (after.0 - before.0) / f64::from(vms));
        println!(
            "| this process, a VM (rules, descriptors; before {:.0} MiB) | {:.1} KiB |",
            before.1 / 1024.0,
            (after.1 - before.1) / f64::from(vms)
        );
        drop(datapath);
        let datapath = world.open().await;
        let began = Instant::now();
        for (vm, net) in &account.vms {
            datapath.adopt(vm, *net, &known[vm]).await.unwrap();
        }
        println!(
            "| adopting a tap after a restart | {:.1} ms |",
            began.elapsed().as_secs_f64() * 1e3 / f64::from(vms)
        );
        let began = Instant::now();
        datapath.teardown().await.unwrap();
        println!("| removing a tap | {:.1} ms |\n", began.elapsed().as_secs_f64() * 1e3 / f64::from(vms));
    });
}

/// An account's VMs in the records.
struct Account {
    user: UserId,
    vms: Vec<(VmId, GuestNet)>,
}

impl Account {
    async fn read(
        &self,
        store: &Store,
        vm: Option<&VmId>,
        known: HashMap<VmId, Arc<VmPolicy>>,
    ) -> HashMap<VmId, Arc<VmPolicy>> {
        let read = store.effective_policies(&self.user, vm, SecretsOverHttp::Never, known).await.unwrap();
        read.into_iter().map(|policy| (policy.vm.clone(), Arc::new(policy))).collect()
    }

    /// Puts in force what the records now say, as the engine does; answers the milliseconds that it took.
    async fn put(
        &self,
        store: &Store,
        datapath: &Datapath,
        vm: Option<&VmId>,
        known: &mut HashMap<VmId, Arc<VmPolicy>>,
    ) -> f64 {
        let began = Instant::now();
        let read = self.read(store, vm, known.clone()).await;
        let of_kernel: Vec<_> =
            self.vms.iter().filter_map(|(vm, net)| Some((*net, &**read.get(vm)?))).collect();
        assert!(datapath.set_policies(&of_kernel).iter().all(Result::is_ok));
        let took = began.elapsed().as_secs_f64() * 1e3;
        known.extend(read);
        took
    }
}

fn cidr(text: &str) -> NewRule {
    NewRule { name: None, target: RuleTarget::Cidr(text.parse().unwrap()), comment: None }
}

/// Ranges that no other VM has.
fn ranges(slot: u32, first: u32) -> impl Iterator<Item = String> {
    (first..first + RULES).map(move |n| format!("10.{}.{}.{}/32", 128 | slot >> 8, slot & 255, n & 255))
}

async fn records(store: &Store, folder: &Path, vms: u32) -> Account {
    let new = NewUser {
        first_name: "A".into(),
        last_name: "B".into(),
        email: "a@example.com".into(),
        password: "$argon2id$".into(),
    };
    let user = store.user_create(new, "CLI").await.unwrap().0.id;
    let mut rules: Vec<(Option<VmId>, String)> =
        (0..RULES).map(|n| (None, format!("10.1.{n}.0/24"))).collect();
    let mut made = Vec::new();
    for number in 0..vms {
        let new = NewVm {
            id: VmId::generate(),
            user: user.clone(),
            name: format!("vm-{number}"),
            public_key: "ssh-ed25519 AAAA".into(),
            snapshot: None,
            resources: Resources { vcpus: 1, memory_mib: 512, disk_bytes: 1 << 30 },
            ca: CaPem { cert: "cert".into(), key: String::from("key").into() },
            ssh_ports: SshPorts { range: 2200..=9999, is_free: std::sync::Arc::new(|_| true) },
            slots: 4096,
            quota: vms,
            capacity: Capacity::default(),
        };
        let record = store.vm_create(new).await.unwrap();
        rules.extend(ranges(record.slot, 0).map(|text| (Some(record.id.clone()), text)));
        made.push((record.id, net(record.slot)));
    }
    fill(folder, &user, &rules);
    Account { user, vms: made }
}

/// Writes the rules as `Store::rule_create` would, but all in one transaction: one synced to disk for each of 200,000
/// would take longer than everything that is measured.
fn fill(folder: &Path, user: &UserId, rules: &[(Option<VmId>, String)]) {
    let mut connection = rusqlite::Connection::open(folder.join("tapgate.db")).unwrap();
    let transaction = connection.transaction().unwrap();
    let insert = "INSERT INTO rules (id, user, vm, cidr, created_at) VALUES (?1, ?2, ?3, ?4, 0)";
    let mut statement = transaction.prepare(insert).unwrap();
    for (vm, range) in rules {
        let vm = vm.as_ref().map(VmId::as_str);
        statement.execute((RuleId::generate().as_str(), user.as_str(), vm, range)).unwrap();
    }
    drop(statement);
    transaction.commit().unwrap();
}

/// KiB of the maps, by what the kernel says of their descriptors, and of this process.
fn memory(world: &World) -> (f64, f64) {
    let field = |file: &str, name: &str| -> f64 {
        let text = std::fs::read_to_string(file).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    let folder = world.pins().join(format!("maps-{}", tapgate_ebpf_common::maps::VERSION));
    let maps = std::fs::read_dir(folder).unwrap().map(|entry| {
        let map = MapData::from_pin(entry.unwrap().path()).unwrap();
        field(&format!("/proc/self/fdinfo/{}", map.fd().as_fd().as_raw_fd()), "memlock:") / 1024.0
    });
    (maps.sum(), field("/proc/self/status", "VmRSS:"))
}

fn row(name: &str, milliseconds: f64, bar: bool) {
    let verdict = match (bar, milliseconds < BAR) {
        (false, _) => String::new(),
        (true, true) => format!("under {BAR}: met"),
        (true, false) => format!("under {BAR}: missed by {:.1}", milliseconds - BAR),
    };
    println!("| {name} | {milliseconds:.1} | {verdict} |");
}
