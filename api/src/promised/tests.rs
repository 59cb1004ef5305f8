//! The ledger with a disk that is only said: who gets room, who waits, who is refused.

use super::*;
use std::{
    pin::Pin,
    sync::atomic::{AtomicU64, Ordering},
    task::{Context, Waker},
};

const MIB: u64 = 1 << 20;

fn need(user: &UserId, mib: u64) -> Need {
    Need { user: user.clone(), octets: mib * MIB, places: Vec::new(), passes: true }
}

/// Whether it has no answer when it is asked.
fn waits<T>(asked: &mut Pin<Box<impl Future<Output = T>>>) -> bool {
    asked.as_mut().poll(&mut Context::from_waker(Waker::noop())).is_pending()
}

#[test]
fn of_many_at_once_each_sees_what_the_others_leave() {
    let (promised, user) = (Arc::new(Promised::default()), UserId::generate());
    let free = || 100 * MIB;
    let mut kept: Vec<Promise> = (0..3).map(|_| promised.now(need(&user, 30), free).unwrap()).collect();
    let lack = promised.now(need(&user, 30), free).unwrap_err();
    assert_eq!(lack, Lack { needs: 30 * MIB, free: 10 * MIB });
    let said = lack.to_string();
    assert!(said.contains("needs 30 MiB, 10 MiB free above the reserve"), "{said}");
    assert_eq!(promised.left(free), 10 * MIB);
    kept.pop();
    assert_eq!(promised.left(free), 40 * MIB, "it is given back");
    kept[0].is(10 * MIB);
    assert_eq!(promised.left(free), 60 * MIB);
}

#[test]
fn what_is_written_of_a_promise_counts_once() {
    let dir = tempfile::tempdir().unwrap();
    let (promised, user) = (Arc::new(Promised::default()), UserId::generate());
    let (one, folder) = (dir.path().join("one"), dir.path().join("folder"));
    std::fs::create_dir(&folder).unwrap();
    let places = vec![one.clone(), folder.clone()];
    let all = Need { places, ..need(&user, 30) };
    let promise = promised.now(all.clone(), || 100 * MIB).unwrap();
    for (file, mib) in [(one, 10), (folder.join("two"), 5)] {
        let file = std::fs::File::create(file).unwrap();
        nix::fcntl::fallocate(&file, nix::fcntl::FallocateFlags::empty(), 0, mib << 20).unwrap();
    }
    assert_eq!(promised.left(|| 85 * MIB), 70 * MIB);
    promise.holds(|| 15 * MIB).unwrap();
    let lack = promise.holds(|| 14 * MIB).unwrap_err();
    assert_eq!(lack, Lack { needs: 15 * MIB, free: 14 * MIB });
    promised.could_have(95 * MIB, || 80 * MIB).unwrap();
    promised.could_have(96 * MIB, || 80 * MIB).unwrap_err();
    drop(promise);
    // Whoever goes on with what is there needs the rest.
    assert_eq!(promised.now(all.clone(), || 14 * MIB).unwrap_err().needs, 15 * MIB);
    let _rest = promised.now(all, || 15 * MIB).unwrap();
}

#[tokio::test]
async fn who_finds_no_room_waits_while_others_may_give_back_and_no_longer() {
    let (promised, user) = (Arc::new(Promised::default()), UserId::generate());
    let free = || 100 * MIB;
    assert!(promised.wait(need(&user, 101), free).await.is_err(), "nobody would give it back");
    let first = promised.wait(need(&user, 60), free).await.unwrap();
    assert!(promised.wait(need(&user, 101), free).await.is_err(), "not even all of it would do");
    let mut second = Box::pin(promised.wait(need(&user, 60), free));
    assert!(waits(&mut second));
    drop(first);
    let second = second.await.unwrap();
    assert_eq!(promised.left(free), 40 * MIB);

    // What was free is not any more when the others have gone.
    let disk = AtomicU64::new(100 * MIB);
    let shrinking = || disk.load(Ordering::SeqCst);
    let mut third = Box::pin(promised.wait(need(&user, 60), shrinking));
    assert!(waits(&mut third));
    disk.store(50 * MIB, Ordering::SeqCst);
    drop(second);
    assert_eq!(third.await.unwrap_err(), Lack { needs: 60 * MIB, free: 50 * MIB });
}

#[tokio::test]
async fn one_account_that_asks_much_is_not_always_before_another() {
    let (promised, busy, other) = (Arc::new(Promised::default()), UserId::generate(), UserId::generate());
    let free = || 100 * MIB;
    let first = promised.wait(need(&busy, 50), free).await.unwrap();
    let _second = promised.wait(need(&busy, 50), free).await.unwrap();
    let mut many: Vec<_> = (0..5).map(|_| Box::pin(promised.wait(need(&busy, 50), free))).collect();
    for one in &mut many {
        assert!(waits(one));
    }
    let mut single = Box::pin(promised.wait(need(&other, 50), free));
    assert!(waits(&mut single));
    drop(first);
    for one in &mut many {
        assert!(waits(one), "it is not its turn");
    }
    let single = single.await.unwrap();
    drop(single);
    let mut many = many.into_iter();
    let _next = many.next().unwrap().await.unwrap();
    for mut one in many {
        assert!(waits(&mut one), "there is room for one");
    }
}
