//! The store under fault: killed in the middle of writes, a full disk, a locked file, a clock that goes back.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use tapgate_model::{AuditEvent, AuditSink as _, Mode, Protocol, Reason, UserId, Verdict, VmId, VmPolicy};
use tapgate_store::*;

const CHILD: &str = "TAPGATE_STORE_TEST_FOLDER";

/// What the killed process does: writes of several kinds as fast as it can, and a line for each that was acknowledged.
async fn write_until_killed(folder: &std::path::Path) {
    let store = open(folder);
    let mut out = std::io::stdout();
    for n in 0.. {
        let stamp = format!("{}x{n}", std::process::id());
        let user = user(&store, &format!("{stamp}@example.com")).await;
        store.env_set(&user, "K", &stamp, 10, Expected::any()).await.unwrap();
        store.secret_create(&user, new_secret("s", "S", &stamp), secrets(10)).await.unwrap();
        writeln!(out, "{user} {stamp}").unwrap();
        out.flush().unwrap();
    }
}

#[tokio::test]
async fn what_was_acknowledged_survives_a_hundred_kills() {
    if let Some(folder) = std::env::var_os(CHILD) {
        return write_until_killed(folder.as_ref()).await;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut acknowledged: Vec<(UserId, String)> = Vec::new();
    for round in 0..100u64 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "what_was_acknowledged_survives_a_hundred_kills", "--nocapture"])
            .env(CHILD, folder.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        // Killed after some writes, at another point of the next write each time.
        let wanted = usize::try_from(round % 4 + 1).unwrap();
        let mut seen = 0;
        for line in lines.map_while(Result::ok) {
            if let Some((user, stamp)) = line.split_once(' ')
                && let Ok(user) = user.parse()
            {
                acknowledged.push((user, stamp.to_owned()));
                seen += 1;
                if seen == wanted {
                    std::thread::sleep(std::time::Duration::from_micros(round * 37 % 2500));
                    child.kill().unwrap();
                }
            }
        }
        child.wait().unwrap();
        assert!(seen >= wanted, "the child ended by itself");
    }
    let store = open(folder.path());
    for (user, stamp) in &acknowledged {
        assert_eq!(store.env(user, "K").await.unwrap().value, *stamp);
        let page = PageRequest { limit: 1, cursor: None, order: Order::Asc };
        let secrets = store.secrets(user, SecretFilter::default(), SecretSort::Created, page).await.unwrap();
        assert_eq!(secrets.items.len(), 1);
    }
    assert!(acknowledged.len() >= 250);
}

#[tokio::test]
async fn a_full_disk_is_said_and_loses_nothing() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.env_set(&user, "BEFORE", "x", 1000, Expected::any()).await.unwrap();
    // A limit on the size of files stands for the full disk: a child has it (and ignores its signal), we have not.
    drop(store);
    let script = format!(
        "trap '' XFSZ; ulimit -f 400; exec {} --exact full_disk_child --nocapture --ignored",
        std::env::current_exe().unwrap().display()
    );
    let child = Command::new("bash")
        .args(["-c", &script])
        .env(CHILD, folder.path())
        .env("TAPGATE_STORE_TEST_USER", user.as_str())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(text.contains("unavailable after"), "{text}\n{}", String::from_utf8_lossy(&child.stderr));
    let store = open(folder.path());
    let all = store.env_all(&user).await.unwrap();
    assert!(all.iter().any(|env| env.key == "BEFORE"));
    for line in text.lines().filter_map(|line| line.strip_prefix("wrote ")) {
        assert!(all.iter().any(|env| env.key == line), "{line} was acknowledged and is gone");
    }
    store.env_set(&user, "AFTER", "x", 10_000, Expected::any()).await.unwrap();
}

#[tokio::test]
#[ignore = "run by the test above, with a limit on file sizes"]
async fn full_disk_child() {
    let (Some(folder), Ok(user)) = (std::env::var_os(CHILD), std::env::var("TAPGATE_STORE_TEST_USER")) else {
        return;
    };
    let store = open(folder.as_ref());
    let user: UserId = user.parse().unwrap();
    let big = "x".repeat(16 * 1024);
    for n in 0..10_000 {
        let key = format!("K{n}");
        match store.env_set(&user, &key, &big, 100_000, Expected::any()).await {
            Ok(_) => println!("wrote {key}"),
            Err(StoreError::Unavailable(_)) => return println!("unavailable after {n}"),
            Err(other) => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn a_locked_file_is_said_and_mends() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let other = rusqlite::Connection::open(folder.path().join("db/tapgate.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    assert!(matches!(
        store.env_set(&user, "K", "v", 10, Expected::any()).await,
        Err(StoreError::Unavailable(_))
    ));
    assert!(matches!(store.healthy().await, Err(StoreError::Unavailable(_))));
    store.env_list(&user, 10, None).await.expect("reading goes on");
    other.execute_batch("ROLLBACK").unwrap();
    store.env_set(&user, "K", "v", 10, Expected::any()).await.unwrap();
}

#[tokio::test]
async fn audit_events_wait_out_a_locked_file() {
    let (folder, store) = fresh();
    let other = rusqlite::Connection::open(folder.path().join("db/audit.db")).unwrap();
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let policy = VmPolicy {
        vm: VmId::generate(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    for n in 0..100 {
        let verdict = Verdict::Deny { reason: Reason::NoRule };
        store.audit().record(AuditEvent::new(&policy, Protocol::Tcp, verdict, n));
    }
    // Longer than the writer waits for a lock.
    tokio::time::sleep(std::time::Duration::from_secs(6)).await;
    other.execute_batch("ROLLBACK").unwrap();
    store.audit().flush().await;
    assert_eq!(store.audit().verify().await.unwrap(), Ok(100));
    assert_eq!(store.audit().dropped(&policy.vm).await.unwrap(), 0);
}

#[tokio::test]
async fn a_clock_that_goes_back_breaks_no_page() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    for n in 0..10 {
        store
            .secret_create(&user, new_secret(&format!("s{n}"), &format!("S{n}"), "v"), secrets(100))
            .await
            .unwrap();
    }
    let db = rusqlite::Connection::open(folder.path().join("db/tapgate.db")).unwrap();
    db.execute("UPDATE secrets SET created_at = created_at - 3600000000 WHERE seq % 3 = 0", []).unwrap();
    db.execute("UPDATE secrets SET created_at = 5 WHERE seq % 3 = 1", []).unwrap();
    for order in [Order::Asc, Order::Desc] {
        let mut page = PageRequest { limit: 3, cursor: None, order };
        let mut seen = std::collections::HashSet::new();
        loop {
            let found = store
                .secrets(&user, SecretFilter::default(), SecretSort::Created, page.clone())
                .await
                .unwrap();
            for secret in found.items {
                assert!(seen.insert(secret.id), "seen twice");
            }
            match found.cursor {
                Some(cursor) => page.cursor = Some(cursor),
                None => break,
            }
        }
        assert_eq!(seen.len(), 10);
    }
}

/// A small file system of its own, in a mount namespace that goes with the child: nothing is left behind however it ends.
#[tokio::test]
async fn a_real_full_disk_loses_no_record_and_no_event() {
    let folder = tempfile::tempdir().unwrap();
    let script = format!(
        "mount -t tmpfs -o size=4m tmpfs {0} && exec {1} --exact small_disk_child --nocapture --ignored",
        folder.path().display(),
        std::env::current_exe().unwrap().display()
    );
    let child = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "bash", "-c", &script])
        .env(CHILD, folder.path())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&child.stdout);
    assert!(text.contains("nothing is lost"), "{text}\n{}", String::from_utf8_lossy(&child.stderr));
}

#[tokio::test]
#[ignore = "run by the test above, on a small disk"]
async fn small_disk_child() {
    let Some(folder) = std::env::var_os(CHILD).map(std::path::PathBuf::from) else { return };
    // Room that can be given back.
    let ballast = folder.join("ballast");
    std::fs::write(&ballast, vec![1; 3 << 19]).unwrap();
    let store = open(&folder);
    // One account's variables have a bound together: there are enough accounts to fill the disk.
    let mut users = Vec::new();
    for n in 0..40 {
        users.push(user(&store, &format!("a{n}@example.com")).await);
    }
    let user = users[0].clone();
    let mut written = 0;
    let big = "x".repeat(16 * 1024);
    let failed = loop {
        let of = users.get(written / 10).expect("the disk never fills");
        match store.env_set(of, &format!("K{written}"), &big, 100_000, Expected::any()).await {
            Ok(_) => written += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(failed, StoreError::Unavailable(_)), "{failed:?}");
    assert!(matches!(store.healthy().await, Ok(()) | Err(StoreError::Unavailable(_))));
    let policy = VmPolicy {
        vm: VmId::generate(),
        user: user.clone(),
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    for n in 0..300 {
        let mut event = AuditEvent::new(&policy, Protocol::Tcp, Verdict::Deny { reason: Reason::NoRule }, n);
        event.path = Some("p".repeat(500));
        store.audit().record(event);
    }
    let count = async |store: &Store| {
        let mut count = 0;
        for user in &users {
            count += store.env_all(user).await.expect("reading goes on").len();
        }
        count
    };
    assert_eq!(count(&store).await, written);
    std::fs::remove_file(&ballast).unwrap();
    store.env_set(&user, "AFTER", "x", 100_000, Expected::any()).await.unwrap();
    store.audit().flush().await;
    assert_eq!(store.audit().verify().await.unwrap(), Ok(300));
    drop(store);
    let again = open(&folder);
    assert_eq!(count(&again).await, written + 1);
    println!("nothing is lost");
}

#[tokio::test]
async fn a_damaged_audit_file_is_said_and_the_records_go_on() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.env_set(&user, "K", "v", 10, Expected::any()).await.unwrap();
    let policy = VmPolicy {
        vm: VmId::generate(),
        user: user.clone(),
        generation: 1,
        mode: Mode::Enforce,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    for n in 0..2000 {
        store.audit().record(AuditEvent::new(
            &policy,
            Protocol::Tcp,
            Verdict::Deny { reason: Reason::NoRule },
            n,
        ));
    }
    store.audit().flush().await;
    drop(store);
    let path = folder.path().join("db/audit.db");
    let db = rusqlite::Connection::open(&path).unwrap();
    db.execute_batch("PRAGMA wal_checkpoint(TRUNCATE)").unwrap();
    let id: String = db.query_row("SELECT id FROM events WHERE seq = 1000", [], |row| row.get(0)).unwrap();
    let page: u32 = db.pragma_query_value(None, "page_size", |row| row.get(0)).unwrap();
    let page = usize::try_from(page).unwrap();
    drop(db);
    let mut bytes = std::fs::read(&path).unwrap();
    // The page that an event in the middle stands on.
    let at = bytes.windows(id.len()).position(|window| window == id.as_bytes()).unwrap();
    bytes[at / page * page..][..page].fill(0xff);
    std::fs::write(&path, &bytes).unwrap();
    let store = open(folder.path());
    let damage = store.audit().verify().await;
    assert!(matches!(damage, Err(StoreError::Corrupt(_)) | Ok(Err(_))), "{damage:?}");
    assert_eq!(store.env(&user, "K").await.unwrap().value, "v");
    drop(store);
    // A file that is none of ours is refused by name.
    std::fs::write(&path, "nonsense, and more of it than a header has".repeat(100)).unwrap();
    let key = SealKey::load(&folder.path().join("seal.key")).unwrap();
    let refused = Store::open(&folder.path().join("db"), key).unwrap_err().to_string();
    assert!(refused.contains("damaged") && refused.contains("restore the last backup"), "{refused}");
    assert!(refused.contains("audit.db"), "{refused}");
}
