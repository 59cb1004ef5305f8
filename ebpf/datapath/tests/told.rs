//! What is told of what VMs try: everything once, counted where it goes on, none of it lost without a count, and nobody's
//! told of another.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use aya::maps::HashMap;
use common::*;
use std::time::{Duration, Instant};
use tapgate_datapath::{Datapath, DatapathError, Event, monotonic};
use tapgate_ebpf_common::{
    Reason,
    maps::{Address, AttemptKey, MAX_ATTEMPTS, MAX_VMS},
};
use tapgate_model::{Mode, Verdict};

/// How many attempts by UDP the events stand for: a guest's own kernel sends others.
fn count(told: &[Event]) -> u64 {
    told.iter().filter(|event| event.ip_protocol == 17).map(|event| u64::from(event.count)).sum()
}

/// Attempts of a VM that no daemon of this life knows.
fn foreign(number: u32) -> AttemptKey {
    AttemptKey { slot: MAX_VMS - 1, destination: Address([0, 0, 0, number]), ..AttemptKey::default() }
}

#[test]
fn a_flood_is_told_once_a_second_with_its_count_and_hides_nobody_else() {
    in_world(|world| async move {
        let datapath: Datapath = world.open().await;
        let mut events = datapath.events().unwrap();
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let b = guest(&datapath, 1, Mode::Enforce, &[]).await;
        let flood = a.udp();
        for _ in 0..5000 {
            let _ = flood.send_to(b"x", "203.0.113.1:9");
        }
        let _ = b.udp().send_to(b"x", "203.0.113.1:9");
        let dropped = || datapath.counters(0).unwrap().dropped(Reason::NoRule);
        let (mut of_a, mut told, mut of_b) = (0, 0, 0);
        let until = Instant::now() + PATIENCE;
        while of_b == 0 || told == 0 || told != dropped() {
            assert!(Instant::now() < until, "{told} of {} told in {of_a} events", dropped());
            let wait = tokio::time::timeout(Duration::from_millis(500), events.next()).await;
            let Ok(event) = wait.map(Result::unwrap) else { continue };
            assert_eq!((event.destination, event.port), (ip(OTHER), Some(9)));
            assert_eq!(event.verdict, Verdict::Deny { reason: Reason::NoRule });
            match event.slot {
                0 => (of_a, told) = (of_a + 1, told + u64::from(event.count)),
                _ => of_b += 1,
            }
        }
        assert_eq!(of_b, 1);
        assert!(of_a < 60, "{of_a} events for one destination");
        assert_eq!(datapath.counters(0).unwrap().events_lost, 0);

        // Another reader takes over: nothing is told twice, and what was tried meanwhile is told.
        drop(events);
        for _ in 0..100 {
            let _ = flood.send_to(b"x", "203.0.113.1:9");
        }
        let mut events = datapath.events().unwrap();
        while told != dropped() {
            assert!(Instant::now() < until + PATIENCE && told < dropped(), "{told} of {}", dropped());
            let wait = tokio::time::timeout(Duration::from_millis(500), events.next()).await;
            told += wait.map_or(0, |event| u64::from(event.unwrap().count));
        }
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn a_flood_to_everywhere_is_told_as_far_as_it_goes_and_the_rest_is_counted() {
    in_world(|world| async move {
        let datapath: Datapath = world.open().await;
        let mut events = datapath.events().unwrap();
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let flood = a.udp();
        // Until the gateway's MAC address is known, the guest's kernel keeps a few hundred frames and drops the rest.
        flood.send_to(b"x", "203.0.113.1:999").unwrap();
        eventually("the gateway is found", || datapath.counters(0).unwrap().dropped(Reason::NoRule) > 0);
        for port in 1000..5000 {
            let _ = flood.send_to(b"x", ("203.0.113.1", port));
        }
        let mut told = 0;
        let all = |told: u64| {
            let counters = datapath.counters(0).unwrap();
            counters.dropped(Reason::NoRule) == told + counters.events_lost
        };
        let until = Instant::now() + PATIENCE;
        while told < 1024 || !all(told) {
            assert!(Instant::now() < until, "{told} told, {:?}", datapath.counters(0));
            let wait = tokio::time::timeout(Duration::from_millis(500), events.next()).await;
            told += wait.map_or(0, |event| u64::from(event.unwrap().count));
        }
        assert!(datapath.counters(0).unwrap().events_lost > 0, "{told}");
        datapath.teardown().await.unwrap();
    });
}

/// Everything that was tried can be told at once, before a VM's slot and its counts go.
#[test]
fn what_a_guest_tried_last_is_told_before_it_goes() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let mut events = datapath.events().unwrap();
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        events.rest(|slot| slot == 0, &mut Vec::new()).unwrap();
        let before = monotonic();
        let socket = a.udp();
        for port in 10_000..10_700 {
            socket.send_to(b"x", ("203.0.113.1", port)).unwrap();
        }
        let mut told = Vec::new();
        events.rest(|slot| slot == 0, &mut told).unwrap();
        let own = told.iter().filter(|event| event.ip_protocol == 17 && event.moment + 50_000_000 > before);
        let told: u64 = own.map(|event| u64::from(event.count)).sum();
        assert_eq!(told + datapath.counters(0).unwrap().events_lost, 700);
        assert!(told > 512, "{told}");
        datapath.teardown().await.unwrap();
    });
}

/// A look that fails in the middle: what it had taken by then is there only once.
#[test]
fn what_is_told_before_a_look_fails_is_neither_lost_nor_told_twice() {
    in_world(|world| async move {
        const PORTS: u16 = 20;
        let datapath = world.open().await;
        let mut events = datapath.events().unwrap();
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let socket = a.udp();
        // The first of each port is told by the ring, the two after it are counted.
        for port in (0..PORTS).flat_map(|number| [9000 + number; 3]) {
            socket.send_to(b"x", ("203.0.113.1", port)).unwrap();
        }
        let dropped = || datapath.counters(0).unwrap().dropped(Reason::NoRule);
        eventually("all are dropped", || dropped() == u64::from(PORTS) * 3);
        let mut notes: HashMap<_, AttemptKey, u64> = HashMap::try_from(map(&world, "ATTEMPTS_TOLD")).unwrap();
        let filled = fill(MAX_ATTEMPTS, |number| notes.insert(foreign(number), 1, 0));
        // There is room for some of the counts.
        for number in 0..5 {
            notes.remove(&foreign(number)).unwrap();
        }
        let mut told = Vec::new();
        assert!(matches!(events.rest(|slot| slot == 0, &mut told), Err(DatapathError::Map { .. })));
        let first = count(&told);
        assert!((u64::from(PORTS) + 2..dropped()).contains(&first), "{first}");
        for number in 5..filled {
            notes.remove(&foreign(number)).unwrap();
        }
        events.rest(|slot| slot == 0, &mut told).unwrap();
        assert_eq!(count(&told), dropped());
        datapath.teardown().await.unwrap();
    });
}

#[test]
fn the_last_look_at_a_vm_is_at_no_other_and_the_next_in_its_slot_counts_anew() {
    in_world(|world| async move {
        let datapath = world.open().await;
        let mut events = datapath.events().unwrap();
        let a = guest(&datapath, 0, Mode::Enforce, &[]).await;
        let b = guest(&datapath, 1, Mode::Enforce, &[]).await;
        let send = |guest: &Guest, times: u64| {
            let socket = guest.udp();
            for _ in 0..times {
                socket.send_to(b"x", "203.0.113.1:9").unwrap();
            }
            let dropped = || datapath.counters(guest.net.slot).unwrap().dropped(Reason::NoRule);
            eventually("all are dropped", || dropped() == times);
        };
        send(&a, 3);
        send(&b, 4);
        let mut told = Vec::new();
        events.rest(|slot| slot == 0, &mut told).unwrap();
        let of = |told: &[Event], slot| {
            let own: Vec<Event> = told.iter().filter(|event| event.slot == slot).cloned().collect();
            count(&own)
        };
        assert_eq!((of(&told, 0), of(&told, 1)), (3, 1), "of the other what the ring had alone");
        datapath.detach(a.net).await.unwrap();
        let next = guest(&datapath, 0, Mode::Enforce, &[]).await;
        send(&next, 6);
        told.clear();
        events.rest(|slot| slot <= 1, &mut told).unwrap();
        assert_eq!((of(&told, 0), of(&told, 1)), (6, 3));
        datapath.teardown().await.unwrap();
    });
}
