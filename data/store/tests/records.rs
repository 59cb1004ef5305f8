//! The store on real files: what is written is there, sealed, unique, paged, and one account's alone.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
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
