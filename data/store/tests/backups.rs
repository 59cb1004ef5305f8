//! A copy of a running store, putting it back, and a new key: nothing is lost, and what was there is kept.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use tapgate_model::UserId;
use tapgate_model::policy::SecretsOverHttp;
use tapgate_store::*;

/// A store whose variable `E` is `now`, and `then` in its backup.
async fn changed_since_its_backup() -> (tempfile::TempDir, UserId, PathBuf) {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.env_set(&user, "E", "then", 10, Expected::any()).await.unwrap();
    let backup = folder.path().join("backup");
    store.backup(&backup).await.unwrap();
    store.env_set(&user, "E", "now", 10, Expected::any()).await.unwrap();
    drop(store);
    (folder, user, backup)
}

#[tokio::test]
async fn a_backup_opens_and_holds_everything() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.secret_create(&user, new_secret("s", "S", "value"), secrets(10)).await.unwrap();
    let there = folder.path().join("backup");
    store.backup(&there).await.unwrap();
    assert!(store.backup(&there).await.is_err(), "a backup is never overwritten");
    let key = SealKey::load(&folder.path().join("seal.key")).unwrap();
    let copy = Store::open(&there, key).unwrap();
    let page = PageRequest { limit: 10, cursor: None, order: Order::Asc };
    let secrets = copy.secrets(&user, SecretFilter::default(), SecretSort::Created, page).await.unwrap();
    assert_eq!(secrets.items.len(), 1);
}

#[tokio::test]
async fn a_rotated_key_seals_everything_and_the_old_one_nothing() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.secret_create(&user, new_secret("s", "S", "value"), secrets(10)).await.unwrap();
    store.env_set(&user, "E", "env value", 10, Expected::any()).await.unwrap();
    let vm = store.vm_create(new_vm(&user, "vm")).await.unwrap().id;
    let ticket = store.ticket("verify", "x", now_us() + 60_000_000);
    store.idempotency_begin(&user, "once", vec![1]).await.unwrap();
    store.idempotency_end(&user, "once", Some((201, b"an answer".to_vec()))).await.unwrap();
    store.idempotency_begin(&user, "unanswered", vec![2]).await.unwrap();
    drop(store);
    let (db, file) = (folder.path().join("db"), folder.path().join("seal.key"));
    let old_file = folder.path().join("old.key");
    std::fs::copy(&file, &old_file).unwrap();
    assert_eq!(Store::rotate_key(&db, &file).unwrap(), 5);
    assert_ne!(std::fs::read(&file).unwrap(), std::fs::read(&old_file).unwrap());
    assert!(Store::open(&db, SealKey::load(&old_file).unwrap()).is_err(), "the old key opens nothing");
    assert!(Store::rotate_key(&db, &old_file).is_err());

    let store = open(folder.path());
    assert_eq!(store.env(&user, "E").await.unwrap().value, "env value");
    assert_eq!(store.vm_ca(&vm).await.unwrap().key.as_str(), "ca key of a VM");
    let policy = store.effective_policy(&vm, SecretsOverHttp::Never).await.unwrap();
    assert_eq!(policy.secrets[0].value.expose(), b"value");
    let known = store.idempotency_begin(&user, "once", vec![1]).await.unwrap();
    assert!(
        matches!(known, Known::Ended { status: 201, body } if body == b"an answer"),
        "a retry is answered"
    );
    assert_eq!(store.redeem("verify", &ticket).as_deref(), Some("x"), "tickets and the chain do not change");
    assert!(store.audit().verify().await.unwrap().is_ok());
}

#[tokio::test]
async fn a_backup_is_put_back_and_what_was_there_is_kept() {
    let (folder, user, backup) = changed_since_its_backup().await;
    let db = folder.path().join("db");
    let key = || SealKey::load(&folder.path().join("seal.key")).unwrap();
    let wrong = SealKey::load_or_create(&folder.path().join("other.key")).unwrap();
    assert!(Store::restore(&db, &backup, wrong).is_err());
    assert!(Store::restore(&db, &folder.path().join("none"), key()).is_err());
    assert_eq!(
        open(folder.path()).env(&user, "E").await.unwrap().value,
        "now",
        "refused ones change nothing"
    );
    // A backup that came by another way than ours: others may read it, and nobody may what is made of it.
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    for name in ["tapgate.db", "audit.db"] {
        let open_to_all = std::fs::Permissions::from_mode(0o644);
        std::fs::set_permissions(backup.join(name), open_to_all).unwrap();
    }
    let aside = Store::restore(&db, &backup, key()).unwrap();
    assert_eq!(mode(&aside), 0o700);
    for name in ["tapgate.db", "audit.db"] {
        assert_eq!((mode(&db.join(name)), mode(&aside.join(name))), (0o600, 0o600), "{name}");
    }
    assert_eq!(open(folder.path()).env(&user, "E").await.unwrap().value, "then");
    let before = Store::open(&aside, key()).unwrap();
    assert_eq!(before.env(&user, "E").await.unwrap().value, "now");
    drop(before);
    // Killed between the two: an empty store in its place would be taken for the whole one.
    std::fs::create_dir(db.join("restoring-1")).unwrap();
    drop(open(folder.path()));
    for name in ["tapgate.db", "audit.db"] {
        std::fs::rename(db.join(name), folder.path().join(name)).unwrap();
        let refused = Store::open(&db, key()).unwrap_err().to_string();
        assert!(refused.contains("cut off") && refused.contains("restore"), "{refused}");
        assert!(!db.join(name).exists());
        std::fs::rename(folder.path().join(name), db.join(name)).unwrap();
    }
    std::fs::remove_file(db.join("tapgate.db")).unwrap();
    // The folders' names have the second in them.
    std::thread::sleep(std::time::Duration::from_millis(1100));
    Store::restore(&db, &backup, key()).unwrap();
    assert_eq!(open(folder.path()).env(&user, "E").await.unwrap().value, "then");
    assert!(!db.join("restoring-1").exists());
}

/// Killed at each step once a restore was decided on: the next start has the backup, whole, and what was there before is kept.
#[tokio::test]
async fn a_restore_that_was_cut_off_is_completed_by_the_next_start() {
    const FILES: [&str; 2] = ["tapgate.db", "audit.db"];
    for steps in 0..=4 {
        let (folder, user, backup) = changed_since_its_backup().await;
        let db = folder.path().join("db");
        let (decided, aside) = (db.join("restored-1"), db.join("before-restore-1"));
        for made in [&decided, &aside] {
            std::fs::create_dir(made).unwrap();
        }
        for name in FILES {
            std::fs::copy(backup.join(name), decided.join(name)).unwrap();
        }
        let moves = FILES
            .iter()
            .flat_map(|name| [(db.join(name), aside.join(name)), (decided.join(name), db.join(name))]);
        for (from, to) in moves.take(steps) {
            let log = |path: &std::path::Path| path.with_extension("db-wal");
            if to.starts_with(&aside) && log(&from).exists() {
                std::fs::rename(log(&from), log(&to)).unwrap();
            }
            std::fs::rename(from, to).unwrap();
        }
        let inode =
            |path: std::path::PathBuf| std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap());
        let audit = if steps < 4 { inode(decided.join("audit.db")) } else { inode(db.join("audit.db")) };
        let store = open(folder.path());
        assert_eq!(store.env(&user, "E").await.unwrap().value, "then", "{steps}");
        assert_eq!(inode(db.join("audit.db")), audit, "{steps}");
        assert!(!decided.exists() && FILES.iter().all(|name| aside.join(name).exists()), "{steps}");
        let key = SealKey::load(&folder.path().join("seal.key")).unwrap();
        assert_eq!(Store::open(&aside, key).unwrap().env(&user, "E").await.unwrap().value, "now", "{steps}");
    }
}
