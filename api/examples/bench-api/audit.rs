//! The audit log: how many events a second it takes for long, and how long a page of every combination of filters takes.

use crate::bar;
use std::time::{Duration, Instant};
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};
use tapgate_store::{AuditFilter, AuditLog, Order, PageRequest, SealKey, Store};

/// Events that wait at most while the log is filled: it is to be busy, not to drop.
const AHEAD: u64 = 24_000;
const USERS: usize = 10;
const VMS: usize = 100;
const HOSTS: usize = 1000;
const BAR_INGEST: f64 = 100_000.0;
const BAR_PAGE: Duration = Duration::from_millis(20);

/// Numbers without a pattern that filters could fall in with.
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }
}

fn policies() -> Vec<VmPolicy> {
    let users: Vec<UserId> = (0..USERS).map(|_| UserId::generate()).collect();
    let policy = |n: usize| VmPolicy {
        vm: VmId::generate(),
        user: users[n % USERS].clone(),
        generation: 1,
        mode: if n.is_multiple_of(7) { Mode::Warn } else { Mode::Enforce },
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    (0..VMS).map(policy).collect()
}

/// Half of all events are one account's: what is listed must be quick for the largest.
fn event(
    policies: &[VmPolicy],
    hosts: &[tapgate_model::HostName],
    random: &mut Random,
    n: u32,
) -> AuditEvent {
    let largest = random.below(2) == 0;
    let at = random.below(VMS);
    let policy = &policies[if largest { at / USERS * USERS } else { at }];
    // One in a hundred thousand is an ICMP packet that was denied: a scan would find it last.
    let rare = random.below(100_000) == 0;
    let verdict = match random.below(10) {
        _ if rare => Verdict::Deny { reason: Reason::NoRule },
        0..=6 => Verdict::Allow { rule: None, reason: Reason::Host },
        7 if policy.mode == Mode::Warn => Verdict::Tolerate { reason: Reason::NoRule },
        _ => Verdict::Deny { reason: Reason::NoRule },
    };
    let protocol =
        [Protocol::Tls, Protocol::Http, Protocol::Tcp, Protocol::Dns, Protocol::Udp][random.below(5)];
    let protocol = if rare { Protocol::Icmp } else { protocol };
    let mut event = AuditEvent::new(policy, protocol, verdict, i64::from(n) * 100);
    event.host = (random.below(5) > 0).then(|| hosts[random.below(HOSTS)].clone());
    event.address = (random.below(4) > 0)
        .then(|| std::net::Ipv4Addr::from(0xc612_0000 + random.below(131_072) as u32).into());
    event.port = Some(443);
    event
}

/// Fills the log and reads it.
pub fn measure(count: u32) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
    let store = Store::open(&folder.path().join("db"), key).unwrap();
    let log = store.audit();
    let policies = policies();
    let hosts: Vec<tapgate_model::HostName> =
        (0..HOSTS).map(|n| format!("host{n}.example.com").parse().unwrap()).collect();
    let mut random = Random(7);
    let start = Instant::now();
    for n in 0..count {
        if n % 512 == 0 {
            while log.load().waiting > AHEAD {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        log.record(event(&policies, &hosts, &mut random, n));
    }
    runtime.block_on(log.flush());
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    let load = log.load();
    let mib = std::fs::metadata(folder.path().join("db/audit.db")).unwrap().len() >> 20;
    println!("| what | measured | bar | met |\n| --- | --- | --- | --- |");
    let what = format!("audit events a second, {count} in a row, making them included");
    bar(&what, &format!("{rate:.0}"), "100,000", rate >= BAR_INGEST);
    println!(
        "\n{} events were dropped, {} aggregated; the file has {mib} MiB.\n",
        load.dropped, load.aggregated
    );
    runtime.block_on(pages(log, &policies, count));
}

/// A page of every combination of filters, both orders, of the largest account; each five times.
async fn pages(log: &AuditLog, policies: &[VmPolicy], count: u32) {
    let user = policies[0].user.clone();
    let span = i64::from(count) * 100;
    let mut all: Vec<(Duration, Duration, String, usize)> = Vec::new();
    for bits in 0..2048u32 {
        let on = |bit: u32| bits & (1 << bit) != 0;
        if on(9) && !on(5) || on(10) && !on(6) {
            continue;
        }
        for order in [Order::Desc, Order::Asc] {
            let filter = AuditFilter {
                vm: on(0).then(|| policies[0].vm.clone()),
                rule_allows: on(1).then_some(false),
                passed: on(2).then_some(true),
                mode: on(3).then_some(Mode::Warn),
                host: on(4).then(|| "host49.example.com".into()),
                cidr: on(5).then(|| if on(9) { "198.18.7.7/32" } else { "198.18.0.0/22" }.parse().unwrap()),
                protocol: on(6).then_some(if on(10) { Protocol::Icmp } else { Protocol::Tls }),
                since_us: on(7).then_some(span / 3),
                until_us: on(8).then_some(span / 3 * 2),
                page: PageRequest { limit: 50, cursor: None, order },
            };
            let mut found = 0;
            let mut times = Vec::new();
            for _ in 0..5 {
                let start = Instant::now();
                found = log.list(&user, filter.clone()).await.unwrap().items.len();
                times.push(start.elapsed());
            }
            // The first is the one that has to fetch from the file.
            let first = times[0];
            times.sort_unstable();
            all.push((times[2], first, shown(&filter), found));
        }
    }
    all.sort_unstable();
    let (median, worst) = (&all[all.len() / 2], &all[all.len() - 1]);
    println!(
        "Pages of 50 of the largest account's events, {} combinations of filters, each five times:\n",
        all.len()
    );
    println!("| filters | found | median | first time |\n| --- | --- | --- | --- |");
    for (typical, first, name, found) in all.iter().rev().take(5).chain([median]) {
        println!("| {name} | {found} | {:.2} ms | {:.2} ms |", ms(*typical), ms(*first));
    }
    let first = all.iter().map(|(_, first, ..)| *first).max().unwrap();
    let missed = all.iter().filter(|(typical, ..)| *typical >= BAR_PAGE).count();
    println!("\n| what | measured | bar | met |\n| --- | --- | --- | --- |");
    bar("slowest page, median of five", &format!("{:.2} ms", ms(worst.0)), "20 ms", missed == 0);
    bar("slowest page, first time", &format!("{:.2} ms", ms(first)), "20 ms", first < BAR_PAGE);
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn shown(filter: &AuditFilter) -> String {
    let mut words = vec![if filter.page.order == Order::Asc {
        "oldest first".to_owned()
    } else {
        "newest first".to_owned()
    }];
    let mut add = |word: Option<String>| words.extend(word);
    add(filter.vm.as_ref().map(|_| "vm".into()));
    add(filter.rule_allows.map(|_| "verdict".into()));
    add(filter.passed.map(|_| "allowed".into()));
    add(filter.mode.map(|_| "mode".into()));
    add(filter.host.as_ref().map(|_| "host".into()));
    add(filter.cidr.map(|cidr| if cidr.prefix_len() == 32 { "address".into() } else { "range".into() }));
    add(filter.protocol.map(|protocol| format!("{protocol:?}").to_lowercase()));
    add(filter.since_us.map(|_| "since".into()));
    add(filter.until_us.map(|_| "until".into()));
    words.join(", ")
}
