//! What stays of VMs and agents that are destroyed: little, and nobody has any number of those that are on their way.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use tapgate_model::lifecycle::{Call, Refusal};
use tapgate_model::{RuleTarget, StatusDetail as S};
use tapgate_store::*;

fn agent(vm: NewVm) -> NewAgent {
    NewAgent {
        name: "a".into(),
        repo: "https://example.com/r".into(),
        branch: Some("main".into()),
        harness: "claude".into(),
        prompt: "the task of an agent".into(),
        agent_args: Some("--and-more".into()),
        vm,
    }
}

/// Made and destroyed over and over, faster than they go: each holds an address and a disk.
#[tokio::test]
async fn vms_that_are_being_destroyed_are_counted_too() {
    let (_folder, store) = fresh();
    let (one, other) = (user(&store, "a@example.com").await, user(&store, "b@example.com").await);
    let mut going = Vec::new();
    for _ in 0..4 {
        let vm = store.vm_create(NewVm { quota: 2, ..new_vm(&one, "vm") }).await.unwrap().id;
        store.vm_call(&one, &vm, Call::Stop).await.unwrap();
        store.vm_call(&one, &vm, Call::Destroy).await.unwrap();
        going.push(vm);
    }
    let over = store.vm_create(NewVm { quota: 2, ..new_vm(&one, "vm") }).await;
    assert!(matches!(over, Err(StoreError::Conflict(Conflict::Quota { .. }))), "{over:?}");
    store.vm_create(NewVm { quota: 2, ..new_vm(&other, "vm") }).await.unwrap();
    store.vm_advance(&going[0], S::Destroyed, None).await.unwrap();
    store.vm_create(NewVm { quota: 2, ..new_vm(&one, "vm") }).await.unwrap();
}

/// Its rules went with it; one that comes after that would keep its name taken.
#[tokio::test]
async fn a_vm_that_was_destroyed_gets_no_rule() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let vm = store.vm_create(new_vm(&user, "vm")).await.unwrap().id;
    let rule = || NewRule {
        name: Some("name".into()),
        target: RuleTarget::Host("example.com".parse().unwrap()),
        comment: None,
    };
    store.rule_create(&user, Some(&vm), rule(), 10).await.unwrap();
    store.vm_call(&user, &vm, Call::Stop).await.unwrap();
    store.vm_call(&user, &vm, Call::Destroy).await.unwrap();
    let late = store.rule_create(&user, Some(&vm), rule(), 10).await;
    assert!(matches!(late, Err(StoreError::Conflict(Conflict::State(Refusal::Destroyed)))), "{late:?}");
    store.rule_create(&user, None, rule(), 10).await.unwrap();
}

/// Their records are kept for good.
#[tokio::test]
async fn what_was_destroyed_keeps_no_keys_and_no_task() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let agent = store.agent_create(agent(new_vm(&user, "agent-a"))).await.unwrap();
    store.agent_destroy(&user, &agent.id).await.unwrap();
    store.vm_advance(&agent.vm, S::Destroyed, None).await.unwrap();
    let shown = store.vm(&user, &agent.vm).await.unwrap();
    assert_eq!((shown.name.as_str(), shown.detail), ("agent-a", S::Destroyed));
    assert!(shown.public_key.is_empty());
    let db = rusqlite::Connection::open(folder.path().join("db/tapgate.db")).unwrap();
    let text = |sql: &str| db.query_row(sql, [], |row| row.get::<_, String>(0)).unwrap();
    assert_eq!(
        text("SELECT prompt || repo || coalesce(branch, '') || coalesce(agent_args, '') FROM agents"),
        ""
    );
    assert_eq!(text("SELECT public_key || ca_cert FROM vms"), "");
}
