//! How many audit events a second are written, and how long a page of each filter takes.
//!
//! `cargo run --release -p tapgate-store --example audit_bench -- FOLDER EVENTS`

use std::time::Instant;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};
use tapgate_store::{AuditFilter, Order, PageRequest, SealKey, Store};

fn events() -> AuditFilter {
    AuditFilter {
        vm: None,
        rule_allows: None,
        passed: None,
        mode: None,
        host: None,
        cidr: None,
        protocol: None,
        since_us: None,
        until_us: None,
        page: PageRequest { limit: 50, cursor: None, order: Order::Desc },
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let folder: std::path::PathBuf = args.next().ok_or("which folder?")?.into();
    let count: u32 = args.next().ok_or("how many events?")?.parse()?;
    let store = Store::open(&folder, SealKey::load_or_create(&folder.with_extension("key"))?)?;
    let log = store.audit();
    let users: Vec<UserId> = (0..10).map(|_| UserId::generate()).collect();
    let policies: Vec<VmPolicy> = (0..100)
        .map(|n| VmPolicy {
            vm: VmId::generate(),
            user: users[n % users.len()].clone(),
            generation: 1,
            mode: Mode::Enforce,
            rules: Default::default(),
            secrets: [].into(),
            secrets_over_http: Default::default(),
        })
        .collect();
    let hosts: Result<Vec<tapgate_model::HostName>, _> =
        (0..1000).map(|n| format!("host{n}.example.com").parse()).collect();
    let hosts = hosts?;
    let start = Instant::now();
    for n in 0..count {
        let at = n as usize;
        // One in a million is denied: the filter that a scan would take longest for.
        let verdict = match n % 1_000_000 {
            7 => Verdict::Deny { reason: Reason::NoRule },
            _ => Verdict::Allow { rule: None, reason: Reason::Host },
        };
        let policy = &policies[at % policies.len()];
        let mut event = AuditEvent::new(policy, Protocol::Tls, verdict, i64::from(n) * 100);
        event.host = Some(hosts[at * 7 % hosts.len()].clone());
        event.address = Some(std::net::Ipv4Addr::from(0xc000_0200 + n % 4096).into());
        log.record(event);
        // A sustained load waits for the writer rather than dropping: some events in flight at a time.
        if n % 4096 == 4095 {
            log.flush().await;
        }
    }
    log.flush().await;
    let took = start.elapsed();
    println!("{count} events in {took:.1?}: {:.0} a second", f64::from(count) / took.as_secs_f64());

    let user = users[7 % users.len()].clone();
    let middle = i64::from(count) * 50;
    let filters = [
        ("none", events()),
        (
            "oldest first",
            AuditFilter { page: PageRequest { order: Order::Asc, ..events().page }, ..events() },
        ),
        ("denied", AuditFilter { rule_allows: Some(false), ..events() }),
        ("vm", AuditFilter { vm: Some(policies[7].vm.clone()), ..events() }),
        (
            "vm, denied",
            AuditFilter { vm: Some(policies[7].vm.clone()), rule_allows: Some(false), ..events() },
        ),
        ("host", AuditFilter { host: Some("host49.example.com".into()), ..events() }),
        ("address", AuditFilter { cidr: Some("192.0.2.7/32".parse()?), ..events() }),
        ("range", AuditFilter { cidr: Some("192.0.2.0/28".parse()?), ..events() }),
        ("every address", AuditFilter { cidr: Some("0.0.0.0/0".parse()?), ..events() }),
        ("tcp", AuditFilter { protocol: Some(Protocol::Tcp), ..events() }),
        ("until the middle", AuditFilter { until_us: Some(middle), ..events() }),
    ];
    for (name, filter) in filters {
        let mut times = Vec::new();
        let mut found = 0;
        for _ in 0..20 {
            let start = Instant::now();
            found = log.list(&user, filter.clone()).await?.items.len();
            times.push(start.elapsed());
        }
        times.sort();
        println!("{name:18} {found:3} events  p50 {:>9.2?}  worst {:>9.2?}", times[10], times[19]);
    }
    Ok(())
}
