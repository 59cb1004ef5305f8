//! What waits to be stored when the process ends is stored by the next one, or counted: each once.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

mod common;

use common::{fresh, open};
use std::path::Path;
use tapgate_model::{
    AuditEvent, AuditSink as _, EventId, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy,
};
use tapgate_store::*;

const WHOLE: Recovered = Recovered { events: 0, lost: 0, fault: None, without: None };

fn event(vm: &VmId, user: &UserId, path: String) -> AuditEvent {
    let policy = VmPolicy {
        vm: vm.clone(),
        user: user.clone(),
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    let verdict = Verdict::Deny { reason: Reason::NoRule };
    AuditEvent { path: Some(path), ..AuditEvent::new(&policy, Protocol::Http, verdict, now_us()) }
}

/// The files as they are at this moment: what a process that was killed just now would leave.
fn killed(folder: &Path) -> tempfile::TempDir {
    let copy = tempfile::tempdir().unwrap();
    std::fs::create_dir(copy.path().join("db")).unwrap();
    std::fs::copy(folder.join("seal.key"), copy.path().join("seal.key")).unwrap();
    for entry in std::fs::read_dir(folder.join("db")).unwrap() {
        let entry = entry.unwrap();
        if !entry.path().to_string_lossy().ends_with("-shm") {
            std::fs::copy(entry.path(), copy.path().join("db").join(entry.file_name())).unwrap();
        }
    }
    copy
}

async fn all(store: &Store, user: &UserId) -> Vec<AuditRecord> {
    let (mut all, mut page) = (Vec::new(), common::page(500));
    loop {
        let found = store.audit().list(user, AuditFilter { page: page.clone(), ..filter() }).await.unwrap();
        all.extend(found.items);
        match found.cursor {
            Some(cursor) => page.cursor = Some(cursor),
            None => return all,
        }
    }
}

fn filter() -> AuditFilter {
    AuditFilter::all(common::page(1))
}

#[tokio::test]
async fn what_waits_and_what_was_dropped_outlives_the_process() {
    let (folder, store) = fresh();
    let journal = |folder: &Path| folder.join("db/audit.journal");
    let found = store.audit().keep_journal(&journal(folder.path())).await.unwrap();
    assert_eq!(format!("{found:?}"), format!("{WHOLE:?}"));
    let (vm, user) = (VmId::generate(), UserId::generate());
    let lock = rusqlite::Connection::open(folder.path().join("db/audit.db")).unwrap();
    lock.execute_batch("BEGIN IMMEDIATE").unwrap();
    let told = EventId::generate();
    store.audit().record(AuditEvent { id: Some(told.clone()), ..event(&vm, &user, "/told".into()) });
    // The writer takes what waits once, whenever that is, and waits for the lock with it.
    let mut recorded = 1;
    while store.audit().load().aggregated <= 400 {
        store.audit().record(event(&vm, &user, "/same".into()));
        recorded += 1;
    }
    while store.audit().load().dropped <= 1_000 {
        store.audit().record(event(&vm, &user, format!("/{recorded}")));
        recorded += 1;
    }
    let dropped = store.audit().dropped(&vm).await.unwrap();

    let left = killed(folder.path());
    let next = open(left.path());
    let found = next.audit().keep_journal(&journal(left.path())).await.unwrap();
    assert_eq!((found.lost, found.fault, found.without), (dropped, None, None));
    let events = all(&next, &user).await;
    assert_eq!(events.len() as u64, found.events);
    let attempts: u64 = events.iter().map(|event| u64::from(event.count)).sum();
    assert_eq!(attempts + dropped, recorded);
    assert_eq!(next.audit().dropped(&vm).await.unwrap(), dropped);
    assert_eq!(events.iter().filter(|event| event.id == told).count(), 1);
    assert_eq!(next.audit().verify().await.unwrap(), Ok(events.len() as u64));
    // One that is killed when all is stored leaves nothing.
    while next.audit().load().waiting > 0 || Left::of(&journal(left.path())) {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let left = killed(left.path());
    let third = open(left.path());
    let found = third.audit().keep_journal(&journal(left.path())).await.unwrap();
    assert_eq!(format!("{found:?}"), format!("{WHOLE:?}"));
    assert_eq!(all(&third, &user).await.len(), events.len());
    assert_eq!(third.audit().dropped(&vm).await.unwrap(), dropped);
    lock.execute_batch("ROLLBACK").unwrap();
}

struct Left;

impl Left {
    /// Whether there is something in the journal.
    fn of(path: &Path) -> bool {
        let left = tapgate_journal::Left::read(path);
        !left.events.is_empty() || !left.lost.is_empty()
    }
}

/// Whatever stands there, the log opens and goes on, and says that it could not read it.
#[tokio::test]
async fn a_journal_that_is_none_is_counted_and_stops_nobody() {
    let (folder, store) = fresh();
    let path = folder.path().join("db/audit.journal");
    std::fs::write(&path, "no journal").unwrap();
    let found = store.audit().keep_journal(&path).await.unwrap();
    assert!(found.fault.is_some() && found.lost == 1 && found.without.is_none(), "{found:?}");
    let user = UserId::generate();
    store.audit().record(event(&VmId::generate(), &user, "/".into()));
    store.audit().flush().await;
    assert_eq!(all(&store, &user).await.len(), 1);
    let unknown: VmId = "vm_unknown".parse().unwrap();
    assert_eq!(store.audit().dropped(&unknown).await.unwrap(), 1);
    assert_eq!(store.audit().load().dropped, 1);
}
