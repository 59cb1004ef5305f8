//! The store on real files: what is written is there, sealed, unique, paged, and one account's alone.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::Arc;
use tapgate_model::lifecycle::{Call, Refusal};
use tapgate_model::policy::SecretsOverHttp;
use tapgate_model::{Mode, RuleTarget, StatusDetail as S, VmId, VmPolicy};
use tapgate_store::*;

fn rule(target: &str, name: Option<&str>) -> NewRule {
    let target = match target.parse() {
        Ok(cidr) => RuleTarget::Cidr(cidr),
        Err(_) => RuleTarget::Host(target.parse().unwrap()),
    };
    NewRule { name: name.map(str::to_owned), target, comment: None }
}

#[tokio::test]
async fn nothing_secret_is_readable_in_the_files() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.secret_create(&user, new_secret("s", "S", "ghp_very_secret"), secrets(10)).await.unwrap();
    store.env_set(&user, "E", "env_very_secret", 10, Expected::any()).await.unwrap();
    store.vm_create(new_vm(&user, "vm")).await.unwrap();
    let issued = store.key_create(&user, "k", 10).await.unwrap();
    for entry in std::fs::read_dir(folder.path().join("db")).unwrap() {
        let path = entry.unwrap().path();
        let bytes = std::fs::read(&path).unwrap();
        for secret in ["ghp_very_secret", "env_very_secret", "ca key of a VM", &issued.token] {
            let found = bytes.windows(secret.len()).any(|window| window == secret.as_bytes());
            assert!(!found, "{secret} in {}", path.display());
        }
    }
}

#[tokio::test]
async fn another_key_is_refused_at_start() {
    let (folder, store) = fresh();
    drop(store);
    let other = SealKey::load_or_create(&folder.path().join("other.key")).unwrap();
    let error = Store::open(&folder.path().join("db"), other).unwrap_err();
    assert!(error.to_string().contains("does not fit"), "{error}");
}

#[tokio::test]
async fn names_addresses_and_ports_are_unique_while_a_vm_lives() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let one = store.vm_create(new_vm(&user, "one")).await.unwrap();
    let two = store.vm_create(new_vm(&user, "two")).await.unwrap();
    assert_eq!((one.slot, two.slot), (0, 1));
    assert_eq!((one.ssh_port, two.ssh_port), (2200, 2201));
    assert!(matches!(
        store.vm_create(new_vm(&user, "one")).await,
        Err(StoreError::Conflict(Conflict::VmName))
    ));

    store.vm_call(&user, &one.id, Call::Stop).await.unwrap();
    store.vm_call(&user, &one.id, Call::Destroy).await.unwrap();
    let again = store.vm_create(new_vm(&user, "one")).await.unwrap();
    assert_eq!(again.slot, 2, "the address is free only when destruction is done");
    store.vm_advance(&one.id, S::Destroyed, None).await.unwrap();
    assert_eq!(store.vm_create(new_vm(&user, "three")).await.unwrap().slot, 0);

    let mut full = new_vm(&user, "four");
    full.slots = 3;
    assert!(matches!(store.vm_create(full).await, Err(StoreError::Conflict(Conflict::HostFull))));
    let mut many = new_vm(&user, "four");
    many.quota = 3;
    assert!(matches!(store.vm_create(many).await, Err(StoreError::Conflict(Conflict::Quota { .. }))));
}

/// Its name is free at once, but not what its guest has until that has ended.
#[tokio::test]
async fn a_vm_that_is_destroyed_counts_until_its_vmm_is_gone() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let old = store.vm_create(new_vm(&user, "vm")).await.unwrap();
    store.vm_advance(&old.id, S::Starting, None).await.unwrap();
    store.vm_set_handle(&old.id, Some("{}".into())).await.unwrap();
    store.vm_call(&user, &old.id, Call::Stop).await.unwrap();
    store.vm_call(&user, &old.id, Call::Destroy).await.unwrap();
    let mut again = new_vm(&user, "vm");
    again.quota = 1;
    let mut narrow = new_vm(&user, "vm");
    narrow.capacity.memory_mib = 600;
    let over = store.vm_create(again.clone()).await;
    assert!(matches!(over, Err(StoreError::Conflict(Conflict::Quota { .. }))), "{over:?}");
    let over = store.vm_create(narrow.clone()).await;
    assert!(matches!(over, Err(StoreError::Conflict(Conflict::HostMemory { .. }))), "{over:?}");
    store.vm_set_handle(&old.id, None).await.unwrap();
    let new = store.vm_create(again).await.unwrap();
    store.vm_call(&user, &new.id, Call::Stop).await.unwrap();
    store.vm_advance(&new.id, S::Stopped, None).await.unwrap();
    narrow.name = "other".into();
    store.vm_create(narrow).await.unwrap();
}

#[tokio::test]
async fn calls_and_reports_follow_the_state_machine() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let vm = store.vm_create(new_vm(&user, "vm")).await.unwrap().id;
    for state in [S::Starting, S::Running, S::Ready] {
        store.vm_advance(&vm, state, None).await.unwrap();
    }
    assert!(matches!(
        store.vm_call(&user, &vm, Call::Destroy).await,
        Err(StoreError::Conflict(Conflict::State(Refusal::NotStopped)))
    ));
    let (stopping, changed) = store.vm_call(&user, &vm, Call::Stop).await.unwrap();
    assert!(changed && stopping.detail == S::Stopping && stopping.desired == Desired::Stopped);
    assert!(matches!(
        store.vm_advance(&vm, S::Ready, None).await,
        Err(StoreError::Illegal { from: "stopping", to: "ready" })
    ));
    store.vm_advance(&vm, S::Failed, Some("it broke".into())).await.unwrap();
    assert_eq!(store.vm(&user, &vm).await.unwrap().failure.as_deref(), Some("it broke"));
    let (starting, _) = store.vm_call(&user, &vm, Call::Start).await.unwrap();
    assert_eq!((starting.detail, starting.failure), (S::Starting, None));
}

#[tokio::test]
async fn the_effective_policy_is_whole_and_its_generation_rises() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let vm = store.vm_create(new_vm(&user, "vm")).await.unwrap().id;
    let get = async || store.effective_policy(&vm, SecretsOverHttp::Explicit).await.unwrap();
    let first = get().await;
    assert_eq!(first.mode, Mode::Enforce);
    assert!(!first.rules.has_hosts() && first.rules.cidrs().count() == 0);

    let mut last = first.generation;
    let mut risen = async |what: &str| {
        let policy = get().await;
        assert!(policy.generation > last, "{what}");
        last = policy.generation;
        policy
    };
    let account = store.rule_create(&user, None, rule("a.example", Some("a")), 10).await.unwrap();
    assert!(risen("account rule").await.rules.has_hosts());
    store.rule_create(&user, Some(&vm), rule("192.0.2.0/24", None), 10).await.unwrap();
    assert_eq!(risen("VM rule").await.rules.cidrs().count(), 1);
    store.vm_egress_set(&user, &vm, Some(Mode::Warn), false, Expected::any()).await.unwrap();
    let own = risen("VM policy").await;
    assert_eq!(own.mode, Mode::Warn);
    assert!(!own.rules.has_hosts(), "the account's rules no longer hold");
    let secret = store.secret_create(&user, new_secret("s", "S", "value"), secrets(10)).await.unwrap();
    let with = risen("secret").await;
    assert_eq!(with.secrets[0].value.expose(), b"value");
    store
        .secret_update(
            &user,
            &secret.id,
            SecretChange {
                value: Some(tapgate_model::SecretValue::new(b"other".to_vec()).unwrap()),
                ..SecretChange::default()
            },
            Expected::any(),
            secrets(10),
        )
        .await
        .unwrap();
    assert_eq!(risen("secret changed").await.secrets[0].value.expose(), b"other");
    store.secret_delete(&user, &secret.id, Expected::any()).await.unwrap();
    assert!(risen("secret deleted").await.secrets.is_empty());
    store.rule_delete(&user, None, &account.id).await.unwrap();
    risen("rule deleted").await;
    store.policy_set(&user, Mode::Warn, Expected::any()).await.unwrap();
    risen("account mode").await;
}

#[tokio::test]
async fn policies_share_what_did_not_change_and_nothing_that_did() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let mut vms = Vec::new();
    for name in ["a", "b", "apart"] {
        vms.push(store.vm_create(new_vm(&user, name)).await.unwrap().id);
    }
    store.vm_egress_set(&user, &vms[2], None, false, Expected::any()).await.unwrap();
    let account = store.rule_create(&user, None, rule("198.51.100.0/24", None), 10).await.unwrap();
    store.rule_create(&user, Some(&vms[0]), rule("192.0.2.0/24", None), 10).await.unwrap();
    store.secret_create(&user, new_secret("s", "S", "value"), secrets(10)).await.unwrap();
    let read = async |vm: Option<&VmId>, known: &[Arc<VmPolicy>]| -> Vec<Arc<VmPolicy>> {
        let known = known.iter().map(|policy| (policy.vm.clone(), policy.clone())).collect();
        let read = store.effective_policies(&user, vm, SecretsOverHttp::Never, known).await.unwrap();
        read.into_iter().map(Arc::new).collect()
    };
    let first = read(None, &[]).await;
    assert_eq!(first.iter().map(|policy| &policy.vm).collect::<Vec<_>>(), vms.iter().collect::<Vec<_>>());
    assert!(Arc::ptr_eq(first[0].rules.account(), first[1].rules.account()));
    assert_eq!(first[2].rules.cidrs().count(), 0);

    // One VM's own rule: its own part is new, everything else is what it was.
    store.rule_create(&user, Some(&vms[0]), rule("203.0.113.0/24", None), 10).await.unwrap();
    let second = read(None, &first).await;
    assert_eq!(second[0].rules.cidrs().count(), 3);
    assert!(second[0].generation > first[0].generation);
    assert!(Arc::ptr_eq(first[1].rules.own(), second[1].rules.own()));
    for (old, new) in first.iter().zip(&second) {
        assert!(Arc::ptr_eq(old.rules.account(), new.rules.account()));
        assert!(Arc::ptr_eq(&old.secrets, &new.secrets));
    }
    // One VM alone shares with the others.
    let alone = read(Some(&vms[1]), &second[..1]).await;
    assert_eq!(alone.len(), 1);
    assert!(Arc::ptr_eq(alone[0].rules.account(), second[0].rules.account()));

    // The account's mode: no rule is new.
    store.policy_set(&user, Mode::Warn, Expected::any()).await.unwrap();
    let third = read(None, &second).await;
    for (old, new) in second.iter().zip(&third) {
        assert_eq!(new.mode, Mode::Warn);
        assert!(new.generation > old.generation);
        assert!(Arc::ptr_eq(old.rules.own(), new.rules.own()));
        assert!(Arc::ptr_eq(old.rules.account(), new.rules.account()));
    }
    // The account's rule goes, and comes back as another: whoever inherits has that.
    store.rule_delete(&user, None, &account.id).await.unwrap();
    let fourth = read(None, &third).await;
    assert_eq!(fourth[0].rules.cidrs().count(), 2);
    assert_eq!(fourth[1].rules.cidrs().count(), 0);
    let again = store.rule_create(&user, None, rule("198.51.100.0/24", None), 10).await.unwrap();
    let fifth = read(None, &fourth).await;
    let named = |policy: &VmPolicy| policy.rules.cidr("198.51.100.1".parse().unwrap()).cloned();
    assert_eq!(
        (named(&fifth[0]), named(&fifth[1]), named(&fifth[2])),
        (Some(again.id.clone()), Some(again.id), None)
    );
    store.vm_egress_set(&user, &vms[2], None, true, Expected::any()).await.unwrap();
    assert!(named(&read(None, &fifth).await[2]).is_some());
}

#[tokio::test]
async fn pages_stay_right_while_rows_come_and_go() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let mut ids = Vec::new();
    for i in 0..25 {
        ids.push(store.rule_create(&user, None, rule(&format!("h{i}.example"), None), 100).await.unwrap().id);
    }
    let list = async |cursor: Option<String>| {
        let page = PageRequest { limit: 10, cursor, order: Order::Asc };
        store.rules(&user, None, RuleFilter::default(), RuleSort::Created, page).await
    };
    let first = list(None).await.unwrap();
    store.rule_delete(&user, None, &ids[9]).await.unwrap();
    store.rule_delete(&user, None, &ids[15]).await.unwrap();
    let second = list(first.cursor.clone()).await.unwrap();
    let third = list(second.cursor.clone()).await.unwrap();
    let seen: Vec<_> = [&first, &second, &third]
        .into_iter()
        .flat_map(|page| page.items.iter().map(|r| r.id.clone()))
        .collect();
    let expected: Vec<_> =
        ids.iter().enumerate().filter(|(i, _)| *i != 15).map(|(_, id)| id.clone()).collect();
    assert_eq!(seen, expected);
    assert!(third.cursor.is_none());

    // Another query's cursor, another user's, a changed one, rubbish.
    let cursor = first.cursor.unwrap();
    let foreign = PageRequest { limit: 10, cursor: Some(cursor.clone()), order: Order::Desc };
    let refused = store.rules(&user, None, RuleFilter::default(), RuleSort::Created, foreign).await;
    assert!(matches!(refused, Err(StoreError::Cursor)));
    let other = common::user(&store, "b@example.com").await;
    let page = PageRequest { limit: 10, cursor: Some(cursor.clone()), order: Order::Asc };
    let refused = store.rules(&other, None, RuleFilter::default(), RuleSort::Created, page).await;
    assert!(matches!(refused, Err(StoreError::Cursor)));
    let mut changed = cursor.clone().into_bytes();
    changed[20] ^= 1;
    for broken in [String::from_utf8(changed).unwrap(), "ee_p3xn7vm2".into(), String::new(), "é".into()] {
        assert!(matches!(list(Some(broken)).await, Err(StoreError::Cursor)));
    }
}

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

#[tokio::test]
async fn a_backup_is_put_back_and_what_was_there_is_kept() {
    let (folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    store.env_set(&user, "E", "then", 10, Expected::any()).await.unwrap();
    let backup = folder.path().join("backup");
    store.backup(&backup).await.unwrap();
    store.env_set(&user, "E", "now", 10, Expected::any()).await.unwrap();
    drop(store);
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
        let (folder, store) = fresh();
        let user = user(&store, "a@example.com").await;
        store.env_set(&user, "E", "then", 10, Expected::any()).await.unwrap();
        let backup = folder.path().join("backup");
        store.backup(&backup).await.unwrap();
        store.env_set(&user, "E", "now", 10, Expected::any()).await.unwrap();
        drop(store);
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
