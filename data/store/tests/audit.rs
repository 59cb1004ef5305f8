//! The audit log: every filter alone and together, cursors, drops, tampering, retention.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, RuleId, UserId, Verdict, VmId};
use tapgate_store::*;

fn event(user: &UserId, vm: &VmId, n: i64) -> AuditEvent {
    let verdict = match n % 3 {
        0 => Verdict::Allow { rule: Some(RuleId::generate()), reason: Reason::Host },
        1 => Verdict::Deny { reason: Reason::NoRule },
        _ => Verdict::Tolerate { reason: Reason::NoRule },
    };
    let policy = tapgate_model::VmPolicy {
        vm: vm.clone(),
        user: user.clone(),
        generation: 1,
        mode: if n % 3 == 2 { Mode::Warn } else { Mode::Enforce },
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    let protocol = Protocol::ALL[usize::try_from(n % 6).unwrap()];
    let mut event = AuditEvent::new(&policy, protocol, verdict, 1_000_000 + n);
    event.host = (n % 2 == 0).then(|| format!("h{}.example", n % 5).parse().unwrap());
    event.address = (n % 4 != 0).then(|| format!("192.0.2.{}", n % 7).parse().unwrap());
    event.secrets = if n % 10 == 0 { vec!["s".into()] } else { vec![] };
    event
}

fn all() -> AuditFilter {
    AuditFilter::all(page(500))
}

#[tokio::test]
async fn every_combination_of_filters_answers_what_a_scan_would() {
    let (_folder, store) = fresh();
    let (user, other) = (UserId::generate(), UserId::generate());
    let vms = [VmId::generate(), VmId::generate()];
    let log = store.audit();
    for n in 0..300 {
        log.record(event(&user, &vms[usize::try_from(n % 2).unwrap()], n));
        log.record(event(&other, &VmId::generate(), n));
    }
    log.flush().await;
    check_every_combination(log, &user, &vms[0]).await;
}

/// The same in a log that another account's flood was taken out of many times, so that what is left stands in blocks with gaps.
#[tokio::test]
async fn every_combination_of_filters_is_right_after_a_flood() {
    let (_folder, store) = fresh();
    let (user, other, flood) = (UserId::generate(), UserId::generate(), VmId::generate());
    let vms = [VmId::generate(), VmId::generate()];
    let log = store.audit();
    let keep = Keep { since_us: i64::MIN, events: 700, octets: u64::MAX };
    for n in 0..300 {
        log.record(event(&user, &vms[usize::try_from(n % 2).unwrap()], n));
        for more in 0..150 {
            let mut event = event(&other, &flood, n);
            event.path = Some(format!("/{more}"));
            log.record(event);
        }
        if n % 10 == 0 {
            log.flush().await;
        }
        if n % 70 == 69 {
            log.retain(keep).await.unwrap();
        }
    }
    log.flush().await;
    log.retain(keep).await.unwrap();
    assert_eq!(log.verify().await.unwrap(), Ok(700));
    check_every_combination(log, &user, &vms[0]).await;
}

/// A block knows between which addresses a busy host's events lie: a range that only just meets them finds them.
#[tokio::test]
async fn a_host_is_found_by_any_range_that_meets_its_addresses() {
    let (_folder, store) = fresh();
    let (user, vm) = (UserId::generate(), VmId::generate());
    let log = store.audit();
    for n in 0..2_000 {
        let mut event = event(&user, &vm, n);
        event.host = Some(if n % 2 == 0 { "busy.example" } else { "other.example" }.parse().unwrap());
        let (first, last) = if n % 2 == 0 { (16, 47) } else { (0, 255) };
        event.address = Some(format!("192.0.2.{}", first + n % (last - first + 1)).parse().unwrap());
        log.record(event);
    }
    log.flush().await;
    // Each of its 16 addresses in 62 or 63 events.
    for (cidr, wanted) in [
        ("192.0.2.16/32", 63),
        ("192.0.2.46/32", 62),
        ("192.0.2.46/31", 62),
        ("192.0.2.16/30", 126),
        ("192.0.2.44/30", 124),
        ("192.0.2.32/28", 496),
        ("192.0.2.0/27", 500),
        ("192.0.2.0/28", 0),
        ("192.0.2.48/28", 0),
        ("192.0.2.17/32", 0),
        ("2001:db8::/32", 0),
    ] {
        let cidr = Some(cidr.parse().unwrap());
        let filter = AuditFilter { host: Some("busy.example".into()), cidr, ..all() };
        assert_eq!(log.list(&user, filter).await.unwrap().items.len(), wanted, "{cidr:?}");
    }
}

/// Of 300 events, those of `vm` with even numbers.
async fn check_every_combination(log: &AuditLog, user: &UserId, vm: &VmId) {
    let whole = log.list(user, all()).await.unwrap();
    assert_eq!(whole.items.len(), 300);
    assert!(whole.items.windows(2).all(|w| w[0].timestamp_us >= w[1].timestamp_us));

    for bits in 0..512u32 {
        let on = |bit: u32| bits & (1 << bit) != 0;
        for order in [Order::Asc, Order::Desc] {
            let mut filter = AuditFilter {
                vm: on(0).then(|| vm.clone()),
                rule_allows: on(1).then_some(false),
                passed: on(2).then_some(true),
                mode: on(3).then_some(Mode::Warn),
                host: on(4).then(|| "h2.example".into()),
                cidr: on(5).then(|| if on(0) { "192.0.2.2/32" } else { "192.0.2.0/30" }.parse().unwrap()),
                protocol: on(6).then_some(Protocol::Tcp),
                since_us: on(7).then_some(1_000_050),
                until_us: on(8).then_some(1_000_250),
                page: PageRequest { limit: 7, cursor: None, order },
            };
            let wanted = |r: &&AuditRecord| {
                filter.vm.as_ref().is_none_or(|vm| *vm == r.vm)
                    && filter.rule_allows.is_none_or(|want| want == r.rule_allows)
                    && filter.passed.is_none_or(|want| want == r.passed)
                    && filter.mode.is_none_or(|want| want == r.mode)
                    && filter.host.as_ref().is_none_or(|want| Some(want) == r.host.as_ref())
                    && filter.cidr.is_none_or(|want| r.address.is_some_and(|a| want.contains(a)))
                    && filter.protocol.is_none_or(|want| want == r.protocol)
                    && filter.since_us.is_none_or(|want| r.timestamp_us > want)
                    && filter.until_us.is_none_or(|want| r.timestamp_us < want)
            };
            let mut expected: Vec<_> = whole.items.iter().filter(wanted).map(|r| r.id.clone()).collect();
            if order == Order::Asc {
                expected.reverse();
            }
            let mut seen = Vec::new();
            loop {
                let page = log.list(user, filter.clone()).await.unwrap();
                seen.extend(page.items.into_iter().map(|r| r.id));
                match page.cursor {
                    Some(cursor) => filter.page.cursor = Some(cursor),
                    None => break,
                }
            }
            assert_eq!(seen, expected, "{bits:#b} {order:?}");
        }
    }
}

#[tokio::test]
async fn changes_to_the_log_are_found() {
    for tamper in [
        "UPDATE events SET bytes_out = 7 WHERE seq = 50",
        "UPDATE events SET host = NULL WHERE seq = 51",
        "UPDATE events SET host = 'innocent.' || host WHERE seq = 51",
        "DELETE FROM events WHERE seq = 50",
        "DELETE FROM events WHERE seq > 90",
        "DELETE FROM events WHERE seq < 10",
        "DELETE FROM meta WHERE key = 'head'",
        "DELETE FROM events",
    ] {
        let (folder, store) = fresh();
        let (user, vm) = (UserId::generate(), VmId::generate());
        for n in 0..100 {
            store.audit().record(event(&user, &vm, n));
        }
        store.audit().flush().await;
        assert_eq!(store.audit().verify().await.unwrap(), Ok(100));
        let db = rusqlite::Connection::open(folder.path().join("db/audit.db")).unwrap();
        assert!(db.execute(tamper, []).unwrap() > 0);
        assert!(store.audit().verify().await.unwrap().is_err(), "{tamper}");
    }
}

#[tokio::test]
async fn retention_takes_the_oldest_and_the_chain_holds() {
    let (_folder, store) = fresh();
    let (user, vm) = (UserId::generate(), VmId::generate());
    let log = store.audit();
    for n in 0..200 {
        log.record(event(&user, &vm, n));
    }
    log.flush().await;
    let keep = Keep { since_us: i64::MIN, events: u64::MAX, octets: u64::MAX };
    assert_eq!(log.retain(Keep { since_us: 1_000_050, ..keep }).await.unwrap(), 50);
    assert_eq!(log.verify().await.unwrap(), Ok(150));
    assert_eq!(log.retain(Keep { events: 100, ..keep }).await.unwrap(), 50);
    log.record(event(&user, &vm, 200));
    log.flush().await;
    assert_eq!(log.verify().await.unwrap(), Ok(101));
    assert_eq!(log.retain(Keep { since_us: i64::MAX, ..keep }).await.unwrap(), 101);
    assert_eq!(log.verify().await.unwrap(), Ok(0));
    assert!(log.list(&user, all()).await.unwrap().items.is_empty());
    log.record(event(&user, &vm, 202));
    log.flush().await;
    let again = log.list(&user, all()).await.unwrap();
    assert_eq!(again.items[0].host.as_deref(), Some("h2.example"));
    assert_eq!(log.verify().await.unwrap(), Ok(1));
}

#[tokio::test]
async fn the_log_goes_on_after_a_restart() {
    let (folder, store) = fresh();
    let (user, vm) = (UserId::generate(), VmId::generate());
    store.audit().record(event(&user, &vm, 1));
    store.audit().flush().await;
    drop(store);
    let store = open(folder.path());
    store.audit().record(event(&user, &vm, 2));
    store.audit().flush().await;
    assert_eq!(store.audit().verify().await.unwrap(), Ok(2));
}

async fn record(store: &Store, user: &UserId, vm: &VmId, count: i64) {
    for n in 0..count {
        store.audit().record(event(user, vm, n));
    }
    store.audit().flush().await;
}

/// Each is whole by itself: what was there before is known from the other database alone.
#[tokio::test]
async fn a_log_that_was_emptied_or_put_back_is_found() {
    for older in [false, true] {
        let (folder, store) = fresh();
        let (user, vm) = (UserId::generate(), VmId::generate());
        record(&store, &user, &vm, 50).await;
        let backup = folder.path().join("backup");
        store.backup(&backup).await.unwrap();
        record(&store, &user, &vm, 50).await;
        assert!(store.witness_audit().await.unwrap());
        assert_eq!(store.verify_audit().await.unwrap(), Ok(100));
        drop(store);
        for suffix in ["", "-wal", "-shm"] {
            let _ = std::fs::remove_file(folder.path().join(format!("db/audit.db{suffix}")));
        }
        if older {
            std::fs::copy(backup.join("audit.db"), folder.path().join("db/audit.db")).unwrap();
        }
        let store = open(folder.path());
        assert_eq!(store.audit().verify().await.unwrap(), Ok(if older { 50 } else { 0 }));
        let said = store.verify_audit().await.unwrap().unwrap_err();
        assert!(said.contains("event number 100 was there"), "{said}");
        // Neither new events nor retention make it good.
        assert!(!store.witness_audit().await.unwrap());
        record(&store, &user, &vm, 200).await;
        assert!(!store.witness_audit().await.unwrap());
        let keep = Keep { since_us: i64::MAX, events: u64::MAX, octets: u64::MAX };
        store.audit().retain(keep).await.unwrap();
        assert!(store.audit().verify().await.unwrap().is_ok());
        let said = store.verify_audit().await.unwrap().unwrap_err();
        assert!(said.contains("event number 100 was there"), "{said}");
    }
}

#[tokio::test]
async fn a_log_that_goes_on_is_whole_whatever_retention_took() {
    let (folder, store) = fresh();
    let (user, vm) = (UserId::generate(), VmId::generate());
    assert!(store.witness_audit().await.unwrap(), "an empty one");
    assert_eq!(store.verify_audit().await.unwrap(), Ok(0));
    record(&store, &user, &vm, 100).await;
    assert!(store.witness_audit().await.unwrap());
    let keep = Keep { since_us: i64::MAX, events: u64::MAX, octets: u64::MAX };
    store.audit().retain(keep).await.unwrap();
    assert_eq!(store.verify_audit().await.unwrap(), Ok(0));
    assert!(store.witness_audit().await.unwrap());
    record(&store, &user, &vm, 10).await;
    assert!(store.witness_audit().await.unwrap());
    assert_eq!(store.verify_audit().await.unwrap(), Ok(10));
    // A backup of both, put back, is what it was.
    let backup = folder.path().join("backup");
    store.backup(&backup).await.unwrap();
    record(&store, &user, &vm, 10).await;
    assert!(store.witness_audit().await.unwrap());
    drop(store);
    let key = || SealKey::load(&folder.path().join("seal.key")).unwrap();
    Store::restore(&folder.path().join("db"), &backup, key()).unwrap();
    let store = open(folder.path());
    assert_eq!(store.verify_audit().await.unwrap(), Ok(10));
    assert!(store.witness_audit().await.unwrap());
    // What is written down is signed.
    let db = rusqlite::Connection::open(folder.path().join("db/tapgate.db")).unwrap();
    let changed = "UPDATE meta SET value = zeroblob(72) WHERE key = 'audit_seen'";
    assert_eq!(db.execute(changed, []).unwrap(), 1);
    assert!(store.verify_audit().await.unwrap().is_err());
    assert!(!store.witness_audit().await.unwrap());
}
