//! Snapshots' records: what a deletion means for one that is being made, and when its bytes may go.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::{fresh, new_vm, user};
use std::collections::HashSet;
use std::slice::from_ref;
use tapgate_model::lifecycle::Call;
use tapgate_model::{SnapshotId, StatusDetail as S, UserId, VmId};
use tapgate_store::*;

async fn ready(store: &Store, new: NewVm) -> VmId {
    let vm = store.vm_create(new).await.unwrap().id;
    for state in [S::Starting, S::Running, S::Ready] {
        store.vm_advance(&vm, state, None).await.unwrap();
    }
    vm
}

async fn begin(store: &Store, user: &UserId, vm: &VmId) -> SnapshotId {
    let made = store.snapshot_create(user, vm, SnapshotKind::Disk, None, "debian-12", 50).await;
    made.unwrap().id
}

fn stored() -> StoredSnapshot {
    StoredSnapshot {
        key: "snapshots/x.qcow2.zst".into(),
        size_bytes: 1,
        sha256: "00".into(),
        file_bytes: 1,
        memory: None,
    }
}

async fn finish(store: &Store, snapshot: &SnapshotId) {
    assert!(store.snapshot_advance(snapshot, SnapshotStatus::Uploading, None).await.unwrap());
    store.snapshot_stored(snapshot, stored()).await.unwrap();
}

async fn free(store: &Store) -> Vec<SnapshotId> {
    store.snapshots_to_collect(|_| true, HashSet::new()).await.unwrap()
}

#[tokio::test]
async fn a_snapshot_that_was_deleted_while_it_was_made_stays_so() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let vm = ready(&store, new_vm(&user, "a")).await;

    // While it is copied.
    let copied = begin(&store, &user, &vm).await;
    store.snapshot_delete(&user, &copied).await.unwrap();
    assert_eq!(free(&store).await, from_ref(&copied));
    store.snapshot_collected(&copied).await.unwrap();
    assert!(!store.snapshot_advance(&copied, SnapshotStatus::Uploading, None).await.unwrap());
    assert!(!store.snapshot_advance(&copied, SnapshotStatus::Failed, Some("x".into())).await.unwrap());
    assert_eq!(store.snapshot_any(&copied).await.unwrap().status, SnapshotStatus::Failed);
    assert!(store.snapshots_unfinished().await.unwrap().is_empty());
    // Whatever is stored in spite of that is found again.
    store.snapshot_stored(&copied, stored()).await.unwrap();
    assert_eq!(free(&store).await, from_ref(&copied));
    store.snapshot_collected(&copied).await.unwrap();
    assert!(free(&store).await.is_empty());

    // While it is stored: its end is awaited, whichever that is.
    for works in [true, false] {
        let stores = begin(&store, &user, &vm).await;
        assert!(store.snapshot_advance(&stores, SnapshotStatus::Uploading, None).await.unwrap());
        assert!(!store.snapshot_advance(&stores, SnapshotStatus::Uploading, None).await.unwrap());
        store.snapshot_delete(&user, &stores).await.unwrap();
        assert!(free(&store).await.is_empty(), "its bytes are on their way");
        match works {
            true => store.snapshot_stored(&stores, stored()).await.unwrap(),
            false => {
                let failed = store.snapshot_advance(&stores, SnapshotStatus::Failed, Some("x".into())).await;
                assert!(failed.unwrap());
            }
        }
        assert_eq!(free(&store).await, from_ref(&stores));
        store.snapshot_collected(&stores).await.unwrap();
    }

    // What ended before it was whole is not begun again by a copy that comes late.
    let late = begin(&store, &user, &vm).await;
    store.vm_advance(&vm, S::Failed, Some("it broke".into())).await.unwrap();
    assert!(!store.snapshot_advance(&late, SnapshotStatus::Uploading, None).await.unwrap());
    let late = store.snapshot_any(&late).await.unwrap();
    assert!(late.failure.unwrap().contains("ended before"), "{:?}", late.status);
    let error = store.snapshot_advance(&late.id, SnapshotStatus::Ready, None).await.unwrap_err();
    assert!(matches!(error, StoreError::Internal(_)), "{error}");
}

#[tokio::test]
async fn a_deleted_snapshot_is_kept_for_a_vm_that_has_no_disk_yet() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let parent = ready(&store, new_vm(&user, "parent")).await;
    let [one, other] = [begin(&store, &user, &parent).await, begin(&store, &user, &parent).await];
    for snapshot in [&one, &other] {
        finish(&store, snapshot).await;
    }
    let of = |name: &str| NewVm { snapshot: Some(one.clone()), ..new_vm(&user, name) };
    let [failed, stopped] = ["failed", "stopped"].map(of);
    let failed = store.vm_create(failed).await.unwrap().id;
    let stopped = store.vm_create(stopped).await.unwrap().id;
    for snapshot in [&one, &other] {
        store.snapshot_delete(&user, snapshot).await.unwrap();
    }
    let free = async |with_disk: &[&VmId]| {
        let with_disk: Vec<VmId> = with_disk.iter().map(|vm| (*vm).clone()).collect();
        store.snapshots_to_collect(move |vm| with_disk.contains(vm), HashSet::new()).await.unwrap()
    };
    assert_eq!(free(&[&failed, &stopped]).await, from_ref(&other), "they are being made");

    store.vm_advance(&failed, S::Failed, Some("the store is down".into())).await.unwrap();
    store.vm_call(&user, &stopped, Call::Stop).await.unwrap();
    assert_eq!(free(&[]).await, from_ref(&other));
    store.vm_advance(&stopped, S::Stopped, None).await.unwrap();
    assert_eq!(free(&[&failed]).await, from_ref(&other));
    assert_eq!(free(&[&stopped]).await, from_ref(&other));
    assert_eq!(free(&[&failed, &stopped]).await, [one.clone(), other.clone()]);
    for vm in [&failed, &stopped] {
        store.vm_call(&user, vm, Call::Destroy).await.unwrap();
    }
    assert_eq!(free(&[]).await, [one.clone(), other.clone()], "nobody starts them again");
}

#[tokio::test]
async fn a_snapshots_disk_is_as_large_as_any_that_it_comes_from() {
    let (_folder, store) = fresh();
    let user = user(&store, "a@example.com").await;
    let sized = |name: &str, gib: u64, snapshot: Option<&SnapshotId>| {
        let new = new_vm(&user, name);
        let resources = Resources { disk_bytes: gib << 30, ..new.resources };
        NewVm { resources, snapshot: snapshot.cloned(), ..new }
    };
    let mut before: Option<SnapshotId> = None;
    // The third was recorded smaller than its disk is.
    for (name, gib, least) in [("a", 4, 4), ("b", 16, 16), ("c", 1, 16), ("d", 32, 32)] {
        let vm = ready(&store, sized(name, gib, before.as_ref())).await;
        let snapshot = begin(&store, &user, &vm).await;
        finish(&store, &snapshot).await;
        assert_eq!(store.snapshot_disk_bytes(&snapshot).await.unwrap(), least << 30, "{name}");
        before = Some(snapshot);
    }
}
