//! Agents' records: they go with their VMs, and their reports only forward.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use tapgate_model::StatusDetail as S;
use tapgate_model::lifecycle::Call;
use tapgate_store::*;

#[tokio::test]
async fn an_agent_goes_with_its_vm() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let new = |name: &str| NewAgent {
        name: name.into(),
        repo: "https://example.com/r".into(),
        branch: None,
        harness: "claude".into(),
        prompt: "p".into(),
        agent_args: None,
        vm: new_vm(&user, &format!("agent-{name}")),
    };
    let agent = store.agent_create(new("a")).await.unwrap();
    assert!(matches!(store.agent_create(new("a")).await, Err(StoreError::Conflict(Conflict::AgentName))));
    assert_eq!(store.vms_living().await.unwrap().len(), 1, "the refused agent left no VM");
    store.vm_advance(&agent.vm, S::Ready, None).await.unwrap_err();
    let vm = store.agent_destroy(&user, &agent.id).await.unwrap();
    assert_eq!(store.vm(&user, &vm).await.unwrap().detail, S::Destroying);
    assert!(matches!(store.agent(&user, &agent.id).await, Err(StoreError::NotFound(Kind::Agent))));
    store.agent_create(new("a")).await.unwrap();
}

#[tokio::test]
async fn an_agents_reports_go_forward_and_end_with_its_vm() {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    let user = user(&store, "a@example.com").await;
    let agent = |name: &str| NewAgent {
        name: name.into(),
        repo: "o/r".into(),
        branch: None,
        harness: "claude".into(),
        prompt: "p".into(),
        agent_args: None,
        vm: new_vm(&user, &format!("agent-{name}")),
    };
    let one = store.agent_create(agent("one")).await.unwrap();
    let report = async |vm: &_, status, failure: Option<&str>| {
        store.agent_report(vm, status, failure.map(str::to_owned)).await
    };
    store.agent_hindered(&one.vm, "no guest agent".into()).await.unwrap();
    assert_eq!(store.agent(&user, &one.id).await.unwrap().failure.as_deref(), Some("no guest agent"));
    assert_eq!(report(&one.vm, AgentStatus::Running, Some("x")).await.unwrap().failure, None);
    assert!(matches!(
        report(&one.vm, AgentStatus::Provisioning, None).await,
        Err(StoreError::Illegal { from: "running", to: "provisioning" })
    ));
    let ended = report(&one.vm, AgentStatus::Idle, Some("first")).await.unwrap();
    assert_eq!(ended.failure.as_deref(), Some("first"));
    assert_eq!(report(&one.vm, AgentStatus::Idle, None).await.unwrap().failure.as_deref(), Some("first"));
    assert!(report(&one.vm, AgentStatus::Running, None).await.is_err());

    let two = store.agent_create(agent("two")).await.unwrap();
    store.vm_advance(&two.vm, S::Failed, Some("no disk".into())).await.unwrap();
    let hindered = store.agent(&user, &two.id).await.unwrap();
    assert_eq!(
        (hindered.status, hindered.failure.as_deref()),
        (AgentStatus::Provisioning, Some("its VM failed: no disk"))
    );
    store.vm_call(&user, &two.vm, Call::Start).await.unwrap();
    assert_eq!(store.agent(&user, &two.id).await.unwrap().failure, None, "it has another chance");
    store.vm_advance(&two.vm, S::Running, None).await.unwrap();
    report(&two.vm, AgentStatus::Running, None).await.unwrap();
    store.vm_call(&user, &two.vm, Call::Stop).await.unwrap();
    store.vm_advance(&two.vm, S::Stopped, None).await.unwrap();
    let ended = store.agent(&user, &two.id).await.unwrap();
    assert_eq!(ended.status, AgentStatus::Idle);
    assert!(ended.failure.unwrap().contains("stopped"));

    // Destroyed while it still stops, and before it ran: nobody reports anything of it any more.
    for (name, running) in [("three", true), ("four", false)] {
        let last = store.agent_create(agent(name)).await.unwrap();
        if running {
            store.vm_advance(&last.vm, S::Running, None).await.unwrap();
            report(&last.vm, AgentStatus::Running, None).await.unwrap();
        }
        store.vm_call(&user, &last.vm, Call::Stop).await.unwrap();
        store.vm_call(&user, &last.vm, Call::Destroy).await.unwrap();
        store.vm_advance(&last.vm, S::Stopped, None).await.unwrap_err();
        store.vm_advance(&last.vm, S::Destroyed, None).await.unwrap();
        let ended = store.agent(&user, &last.id).await.unwrap();
        let reason = ended.failure.as_deref();
        assert_eq!((ended.status, reason), (AgentStatus::Idle, Some("its VM was destroyed")), "{name}");
    }
    // What ended it first stays.
    store.vm_call(&user, &one.vm, Call::Stop).await.unwrap();
    store.vm_call(&user, &one.vm, Call::Destroy).await.unwrap();
    let first = store.agent(&user, &one.id).await.unwrap();
    assert_eq!((first.status, first.failure.as_deref()), (AgentStatus::Idle, Some("first")));
}
