//! Prints what many VMs cost: attaching, a rule's change on all of them, adoption. Needs root.
//! Arguments: how many VMs (1000), how many rules each (200).
#![allow(clippy::unwrap_used, reason = "a measurement that fails may panic")]

#[path = "../tests/common/mod.rs"]
mod common;

use common::{in_world, net, policy};
use std::time::{Duration, Instant};
use tapgate_model::{Mode, VmId, VmPolicy};

fn main() {
    let argument =
        |at, otherwise| std::env::args().nth(at).map_or(otherwise, |text: String| text.parse().unwrap());
    let (vms, rules): (u32, u32) = (argument(1, 1000), argument(2, 200));
    in_world(|world| async move {
        let datapath = world.open().await;
        let ids: Vec<VmId> = (0..vms).map(|_| VmId::generate()).collect();
        // Rules of each VM's own, so that nothing is shared.
        let own = |slot: u32, extra: &[&str]| -> VmPolicy {
            let texts: Vec<String> = (0..rules)
                .map(|n| format!("10.{}.{}.0/24", slot % 256, n % 256))
                .chain([format!("100.64.{}.{}/32", slot >> 8, slot & 255)])
                .collect();
            let texts: Vec<&str> = texts.iter().map(String::as_str).chain(extra.iter().copied()).collect();
            policy(&ids[slot as usize], Mode::Enforce, &texts)
        };
        let shared = |slot: u32, extra: &[&str]| -> VmPolicy {
            let texts: Vec<String> = (0..rules).map(|n| format!("10.0.{}.0/24", n % 256)).collect();
            let texts: Vec<&str> = texts.iter().map(String::as_str).chain(extra.iter().copied()).collect();
            policy(&ids[slot as usize], Mode::Enforce, &texts)
        };
        let began = Instant::now();
        let mut gates = Vec::new();
        for slot in 0..vms {
            gates.push(datapath.attach_tap(&ids[slot as usize], net(slot), &own(slot, &[])).await.unwrap());
        }
        println!("{vms} taps attached, {rules} rules each: {:?} a tap", began.elapsed() / vms);

        let all = |name: &str, policies: Vec<VmPolicy>| {
            let began = Instant::now();
            for (slot, policy) in (0..).zip(&policies) {
                datapath.set_policy(net(slot), policy).unwrap();
            }
            println!("{name:<46} {:?} on all taps", began.elapsed());
        };
        let of = |make: &dyn Fn(u32) -> VmPolicy| (0..vms).map(make).collect::<Vec<_>>();
        all("one rule more, own rules", of(&|slot| own(slot, &["198.51.100.0/24"])));
        all("one rule less, own rules", of(&|slot| own(slot, &[])));
        all("all rules replaced by shared ones", of(&|slot| shared(slot, &[])));
        tokio::time::sleep(Duration::from_secs(2)).await;
        all("one rule more, shared rules", of(&|slot| shared(slot, &["198.51.100.0/24"])));
        all("all rules replaced by own ones", of(&|slot| own(slot, &[])));
        let rss = || {
            let status = std::fs::read_to_string("/proc/self/status").unwrap();
            status.lines().find(|line| line.starts_with("VmRSS")).unwrap().to_owned()
        };
        println!("{}", rss());

        drop(datapath);
        let began = Instant::now();
        let datapath = world.open().await;
        for slot in 0..vms {
            datapath.adopt(&ids[slot as usize], net(slot), &own(slot, &[])).await.unwrap();
        }
        println!("adopted: {:?} a tap", began.elapsed() / vms);
        let began = Instant::now();
        datapath.teardown().await.unwrap();
        println!("torn down: {:?} a tap", began.elapsed() / vms);
    });
}
