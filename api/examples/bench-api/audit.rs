//! The audit log: how many events a second it takes for long, and how long a page of every combination of filters takes, with
//! events that make it hard: one VM with nearly all, values that occur once or never, filters that never meet.

use crate::bar;
use std::net::Ipv4Addr;
use std::time::{Duration, Instant};
use tapgate_model::{
    AuditEvent, AuditSink as _, HostName, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy,
};
use tapgate_store::{AuditFilter, AuditLog, Order, PageRequest, SealKey, Store};

/// Events that wait at most while the log is filled: it is to be busy, not to drop.
const AHEAD: u64 = 16_000;
const USERS: usize = 10;
const VMS: usize = 100;
const HOSTS: usize = 1000;
const BAR_INGEST: f64 = 100_000.0;
const BAR_PAGE: Duration = Duration::from_millis(20);
const PAGE: u32 = 50;
/// How often each page is asked for.
const TIMES: usize = 3;
/// One page in so many is compared with what a scan of everything says.
const COMPARED: usize = 97;

/// Numbers without a pattern that filters could fall in with.
struct Random(u64);

impl Random {
    fn below(&mut self, most: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % most
    }
}

/// What an event of the largest account had, to compare pages with.
struct Sample {
    ts: i64,
    vm: u8,
    host: u16,
    address: u32,
    outcome: (bool, bool),
    mode: Mode,
    protocol: Protocol,
}

/// No host; a host that occurs once.
const NONE: u16 = u16::MAX;
const ONCE: u16 = HOSTS as u16;

struct Fill {
    policies: Vec<VmPolicy>,
    hosts: Vec<HostName>,
    random: Random,
    samples: Vec<Sample>,
}

impl Fill {
    fn new() -> Self {
        let users: Vec<UserId> = (0..USERS).map(|_| UserId::generate()).collect();
        let policy = |n: usize| VmPolicy {
            vm: VmId::generate(),
            user: users[n % USERS].clone(),
            generation: 1,
            mode: Mode::Enforce,
            rules: Default::default(),
            secrets: [].into(),
            secrets_over_http: Default::default(),
        };
        let name = |n: usize| format!("host{n}.example.com").parse().unwrap();
        let hosts = (0..HOSTS).map(name).chain(["once.example.com".parse().unwrap()]).collect();
        Self { policies: (0..VMS).map(policy).collect(), hosts, random: Random(7), samples: Vec::new() }
    }

    /// Half of all events are one account's, and nine tenths of those one VM's. A tenth of all name host 0 and go to
    /// 198.18.0.0/16, where nothing else of the largest account goes; the first event alone is ICMP and names its host.
    fn event(&mut self, n: u32) -> AuditEvent {
        let random = &mut self.random;
        let first = n == 0;
        let at = match (random.below(2), random.below(10)) {
            _ if first => USERS,
            (0, 0) => random.below(VMS) / USERS * USERS,
            (0, _) => 0,
            (_, _) => random.below(VMS),
        };
        let warn = random.below(7) == 0;
        let outcome = match random.below(10) {
            _ if first => (false, false),
            0..=6 => (true, true),
            7 if warn => (false, true),
            _ => (false, false),
        };
        let verdict = match outcome {
            (true, _) => Verdict::Allow { rule: None, reason: Reason::Host },
            (_, true) => Verdict::Tolerate { reason: Reason::NoRule },
            _ => Verdict::Deny { reason: Reason::NoRule },
        };
        let protocol = match random.below(5) {
            _ if first => Protocol::Icmp,
            n => [Protocol::Tls, Protocol::Http, Protocol::Tcp, Protocol::Dns, Protocol::Udp][n],
        };
        let crowd = random.below(10) == 0;
        let host = match random.below(5) {
            _ if first => ONCE,
            _ if crowd => 0,
            0 => NONE,
            _ => 1 + random.below(HOSTS - 1) as u16,
        };
        let address = if crowd { 0xc612_0000 } else { 0xc613_0000 } + random.below(65_536) as u32;
        let mut event = AuditEvent::new(&self.policies[at], protocol, verdict, i64::from(n) * 100);
        event.mode = if warn { Mode::Warn } else { Mode::Enforce };
        event.host = self.hosts.get(usize::from(host)).cloned();
        event.address = Some(Ipv4Addr::from(address).into());
        // Each another, so that none is counted on another.
        event.port = Some((n % 65_521) as u16);
        if at.is_multiple_of(USERS) {
            let (ts, mode, vm) = (event.timestamp_us, event.mode, at as u8);
            self.samples.push(Sample { ts, vm, host, address, outcome, mode, protocol });
        }
        event
    }
}

/// Fills the log and reads it.
pub fn measure(count: u32) {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
    let store = Store::open(&folder.path().join("db"), key).unwrap();
    let log = store.audit();
    let mut fill = Fill::new();
    let start = Instant::now();
    let (mut since, mut slowest) = (start, f64::MAX);
    for n in 0..count {
        if n % 512 == 0 {
            while log.load().waiting > AHEAD {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        log.record(fill.event(n));
        if (n + 1) % 1_000_000 == 0 {
            slowest = slowest.min(1e6 / since.elapsed().as_secs_f64());
            since = Instant::now();
        }
    }
    runtime.block_on(log.flush());
    let rate = f64::from(count) / start.elapsed().as_secs_f64();
    let load = log.load();
    let file = folder.path().join("db/audit.db");
    let octets = std::fs::metadata(&file).unwrap().len();
    println!("| what | measured | bar | met |\n| --- | --- | --- | --- |");
    let what = format!("audit events a second, {count} in a row, making them included");
    bar(&what, &format!("{rate:.0}"), "100,000", rate >= BAR_INGEST);
    if slowest < f64::MAX {
        let met = slowest >= BAR_INGEST;
        bar("the same, the slowest million of them", &format!("{slowest:.0}"), "100,000", met);
    }
    println!(
        "\n{} events were dropped, {} aggregated; the file has {} MiB, {} octets an event.\n",
        load.dropped,
        load.aggregated,
        octets >> 20,
        octets / u64::from(count)
    );
    runtime.block_on(pages(log, &fill, count));
}

/// What one question asks.
#[derive(Clone, Copy)]
struct Asked {
    vm: Option<usize>,
    denied: bool,
    passed: bool,
    warn: bool,
    host: Option<(&'static str, u16)>,
    cidr: Option<&'static str>,
    protocol: Option<Protocol>,
    since: bool,
    until: bool,
    order: Order,
}

const VMS_ASKED: [Option<usize>; 3] = [None, Some(0), Some(USERS)];
const HOSTS_ASKED: [Option<(&str, u16)>; 4] = [
    None,
    Some(("host0.example.com", 0)),
    Some(("host49.example.com", 49)),
    Some(("once.example.com", ONCE)),
];
/// A range without the crowd's host, one that only the crowd is in, a narrow one, an address, and one that nothing is in.
const RANGES: [Option<&str>; 6] = [
    None,
    Some("198.19.0.0/16"),
    Some("198.18.0.0/16"),
    Some("198.19.4.0/22"),
    Some("198.19.7.7/32"),
    Some("10.0.0.0/8"),
];
const PROTOCOLS: [Option<Protocol>; 3] = [None, Some(Protocol::Tls), Some(Protocol::Icmp)];

fn questions() -> Vec<Asked> {
    let mut all = Vec::new();
    for bits in 0..64u8 {
        let on = |bit: u8| bits & (1 << bit) != 0;
        let order = if on(5) { Order::Asc } else { Order::Desc };
        for (vm, host) in VMS_ASKED.into_iter().flat_map(|vm| HOSTS_ASKED.map(|host| (vm, host))) {
            for (cidr, protocol) in RANGES.into_iter().flat_map(|cidr| PROTOCOLS.map(|p| (cidr, p))) {
                let (denied, passed, warn, since, until) = (on(0), on(1), on(2), on(3), on(4));
                all.push(Asked { vm, denied, passed, warn, host, cidr, protocol, since, until, order });
            }
        }
    }
    all
}

impl Asked {
    fn filter(&self, fill: &Fill, span: i64) -> AuditFilter {
        AuditFilter {
            vm: self.vm.map(|vm| fill.policies[vm].vm.clone()),
            rule_allows: self.denied.then_some(false),
            passed: self.passed.then_some(true),
            mode: self.warn.then_some(Mode::Warn),
            host: self.host.map(|(name, _)| name.into()),
            cidr: self.cidr.map(|cidr| cidr.parse().unwrap()),
            protocol: self.protocol,
            since_us: self.since.then_some(span / 3),
            until_us: self.until.then_some(span / 3 * 2),
            page: PageRequest { limit: PAGE, cursor: None, order: self.order },
        }
    }

    /// The times of the events of the page, found by looking at everything.
    fn scan(&self, fill: &Fill, filter: &AuditFilter) -> Vec<i64> {
        let fits = |s: &&Sample| {
            self.vm.is_none_or(|vm| vm == usize::from(s.vm))
                && (!self.denied || !s.outcome.0)
                && (!self.passed || s.outcome.1)
                && (!self.warn || s.mode == Mode::Warn)
                && self.host.is_none_or(|(_, host)| host == s.host)
                && filter.cidr.is_none_or(|cidr| cidr.contains(Ipv4Addr::from(s.address).into()))
                && self.protocol.is_none_or(|protocol| protocol == s.protocol)
                && filter.since_us.is_none_or(|since| s.ts > since)
                && filter.until_us.is_none_or(|until| s.ts < until)
        };
        let most = PAGE as usize;
        match self.order {
            Order::Asc => fill.samples.iter().filter(fits).map(|s| s.ts).take(most).collect(),
            Order::Desc => fill.samples.iter().rev().filter(fits).map(|s| s.ts).take(most).collect(),
        }
    }

    fn shown(&self) -> String {
        let order = if self.order == Order::Asc { "oldest first" } else { "newest first" };
        let mut words = vec![order.to_owned()];
        let mut add = |on: bool, word: &str| words.extend(on.then(|| word.to_owned()));
        add(self.vm == Some(0), "vm of 90 %");
        add(self.vm.is_some_and(|vm| vm > 0), "vm of 1 %");
        add(self.denied, "verdict");
        add(self.passed, "allowed");
        add(self.warn, "mode");
        add(self.since, "since");
        add(self.until, "until");
        words.extend(self.host.map(|(name, _)| name.split('.').next().unwrap().to_owned()));
        words.extend(self.cidr.map(Into::into));
        words.extend(self.protocol.map(|protocol| format!("{protocol:?}").to_lowercase()));
        words.join(", ")
    }
}

/// What one page cost: in the middle of three, the first time, and how many events it had.
struct Cost {
    typical: Duration,
    first: Duration,
    found: usize,
    name: String,
}

async fn time(
    log: &AuditLog,
    user: &UserId,
    filter: &AuditFilter,
    name: String,
) -> (Cost, Vec<(i64, String)>) {
    let mut times = Vec::new();
    let mut found = Vec::new();
    for _ in 0..TIMES {
        let start = Instant::now();
        let page = log.list(user, filter.clone()).await.unwrap();
        times.push(start.elapsed());
        found = page.items.into_iter().map(|event| (event.timestamp_us, event.id.into())).collect();
    }
    // The first is the one that has to fetch from the file.
    let first = times[0];
    times.sort_unstable();
    (Cost { typical: times[TIMES / 2], first, found: found.len(), name }, found)
}

/// A page of every combination of filters, both orders, of the largest account; the last pages by a cursor too.
async fn pages(log: &AuditLog, fill: &Fill, count: u32) {
    let user = &fill.policies[0].user;
    let span = i64::from(count) * 100;
    let (mut all, mut compared): (Vec<Cost>, usize) = (Vec::new(), 0);
    for (number, asked) in questions().into_iter().enumerate() {
        let filter = asked.filter(fill, span);
        let (cost, found) = time(log, user, &filter, asked.shown()).await;
        all.push(cost);
        if number % COMPARED == 0 {
            let times: Vec<i64> = found.iter().map(|(ts, _)| *ts).collect();
            assert_eq!(times, asked.scan(fill, &filter), "{}", asked.shown());
            compared += 1;
        }
        // From the last event of the first page oldest first, the last page newest first.
        if let (Order::Asc, Some((_, id))) = (asked.order, found.last()) {
            let mut filter = filter;
            filter.page = PageRequest { cursor: Some(id.clone()), order: Order::Desc, ..filter.page };
            let (cost, last) = time(log, user, &filter, format!("last page of: {}", asked.shown())).await;
            assert!(last.iter().eq(found.iter().rev().skip(1)), "{}", cost.name);
            all.push(cost);
        }
    }
    all.sort_unstable_by_key(|cost| cost.typical);
    println!(
        "Pages of {PAGE} of the largest account's events, {} combinations of filters and places, each {TIMES} times; {compared} of \
         them compared with a scan of everything, the last pages with the first ones:\n",
        all.len()
    );
    println!("| filters | found | median | first time |\n| --- | --- | --- | --- |");
    let late: Vec<&Cost> = all.iter().filter(|cost| cost.first >= BAR_PAGE).collect();
    let slowest = all.iter().rev().take(6).chain([&all[all.len() / 2]]);
    // What was late once is named: whether it is the same the next time tells the question from the machine.
    let once = late.iter().copied().filter(|cost| cost.typical < BAR_PAGE).take(12);
    for cost in slowest.chain(once) {
        println!(
            "| {} | {} | {:.2} ms | {:.2} ms |",
            cost.name,
            cost.found,
            ms(cost.typical),
            ms(cost.first)
        );
    }
    let worst = all.last().unwrap().typical;
    let first = all.iter().map(|cost| cost.first).max().unwrap();
    println!("\n| what | measured | bar | met |\n| --- | --- | --- | --- |");
    bar("slowest page, median of three", &format!("{:.2} ms", ms(worst)), "20 ms", worst < BAR_PAGE);
    let what = format!("slowest page, first time ({} of {} over the bar)", late.len(), all.len());
    bar(&what, &format!("{:.2} ms", ms(first)), "20 ms", first < BAR_PAGE);
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}
