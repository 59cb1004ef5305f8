//! Keys, device codes and tickets: each for one, for its purpose, and for its time.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use tapgate_store::*;

#[tokio::test]
async fn keys_authenticate_until_revoked() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let issued = store.key_create(&user, "ci", 2).await.unwrap();
    assert!(matches!(
        store.key_create(&user, "third", 2).await,
        Err(StoreError::Conflict(Conflict::Quota { what: "API keys", limit: 2 }))
    ));
    assert_eq!(store.authenticate(&issued.token).await.unwrap().unwrap().user, user);
    assert!(store.keys(&user).await.unwrap().iter().any(|key| key.last_used_at.is_some()));
    for wrong in ["", "iron_live_", "iron_live_x", &issued.token[1..], &format!("{}a", issued.token)] {
        assert!(store.authenticate(wrong).await.unwrap().is_none());
    }
    store.user_disable(&user, true).await.unwrap();
    assert!(store.authenticate(&issued.token).await.unwrap().is_none());
    store.user_disable(&user, false).await.unwrap();
    store.key_revoke(&user, &issued.record.id).await.unwrap();
    assert!(store.authenticate(&issued.token).await.unwrap().is_none());
    let again = store.key_revoke(&user, &issued.record.id).await;
    assert!(matches!(again, Err(StoreError::NotFound(Kind::ApiKey))));
    // Keys are made and revoked as often as anybody likes: nothing stays.
    let db = rusqlite::Connection::open(folder.path().join("db/tapgate.db")).unwrap();
    let rows = db.query_row("SELECT count(*) FROM api_keys", [], |row| row.get::<_, i64>(0)).unwrap();
    assert_eq!(rows, 1, "the first, which came with the account");
}

#[tokio::test]
async fn a_device_code_is_for_its_requester_and_once() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let code = store.device_code("192.0.2.1").await.unwrap().unwrap().code;
    let poll = async |from: &str| store.device_poll(&code, from, 10).await.unwrap();
    assert!(matches!(poll("192.0.2.1").await, DeviceState::Pending));
    store.device_confirm(&code.to_lowercase(), &user, 10).await.unwrap();
    assert!(store.device_confirm(&code, &user, 10).await.is_err(), "only once");
    assert!(matches!(poll("192.0.2.2").await, DeviceState::Expired), "another requester");
    let DeviceState::Authorized(token) = poll("192.0.2.1").await else { panic!("not authorized") };
    assert_eq!(store.authenticate(&token).await.unwrap().unwrap().user, user);
    assert!(matches!(poll("192.0.2.1").await, DeviceState::Expired), "handed out once");
    // Nor has a login room where the account has none.
    let code = store.device_code("192.0.2.1").await.unwrap().unwrap().code;
    let full = |error| matches!(error, StoreError::Conflict(Conflict::Quota { .. }));
    assert!(full(store.device_confirm(&code, &user, 2).await.unwrap_err()));
    store.device_confirm(&code, &user, 3).await.unwrap();
    let Err(error) = store.device_poll(&code, "192.0.2.1", 2).await else { panic!("a key too many") };
    assert!(full(error));
    let done = store.device_poll(&code, "192.0.2.1", 3).await.unwrap();
    assert!(matches!(done, DeviceState::Authorized(_)));
    for _ in 0..10 {
        store.device_code("192.0.2.9").await.unwrap().unwrap();
    }
    assert!(store.device_code("192.0.2.9").await.unwrap().is_none(), "too many open");
}

/// Fifteen minutes, whatever has become of it by then.
#[tokio::test]
async fn a_device_code_is_over_after_its_life() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let (open, confirmed) = (
        store.device_code("192.0.2.1").await.unwrap().unwrap(),
        store.device_code("192.0.2.1").await.unwrap().unwrap(),
    );
    let life = open.expires_at - now_us();
    assert!((890_000_000..=900_000_000).contains(&life), "{life}");
    store.device_confirm(&confirmed.code, &user, 10).await.unwrap();
    let db = rusqlite::Connection::open(folder.path().join("db/tapgate.db")).unwrap();
    // As if they had been asked for a life and a second ago.
    db.execute("UPDATE device_codes SET expires_at = expires_at - 901000000", []).unwrap();
    assert_eq!(store.device_pending(&open.code).await.unwrap(), None);
    assert!(matches!(
        store.device_confirm(&open.code, &user, 10).await,
        Err(StoreError::NotFound(Kind::ApiKey))
    ));
    for code in [&open.code, &confirmed.code] {
        assert!(matches!(store.device_poll(code, "192.0.2.1", 10).await.unwrap(), DeviceState::Expired));
    }
    assert_eq!(store.keys(&user).await.unwrap().len(), 1, "no key was made");
}

#[tokio::test]
async fn tickets_are_for_one_purpose_and_a_time() {
    let (folder, store) = fresh();
    let ticket = store.ticket("verify", "usr_a", now_us() + 60_000_000);
    assert_eq!(store.redeem("verify", &ticket).as_deref(), Some("usr_a"));
    assert_eq!(store.redeem("reset", &ticket), None);
    assert_eq!(store.redeem("verify", &store.ticket("verify", "usr_a", now_us() - 1)), None);
    for i in 0..ticket.len() {
        let mut changed = ticket.clone().into_bytes();
        changed[i] = if changed[i] == b'A' { b'B' } else { b'A' };
        let changed = String::from_utf8(changed).unwrap();
        assert!(changed == ticket || store.redeem("verify", &changed).is_none(), "{i}");
    }
    drop(store);
    assert_eq!(open(folder.path()).redeem("verify", &ticket).as_deref(), Some("usr_a"), "after a restart");
}
