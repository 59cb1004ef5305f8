//! Pages over many blocks of the log's index, with events out of order and values that hardly ever occur: every page whole and right.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use std::net::IpAddr;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};
use tapgate_store::*;

const EVENTS: i64 = 36_000;
const LIMIT: usize = 40;

/// What the tests compare by.
#[derive(Clone)]
struct Sample {
    ts: i64,
    seq: i64,
    vm: VmId,
    denied: bool,
    protocol: Protocol,
    host: Option<String>,
    address: Option<IpAddr>,
}

/// One VM makes nine tenths; the first event is the only ICMP, the only one of its host and of its address; `a.example` and
/// 192.0.2.0/25 never meet, though each is a third; the clock goes back by a minute now and then, and once by two hours.
fn sample(vms: &[VmId], n: i64) -> Sample {
    let back = if n / 1000 % 7 == 3 { 60_000_000 } else { 0 };
    let far = if n == 20_000 { 7_200_000_000 } else { 0 };
    let third = n % 3;
    Sample {
        ts: 10_000_000_000 + n / 2 * 1_000 - back - far,
        seq: n + 1,
        vm: vms[if n % 10 == 0 { 1 + usize::try_from(n / 10 % 3).unwrap() } else { 0 }].clone(),
        denied: n % 4 == 1,
        protocol: if n == 0 {
            Protocol::Icmp
        } else {
            [Protocol::Tls, Protocol::Http][usize::try_from(n / 5 % 2).unwrap()]
        },
        host: match third {
            _ if n == 0 => Some("first.example".into()),
            0 => Some("a.example".into()),
            1 => Some(format!("h{}.example", n % 500)),
            _ => None,
        },
        address: match third {
            _ if n == 0 => Some("2001:db8::7".parse().unwrap()),
            1 => Some(IpAddr::from([192, 0, 2, u8::try_from(n % 128).unwrap()])),
            2 => Some(IpAddr::from([198, 51, 100, u8::try_from(n % 256).unwrap()])),
            _ => None,
        },
    }
}

fn event(user: &UserId, sample: &Sample) -> AuditEvent {
    let policy = VmPolicy {
        vm: sample.vm.clone(),
        user: user.clone(),
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    let verdict = match sample.denied {
        true => Verdict::Deny { reason: Reason::NoRule },
        false => Verdict::Allow { rule: None, reason: Reason::Host },
    };
    let mut event = AuditEvent::new(&policy, sample.protocol, verdict, sample.ts);
    event.host = sample.host.as_ref().map(|host| host.parse().unwrap());
    event.address = sample.address;
    event.path = Some(format!("/{}", sample.seq));
    event
}

async fn fill(store: &Store, user: &UserId, vms: &[VmId], from: i64, to: i64) -> Vec<Sample> {
    let mut all = Vec::new();
    for n in from..to {
        let sample = sample(vms, n);
        store.audit().record(event(user, &sample));
        all.push(sample);
        // Steps of different sizes, so that small blocks are made and joined.
        if n % 1_500 == 0 || n % 3_300 == 0 {
            store.audit().flush().await;
        }
    }
    store.audit().flush().await;
    all
}

/// What is left when a VM's oldest events are gone.
fn without_oldest(all: &[Sample], vm: &VmId, mut count: usize) -> Vec<Sample> {
    let mut stays = |sample: &&Sample| {
        let goes = sample.vm == *vm && count > 0;
        count -= usize::from(goes);
        !goes
    };
    all.iter().filter(|sample| stays(sample)).cloned().collect()
}

fn blank(order: Order) -> AuditFilter {
    AuditFilter::all(PageRequest { limit: u32::try_from(LIMIT).unwrap(), cursor: None, order })
}

/// The pages of a filter are whole, but for the last, and hold what a scan would find. At most so many pages.
async fn check(
    log: &AuditLog,
    user: &UserId,
    all: &[Sample],
    mut filter: AuditFilter,
    pages: usize,
) -> usize {
    let wanted = |s: &&Sample| {
        filter.vm.as_ref().is_none_or(|vm| *vm == s.vm)
            && filter.rule_allows.is_none_or(|want| want != s.denied)
            && filter.host.as_ref().is_none_or(|want| Some(want) == s.host.as_ref())
            && filter.cidr.is_none_or(|want| s.address.is_some_and(|a| want.contains(a)))
            && filter.protocol.is_none_or(|want| want == s.protocol)
            && filter.since_us.is_none_or(|want| s.ts > want)
            && filter.until_us.is_none_or(|want| s.ts < want)
    };
    let mut expected: Vec<_> = all.iter().filter(wanted).map(|s| (s.ts, s.seq)).collect();
    expected.sort_unstable();
    if filter.page.order == Order::Desc {
        expected.reverse();
    }
    let found = expected.len();
    for (at, page) in
        expected.chunks(LIMIT).chain([&[][..]].into_iter().filter(|_| found == 0)).enumerate().take(pages)
    {
        let got = log.list(user, filter.clone()).await.unwrap();
        let seen: Vec<i64> =
            got.items.iter().map(|r| r.path.as_deref().unwrap()[1..].parse().unwrap()).collect();
        let wanted: Vec<i64> = page.iter().map(|(_, seq)| *seq).collect();
        assert_eq!(seen, wanted, "page {at} of {filter:?}");
        let last = (at + 1) * LIMIT >= found;
        assert_eq!(got.cursor.is_none(), last, "page {at} of {filter:?}");
        filter.page.cursor = got.cursor;
    }
    found
}

async fn check_all(log: &AuditLog, user: &UserId, vms: &[VmId], all: &[Sample], pages: usize) {
    let hosts = [None, Some("a.example"), Some("first.example"), Some("h7.example"), Some("never.example")];
    let ranges = [
        None,
        Some("192.0.2.0/25"),
        Some("0.0.0.0/0"),
        Some("2001:db8::/32"),
        Some("192.0.2.5/32"),
        Some("10.0.0.0/8"),
    ];
    let (mut asked, mut empty) = (0, 0);
    for order in [Order::Asc, Order::Desc] {
        for (vm, host) in [None, Some(0), Some(2)].into_iter().flat_map(|vm| hosts.map(|host| (vm, host))) {
            for (range, bits) in ranges.into_iter().flat_map(|range| (0..16u8).map(move |bits| (range, bits)))
            {
                let filter = AuditFilter {
                    vm: vm.map(|vm: usize| vms[vm].clone()),
                    host: host.map(Into::into),
                    cidr: range.map(|range: &str| range.parse().unwrap()),
                    rule_allows: (bits & 1 != 0).then_some(false),
                    protocol: (bits & 2 != 0).then_some(if bits & 8 != 0 {
                        Protocol::Icmp
                    } else {
                        Protocol::Tls
                    }),
                    since_us: (bits & 4 != 0).then_some(10_000_000_000 + 3_500_000),
                    until_us: (bits & 12 == 12).then_some(10_000_000_000 + 12_000_000),
                    ..blank(order)
                };
                asked += 1;
                empty += usize::from(check(log, user, all, filter, pages).await == 0);
            }
        }
    }
    assert!(empty > 100 && asked - empty > 100, "{empty} of {asked} questions had no answer");
}

#[tokio::test]
async fn pages_over_many_blocks_are_whole_and_right() {
    let (folder, store) = fresh();
    let (user, other) = (UserId::generate(), UserId::generate());
    let vms: Vec<VmId> = (0..4).map(|_| VmId::generate()).collect();
    let all = fill(&store, &user, &vms, 0, EVENTS).await;
    check_all(store.audit(), &user, &vms, &all, 3).await;
    // All pages of some, to the last by the cursor, both ways.
    for order in [Order::Asc, Order::Desc] {
        assert_eq!(check(store.audit(), &user, &all, blank(order), usize::MAX).await, all.len());
        let few = AuditFilter { vm: Some(vms[1].clone()), ..blank(order) };
        assert!(check(store.audit(), &user, &all, few, usize::MAX).await > 1_000);
    }
    // Another account sees nothing of it, whatever it names.
    let theirs = AuditFilter { vm: Some(vms[0].clone()), ..blank(Order::Desc) };
    store.audit().record(event(&other, &Sample { vm: VmId::generate(), ..sample(&vms, 5) }));
    store.audit().flush().await;
    assert_eq!(store.audit().list(&other, theirs).await.unwrap().items.len(), 0);
    assert_eq!(store.audit().list(&other, blank(Order::Desc)).await.unwrap().items.len(), 1);

    // What retention removed from the largest VM, and in the middle of a block, is gone from every page, and the chain holds.
    let keep = Keep { since_us: i64::MIN, events: 30_000, octets: u64::MAX };
    assert_eq!(store.audit().retain(keep).await.unwrap(), 6_001);
    let left = &without_oldest(&all, &vms[0], 6_001);
    check_all(store.audit(), &user, &vms, left, 2).await;
    assert_eq!(store.audit().verify().await.unwrap(), Ok(30_000));
    drop(store);
    // An index that is gone is made anew, and the log goes on where it was.
    let db = rusqlite::Connection::open(folder.path().join("db/audit.db")).unwrap();
    db.execute_batch("DELETE FROM terms; DELETE FROM blocks").unwrap();
    drop(db);
    let store = open(folder.path());
    check_all(store.audit(), &user, &vms, left, 1).await;
    // Into the blocks after: what was trimmed, joined and written anew is one log.
    let mut all = left.clone();
    let more = fill(&store, &user, &vms, EVENTS, EVENTS + 20_000).await;
    all.extend(more);
    for order in [Order::Asc, Order::Desc] {
        let some = AuditFilter { host: Some("a.example".into()), rule_allows: Some(false), ..blank(order) };
        check(store.audit(), &user, &all, some, usize::MAX).await;
    }
    assert_eq!(store.audit().verify().await.unwrap(), Ok(50_000));
}

/// Events that someone cut off the end are missed by `verify`; those that come after are found by every question all the same.
#[tokio::test]
async fn a_log_that_was_cut_is_told_and_goes_on() {
    let (folder, store) = fresh();
    let user = UserId::generate();
    let vms: Vec<VmId> = (0..4).map(|_| VmId::generate()).collect();
    let mut all = fill(&store, &user, &vms, 0, 20_000).await;
    drop(store);
    let db = rusqlite::Connection::open(folder.path().join("db/audit.db")).unwrap();
    db.execute_batch("DELETE FROM events WHERE seq > 10000; DELETE FROM meta WHERE key = 'head'").unwrap();
    drop(db);
    let store = open(folder.path());
    assert!(store.audit().verify().await.unwrap().is_err());
    all.truncate(10_000);
    all.extend(fill(&store, &user, &vms, 10_000, 13_000).await);
    let of = AuditFilter { host: Some("a.example".into()), ..blank(Order::Desc) };
    assert!(check(store.audit(), &user, &all, of, usize::MAX).await > 4_000);
}

/// The log is kept to a size, and what was given up leaves the file.
#[tokio::test]
async fn the_log_keeps_to_its_size_and_gives_the_rest_back() {
    let (folder, store) = fresh();
    let user = UserId::generate();
    let vms: Vec<VmId> = (0..4).map(|_| VmId::generate()).collect();
    fill(&store, &user, &vms, 0, EVENTS).await;
    let size = || std::fs::metadata(folder.path().join("db/audit.db")).unwrap().len();
    let octets = 3 << 20;
    let keep = Keep { since_us: i64::MIN, events: u64::MAX, octets };
    let gone = store.audit().retain(keep).await.unwrap();
    assert!(gone > 10_000, "{gone}");
    let left = store.audit().verify().await.unwrap().unwrap();
    assert_eq!(left, u64::try_from(EVENTS).unwrap() - gone);
    assert!(left > 3_000, "no more went than had to: {left}");
    assert_eq!(store.audit().retain(keep).await.unwrap(), 0);
    let db = rusqlite::Connection::open(folder.path().join("db/audit.db")).unwrap();
    db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    assert!(size() < octets + (8 << 20), "the file has {} octets", size());
    // Written on meanwhile, it stays within, and nothing is lost.
    for round in 1..4 {
        let trim = async {
            for _ in 0..5 {
                store.audit().retain(keep).await.unwrap();
            }
        };
        tokio::join!(fill(&store, &user, &vms, EVENTS * round, EVENTS * (round + 1)), trim);
        assert_eq!(store.audit().load().dropped, 0);
        store.audit().retain(keep).await.unwrap();
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
        assert!(store.audit().verify().await.unwrap().is_ok());
    }
    assert!(size() < octets + (24 << 20), "the file has {} octets", size());
}
