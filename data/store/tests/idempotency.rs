//! Answers that are kept for retries: bounded, and what was stored is stored once.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use tapgate_store::*;

/// What an account's retries find is bounded in octets as well; a request that runs all the while is not run beside itself.
#[tokio::test]
async fn answers_for_retries_take_no_more_than_their_octets() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.idempotency_begin(&user, "slow", vec![1]).await.unwrap();
    for key in 0..40 {
        store.idempotency_begin(&user, &key.to_string(), vec![1]).await.unwrap();
        let answer = Some((201, vec![b'x'; 256 * 1024]));
        store.idempotency_end(&user, &key.to_string(), answer).await.unwrap();
    }
    let known = async |key: &str| store.idempotency_begin(&user, key, vec![1]).await.unwrap();
    assert!(matches!(known("slow").await, Known::Running));
    assert!(
        matches!(known("39").await, Known::Ended { .. }) && matches!(known("15").await, Known::Ended { .. })
    );
    assert!(matches!(known("0").await, Known::New));
}

/// What a request with a key stored is not stored again because its daemon ended before the answer was kept.
#[tokio::test]
async fn a_key_whose_request_was_cut_off_stores_nothing_twice() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    for key in ["stored", "nothing", "ended"] {
        assert!(matches!(store.idempotency_begin(&user, key, vec![1]).await.unwrap(), Known::New));
    }
    let set = async |name: &str| {
        store.env_set(&user, name, "value", 10, Expected::any()).await.unwrap();
    };
    tapgate_store::keyed(user.clone(), "stored".into(), set("A")).await;
    tapgate_store::keyed(user.clone(), "ended".into(), set("B")).await;
    store.idempotency_end(&user, "ended", Some((200, b"{}".to_vec()))).await.unwrap();
    let known = async |store: &Store, key| store.idempotency_begin(&user, key, vec![1]).await.unwrap();
    assert!(matches!(known(&store, "stored").await, Known::Running));
    // One that failed after it had stored something (a policy that is not in force yet) is not free either.
    assert!(matches!(store.idempotency_begin(&user, "failed", vec![1]).await.unwrap(), Known::New));
    tapgate_store::keyed(user.clone(), "failed".into(), set("C")).await;
    store.idempotency_end(&user, "failed", None).await.unwrap();
    assert!(matches!(known(&store, "failed").await, Known::Lost));
    drop(store);
    let store = open(folder.path());
    store.idempotency_cut_off(jiff::Timestamp::now()).await.unwrap();
    for _ in 0..2 {
        assert!(matches!(known(&store, "stored").await, Known::Lost));
    }
    assert!(matches!(known(&store, "nothing").await, Known::New));
    assert!(matches!(known(&store, "ended").await, Known::Ended { status: 200, .. }));
}
