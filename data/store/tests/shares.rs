//! What retention takes from whom: a flood pays for itself, the chain says what went, and what is left is found by every question.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use std::path::Path;
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};
use tapgate_store::*;

const KEEP: Keep = Keep { since_us: i64::MIN, events: u64::MAX, octets: u64::MAX };

/// A VM of an account, and how many events it made.
struct Guest {
    user: UserId,
    vm: VmId,
    made: i64,
}

impl Guest {
    fn of(user: &UserId) -> Self {
        Self { user: user.clone(), vm: VmId::generate(), made: 0 }
    }

    /// Makes an event at a time, told by its path.
    fn act(&mut self, log: &AuditLog, ts: i64, tail: &str) {
        let policy = VmPolicy {
            vm: self.vm.clone(),
            user: self.user.clone(),
            generation: 1,
            mode: Mode::Enforce,
            rules: Default::default(),
            secrets: [].into(),
            secrets_over_http: Default::default(),
        };
        let mut event =
            AuditEvent::new(&policy, Protocol::Http, Verdict::Deny { reason: Reason::NoRule }, ts);
        event.host = Some(format!("h{}.example", self.made % 3).parse().unwrap());
        event.address = Some([192, 0, 2, u8::try_from(self.made % 200).unwrap()].into());
        event.path = Some(format!("/{}{tail}", self.made));
        self.made += 1;
        log.record(event);
    }

    fn filter(&self, page: PageRequest) -> AuditFilter {
        AuditFilter { vm: Some(self.vm.clone()), ..AuditFilter::all(page) }
    }

    /// Exactly its newest events from one on are there, both ways, by its name and by host and range, in the order made.
    async fn has_from(&self, log: &AuditLog, from: i64) {
        let all: Vec<i64> = (from..self.made).collect();
        for order in [Order::Asc, Order::Desc] {
            for (host, cidr) in
                [(None, None), (Some("h1.example"), None), (Some("h1.example"), Some("192.0.2.0/25"))]
            {
                let mut filter = self.filter(PageRequest { limit: 500, cursor: None, order });
                filter.host = host.map(Into::into);
                filter.cidr = cidr.map(|cidr: &str| cidr.parse().unwrap());
                let wanted = |n: &i64| (host.is_none() || n % 3 == 1) && (cidr.is_none() || n % 200 < 128);
                let mut expected: Vec<i64> = all.iter().copied().filter(wanted).collect();
                if order == Order::Desc {
                    expected.reverse();
                }
                assert_eq!(self.pages(log, filter).await, expected);
            }
        }
    }

    async fn pages(&self, log: &AuditLog, mut filter: AuditFilter) -> Vec<i64> {
        let mut seen = Vec::new();
        loop {
            let page = log.list(&self.user, filter.clone()).await.unwrap();
            seen.extend(page.items.iter().map(number));
            match page.cursor {
                Some(cursor) => filter.page.cursor = Some(cursor),
                None => return seen,
            }
        }
    }
}

fn number(event: &AuditRecord) -> i64 {
    let path = event.path.as_deref().unwrap();
    path[1..].split('-').next().unwrap().parse().unwrap()
}

/// An account whose one VM floods beside a quiet one, and another account.
struct Scene {
    flood: Guest,
    sibling: Guest,
    other: Guest,
    clock: i64,
}

impl Scene {
    fn new() -> Self {
        let user = UserId::generate();
        Self {
            flood: Guest::of(&user),
            sibling: Guest::of(&user),
            other: Guest::of(&UserId::generate()),
            clock: 1_000_000,
        }
    }

    /// The flood makes so many events, each of the others one in 60.
    async fn go_on(&mut self, log: &AuditLog, events: i64) {
        for n in 0..events {
            self.clock += 1_000;
            self.flood.act(log, self.clock, "");
            if n % 60 == 7 {
                self.sibling.act(log, self.clock + 1, "");
            }
            if n % 60 == 30 {
                self.other.act(log, self.clock + 2, "");
            }
            if n % 1_200 == 0 {
                log.flush().await;
            }
        }
        log.flush().await;
    }

    async fn check(&self, log: &AuditLog, flood: i64, quiet: i64) {
        self.flood.has_from(log, flood).await;
        self.sibling.has_from(log, quiet).await;
        self.other.has_from(log, quiet).await;
        let left = self.flood.made - flood + self.sibling.made + self.other.made - 2 * quiet;
        assert_eq!(log.verify().await.unwrap(), Ok(u64::try_from(left).unwrap()));
    }

    /// What the flood has lost when so many are left in all.
    fn lost(&self, left: i64) -> i64 {
        self.flood.made + self.sibling.made + self.other.made - left
    }
}

fn raw(folder: &Path) -> rusqlite::Connection {
    rusqlite::Connection::open(folder.join("db/audit.db")).unwrap()
}

#[tokio::test]
async fn a_flood_takes_from_itself_alone() {
    let (folder, store) = fresh();
    let mut scene = Scene::new();
    let keep = Keep { events: 4_000, ..KEEP };
    for _ in 0..12 {
        scene.go_on(store.audit(), 4_000).await;
        let over = scene.flood.made.min(4_000);
        assert!(store.audit().retain(keep).await.unwrap() >= u64::try_from(over - 4_000).unwrap());
        assert_eq!(store.audit().verify().await.unwrap(), Ok(4_000));
    }
    let lost = scene.lost(4_000);
    scene.check(store.audit(), lost, 0).await;
    drop(store);

    // The same after a start; it is written on.
    let store = open(folder.path());
    scene.check(store.audit(), lost, 0).await;
    scene.go_on(store.audit(), 17_000).await;
    scene.check(store.audit(), lost, 0).await;
    store.audit().retain(keep).await.unwrap();
    let lost = scene.lost(4_000);
    scene.check(store.audit(), lost, 0).await;

    // The old end moves over what was taken from the middle.
    let first = scene.clock - 1_000 * 40_000;
    let old = scene.other.pages(store.audit(), scene.other.filter(page(500))).await.len();
    store.audit().retain(Keep { since_us: first, ..KEEP }).await.unwrap();
    let quiet = scene.other.made
        - i64::try_from(scene.other.pages(store.audit(), scene.other.filter(page(500))).await.len()).unwrap();
    assert!(quiet > 100 && old > 600, "{quiet} of {old} were old");
    scene.check(store.audit(), lost, quiet).await;

    // A backup is as it was.
    let backup = folder.path().join("backup");
    store.backup(&backup).await.unwrap();
    drop(store);
    let key = SealKey::load_or_create(&folder.path().join("seal.key")).unwrap();
    Store::restore(&folder.path().join("db"), &backup, key).unwrap();
    let store = open(folder.path());
    scene.check(store.audit(), lost, quiet).await;

    // Nothing is left of anything, and it begins anew.
    store.audit().retain(Keep { since_us: i64::MAX, ..KEEP }).await.unwrap();
    let left = |table: &str| -> i64 {
        raw(folder.path()).query_row(&format!("SELECT count(*) FROM {table}"), [], |row| row.get(0)).unwrap()
    };
    for table in ["events", "blocks", "terms", "cuts", "holdings"] {
        assert_eq!(left(table), 0, "{table}");
    }
    assert_eq!(store.audit().verify().await.unwrap(), Ok(0));
    scene.go_on(store.audit(), 100).await;
    assert_eq!(store.audit().verify().await.unwrap(), Ok(104));
}

/// An account with many VMs holds no more than one with one, and a VM that has been quiet for long nothing less.
#[tokio::test]
async fn accounts_are_equal_however_many_vms_they_have() {
    let (_folder, store) = fresh();
    let log = store.audit();
    let (many, one) = (UserId::generate(), UserId::generate());
    let mut guests: Vec<Guest> = (0..6).map(|_| Guest::of(&many)).chain([Guest::of(&one)]).collect();
    for n in 0..3_000 {
        for guest in &mut guests {
            guest.act(log, n, "");
        }
        if n % 200 == 0 {
            log.flush().await;
        }
    }
    log.flush().await;
    assert_eq!(log.retain(Keep { events: 5_000, ..KEEP }).await.unwrap(), 16_000);
    // 2,500 are each account's; those of the first, 416 or 417 each VM's.
    guests[6].has_from(log, 500).await;
    let mut sum = 0;
    for guest in &guests[..6] {
        let left = i64::try_from(guest.pages(log, guest.filter(page(500))).await.len()).unwrap();
        assert!((416..=417).contains(&left), "{left}");
        guest.has_from(log, 3_000 - left).await;
        sum += left;
    }
    assert_eq!(sum, 2_500);
    assert_eq!(log.verify().await.unwrap(), Ok(5_000));
}

/// What goes later, before and behind what went already, makes one gap of them.
#[tokio::test]
async fn gaps_that_meet_are_one() {
    let (folder, store) = fresh();
    let log = store.audit();
    let mut guests: Vec<Guest> = (0..3).map(|_| Guest::of(&UserId::generate())).collect();
    let [first, second, quiet] = &mut guests[..] else { unreachable!() };
    for n in 0..2_000 {
        if n % 40 == 0 {
            quiet.act(log, n, "");
        }
        second.act(log, n, "");
        first.act(log, n, "");
    }
    for n in 0..1_000 {
        first.act(log, n, "");
    }
    log.flush().await;
    let cuts = || -> i64 {
        raw(folder.path()).query_row("SELECT count(*) FROM cuts", [], |row| row.get(0)).unwrap()
    };
    assert_eq!(log.retain(Keep { events: 4_050, ..KEEP }).await.unwrap(), 1_000);
    assert_eq!(cuts(), 1_000);
    for n in 0..1_000 {
        second.act(log, n, "");
    }
    log.flush().await;
    // Both give now, the second all that stands between the first's gaps, and more.
    assert_eq!(log.retain(Keep { events: 1_050, ..KEEP }).await.unwrap(), 4_000);
    assert_eq!(log.verify().await.unwrap(), Ok(1_050));
    assert_eq!(cuts(), 51, "one after each event of the quiet one, and one in the newest of the second");
    first.has_from(log, 2_500).await;
    second.has_from(log, 2_500).await;
    quiet.has_from(log, 0).await;
}

/// By size, it is octets that count: a few large events do not push out many small ones.
#[tokio::test]
async fn large_events_pay_for_themselves() {
    let (_folder, store) = fresh();
    let log = store.audit();
    let (mut flood, mut quiet) = (Guest::of(&UserId::generate()), Guest::of(&UserId::generate()));
    let tail = format!("-{}", "x".repeat(1_500));
    for n in 0..8_000 {
        quiet.act(log, 2 * n, "");
        if n % 2 == 0 {
            flood.act(log, 2 * n + 1, &tail);
        }
        if n % 500 == 0 {
            log.flush().await;
        }
    }
    log.flush().await;
    let gone = log.retain(Keep { octets: 5 << 20, ..KEEP }).await.unwrap();
    assert!((1_000..3_900).contains(&gone), "{gone}");
    quiet.has_from(log, 0).await;
    flood.has_from(log, i64::try_from(gone).unwrap()).await;
    assert_eq!(log.verify().await.unwrap(), Ok(12_000 - gone));
    assert_eq!(log.retain(Keep { octets: 5 << 20, ..KEEP }).await.unwrap(), 0);
}

/// What is taken from between others' events leaves the file too: nobody else has to give for it.
#[tokio::test]
async fn room_is_made_between_the_events_of_others() {
    let (folder, store) = fresh();
    let log = store.audit();
    let mut flood = Guest::of(&UserId::generate());
    let mut quiet: Vec<Guest> = (0..10).map(|_| Guest::of(&UserId::generate())).collect();
    for n in 0..20_000 {
        flood.act(log, 2 * n, "");
        quiet[usize::try_from(n % 10).unwrap()].act(log, 2 * n + 1, "");
        if n % 500 == 0 {
            log.flush().await;
        }
    }
    log.flush().await;
    let db = raw(folder.path());
    let number = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
    let used = || {
        u64::try_from(
            number("PRAGMA page_size") * (number("PRAGMA page_count") - number("PRAGMA freelist_count")),
        )
        .unwrap()
    };
    let octets = used() / 16 * 15;
    let gone = log.retain(Keep { octets, ..KEEP }).await.unwrap();
    assert!(gone < 12_000 && used() <= octets, "{gone}, {} of {octets}", used());
    for guest in &quiet {
        guest.has_from(log, 0).await;
    }
    flood.has_from(log, i64::try_from(gone).unwrap()).await;
    assert_eq!(log.verify().await.unwrap(), Ok(40_000 - gone));
}

/// When nearly all is gone, the last blocks too, a start finds the end, and what comes then is in the index again.
#[tokio::test]
async fn a_log_that_is_nearly_empty_goes_on() {
    let (folder, store) = fresh();
    let mut scene = Scene::new();
    scene.go_on(store.audit(), 34_000).await;
    store.audit().retain(Keep { events: 3, ..KEEP }).await.unwrap();
    assert_eq!(store.audit().verify().await.unwrap(), Ok(3));
    // Of equals the older gives: one is left of each account, or two of one.
    drop(store);
    let store = open(folder.path());
    assert_eq!(store.audit().verify().await.unwrap(), Ok(3));
    let before = scene.flood.made;
    scene.go_on(store.audit(), 18_000).await;
    let blocks: i64 =
        raw(folder.path()).query_row("SELECT count(*) FROM blocks", [], |row| row.get(0)).unwrap();
    assert!(blocks > 0);
    let all = scene.flood.pages(store.audit(), scene.flood.filter(page(500))).await;
    assert_eq!(all.iter().filter(|n| **n >= before).count(), 18_000);
}

/// Who follows from long ago hears what is left of it, and does not go through what is gone.
#[tokio::test]
async fn following_passes_over_what_is_gone() {
    let (_folder, store) = fresh();
    let mut scene = Scene::new();
    scene.go_on(store.audit(), 600).await;
    for n in 0..65_000 {
        scene.flood.act(store.audit(), scene.clock + n, "");
        if n % 1_200 == 0 {
            store.audit().flush().await;
        }
    }
    store.audit().flush().await;
    store.audit().retain(Keep { events: 500, ..KEEP }).await.unwrap();
    let filter = scene.other.filter(page(500));
    let (mut seen, mut place, mut steps) = (Vec::new(), 0, 0);
    loop {
        let (events, next) = store.audit().follow(&scene.other.user, &filter, place).await.unwrap();
        seen.extend(events.iter().map(number));
        if next == place {
            break;
        }
        (place, steps) = (next, steps + 1);
    }
    assert_eq!(seen, (0..scene.other.made).collect::<Vec<_>>());
    assert_eq!(steps, 2, "the first events, and what is left of the flood");
    // A page may begin at an event that is there, and not at one that is gone.
    let first = store.audit().list(&scene.flood.user, scene.flood.filter(page(1))).await.unwrap();
    let from = PageRequest { limit: 500, cursor: Some(first.items[0].id.to_string()), order: Order::Desc };
    let rest = scene.flood.pages(store.audit(), scene.flood.filter(from)).await;
    assert_eq!(rest.first(), Some(&(scene.flood.made - 2)));
}

/// Each change to what says which events are gone, alone or with events that it would hide.
#[tokio::test]
async fn no_gap_is_right_but_those_of_retention() {
    // Runs of 59 numbers are gone between events of others: `a` is where one begins, `z` where it ends, `n` another.
    for (what, change) in [
        ("missing", "DELETE FROM cuts WHERE first = :a"),
        ("all missing", "DELETE FROM cuts"),
        ("enlarged", "UPDATE cuts SET last = last + 1 WHERE first = :a; DELETE FROM events WHERE seq = :z + 1"),
        (
            "enlarged, with the hash of its new end",
            "UPDATE cuts SET last = last + 1, hash = (SELECT hash FROM events WHERE seq = :z + 1) WHERE first = :a;
             DELETE FROM events WHERE seq = :z + 1",
        ),
        ("begun earlier", "UPDATE cuts SET first = first - 1 WHERE first = :a; DELETE FROM events WHERE seq = :a - 1"),
        (
            "joined with the next",
            "DELETE FROM events WHERE seq BETWEEN :a AND :n;
             UPDATE cuts SET (last, hash, mac) = (SELECT last, hash, mac FROM cuts WHERE first = :n) WHERE first = :a;
             DELETE FROM cuts WHERE first = :n",
        ),
        ("moved", "UPDATE cuts SET first = :n + 1000000, last = :n + 1000010 WHERE first = :a"),
        (
            "forged",
            "INSERT INTO cuts SELECT :z + 1, :z + 1, e.hash, c.mac FROM events e, cuts c WHERE e.seq = :z + 1 AND c.first = :a;
             DELETE FROM events WHERE seq = :z + 1",
        ),
        (
            "forged over what is there",
            "INSERT INTO cuts SELECT :z + 1, :z + 1, e.hash, c.mac FROM events e, cuts c WHERE e.seq = :z + 1 AND c.first = :a",
        ),
        ("smaller", "UPDATE cuts SET last = last - 1 WHERE first = :a"),
        ("a changed hash", "UPDATE cuts SET hash = zeroblob(32) WHERE first = :a"),
        ("a changed code", "UPDATE cuts SET mac = zeroblob(32) WHERE first = :a"),
        ("no code", "UPDATE cuts SET mac = x'' WHERE first = :a"),
        ("no hash", "UPDATE cuts SET hash = x'' WHERE first = :a"),
        ("an event without a cut", "DELETE FROM events WHERE seq = :z + 1"),
        ("an event after a cut", "UPDATE events SET bytes_in = 7 WHERE seq = :z + 1"),
        ("an event before a cut", "UPDATE events SET bytes_in = 7 WHERE seq = :a - 1"),
        ("an event in a cut", "INSERT INTO events SELECT :a, id, ts, user, vm, class, host, address, port, rule, reason, method, path,
             status, secrets, withheld, bytes_out, bytes_in, duration_ms, count, hash FROM events WHERE seq = :z + 1"),
        ("events before a cut and the place where the log begins", "DELETE FROM events WHERE seq < :a; DELETE FROM meta WHERE key = 'anchor'"),
    ] {
        let (folder, store) = fresh();
        let mut scene = Scene::new();
        scene.go_on(store.audit(), 3_000).await;
        store.audit().retain(Keep { events: 400, ..KEEP }).await.unwrap();
        assert_eq!(store.audit().verify().await.unwrap(), Ok(400));
        let db = raw(folder.path());
        let cut = |nth: i64| -> (i64, i64) {
            let sql = "SELECT first, last FROM cuts ORDER BY first LIMIT 1 OFFSET ?1";
            db.query_row(sql, [nth], |row| Ok((row.get(0)?, row.get(1)?))).unwrap()
        };
        let ((a, z), (n, _)) = (cut(7), cut(8));
        let named = change.replace(":a", &a.to_string()).replace(":z", &z.to_string());
        let before = db.total_changes();
        db.execute_batch(&named.replace(":n", &n.to_string())).unwrap();
        assert!(db.total_changes() > before, "{what}");
        assert!(store.audit().verify().await.unwrap().is_err(), "{what}");
        // Nor does retention make it good when it takes more.
        scene.go_on(store.audit(), 2_000).await;
        store.audit().retain(Keep { events: 300, ..KEEP }).await.unwrap();
        assert!(store.audit().verify().await.unwrap().is_err(), "{what}, and retention after it");
    }
}

/// Bursts of any guest, bounds of any kind, and starts, in any order: each guest's newest events are there, each once, and what is
/// written down of them is so.
#[tokio::test]
async fn whatever_comes_and_goes_all_that_is_written_down_is_right() {
    let rounds = if std::env::var_os("TAPGATE_LONG").is_some() { 400 } else { 12 };
    let (folder, mut store) = fresh();
    let users: Vec<UserId> = (0..3).map(|_| UserId::generate()).collect();
    let mut guests: Vec<Guest> = (0..7).map(|n| Guest::of(&users[n % 3])).collect();
    let mut random = 20_261_125u64;
    let mut below = |most: u64| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) % most
    };
    let mut clock = 1_000_000;
    for round in 0..rounds {
        let (loud, events) = (below(7) as usize, below(6_000));
        for n in 0..events {
            clock += 1;
            let guest = if below(3) == 0 { below(7) as usize } else { loud };
            guests[guest].act(store.audit(), clock, "");
            if n % 900 == 0 {
                store.audit().flush().await;
            }
        }
        store.audit().flush().await;
        let keep = match below(5) {
            0 => Keep { since_us: clock - 30_000, ..KEEP },
            1 => Keep { octets: (1 + below(4)) << 20, ..KEEP },
            2 => KEEP,
            _ => Keep { events: 50 + below(20_000), ..KEEP },
        };
        store.audit().retain(keep).await.unwrap();
        if below(4) == 0 {
            drop(store);
            store = open(folder.path());
        }
        let log = store.audit();
        let mut left = 0;
        for guest in &guests {
            let there = guest.pages(log, guest.filter(page(500))).await.len();
            guest.has_from(log, guest.made - i64::try_from(there).unwrap()).await;
            left += there as u64;
        }
        assert_eq!(log.verify().await.unwrap(), Ok(left), "round {round}, {keep:?}");
        let db = raw(folder.path());
        let none = |what: &str, sql: &str| {
            let found: i64 = db.query_row(sql, [], |row| row.get(0)).unwrap();
            assert_eq!(found, 0, "round {round}, {keep:?}: {what}");
        };
        none(
            "holdings",
            "SELECT count(*) FROM (SELECT user, vm, count(*) AS n, min(seq) AS o FROM events GROUP BY user, vm) e
             FULL JOIN holdings h ON h.user = e.user AND h.vm = e.vm
             WHERE e.n IS NOT h.events OR h.oldest > e.o OR h.octets < 128 * e.n",
        );
        none(
            "blocks that overlap",
            "SELECT count(*) FROM blocks a JOIN blocks b ON b.first > a.first AND b.first <= a.last",
        );
        none("terms of no block", "SELECT count(*) FROM terms WHERE block NOT IN (SELECT first FROM blocks)");
    }
}
