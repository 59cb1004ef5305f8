//! A real VM is suspended and goes on where it was, once; a memory that is not what was stored is refused. Needs root;
//! TCG will do.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{Reap, World, driver, gate, ready};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tapgate_model::VmId;
use tapgate_vmm::{Resume, Running, VmSpec, Vmm as _, VmmError};

/// Boots or resumes; the network of its former run is taken away first.
async fn again(
    datapath: &tapgate_datapath::Datapath,
    spec: &VmSpec,
) -> Result<(Box<dyn Running>, Reap), VmmError> {
    datapath.detach(spec.net).await.unwrap();
    let gate = gate(datapath, spec).await;
    let machine = driver().boot(spec, gate).await?;
    let reap = Reap::of(machine.handle().process.pid);
    ready(datapath, spec, machine.as_ref()).await;
    Ok((machine, reap))
}

#[test]
fn real_vm_a_suspended_vm_goes_on_where_it_was_and_only_once() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let spec = VmSpec { resume: Resume::Own, ..world.spec(&VmId::generate(), 0, Vec::new()) };
        let (machine, _reap) = common::boot(&datapath, &spec).await;
        let ask = |command: &str| world.ask(datapath.egress(), spec.net, command);
        ask("systemd-run --unit=count bash -c 'n=0; while sleep 0.2; do echo $((++n)) > /run/count; done'");
        ask("echo kept > /root/kept; sleep 2; cat /run/count");
        let before = (ask("cat /proc/sys/kernel/random/boot_id"), ask("systemctl show -P MainPID count"));
        let count: u64 = ask("cat /run/count").parse().unwrap();

        let suspended = machine.suspend().await.unwrap();
        eprintln!("{suspended:?}");
        assert!(machine.observed().borrow().exit.is_some(), "the VMM has ended");
        for name in ["memory.json", "memory.zst"] {
            let file = std::fs::metadata(spec.dir.join(name)).unwrap();
            assert_eq!((file.permissions().mode() & 0o777, file.uid()), (0o600, 0), "{name} is private");
        }
        tokio::time::sleep(Duration::from_secs(20)).await;

        let began = std::time::Instant::now();
        let (machine, _reap) = again(&datapath, &spec).await.unwrap();
        eprintln!("resumed and ready after {:?}", began.elapsed());
        assert!(!spec.dir.join("memory.json").exists(), "a memory is used once");
        let after = (ask("cat /proc/sys/kernel/random/boot_id"), ask("systemctl show -P MainPID count"));
        assert_eq!(before, after, "it was not booted");
        assert!(ask("cat /run/count").parse::<u64>().unwrap() >= count, "the counter went on");
        let now = || i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs()).unwrap();
        let skew = || ask("date +%s").parse::<i64>().unwrap() - now();
        // The clock is set beside the resumption.
        for _ in 0..40 {
            if skew().abs() < 5 {
                break;
            }
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
        assert!(skew().abs() < 5, "the clock is {} s off", skew());

        // Tampered with: refused, and the next start is from the disk.
        ask("sync");
        machine.suspend().await.unwrap();
        let file = spec.dir.join("memory.zst");
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
        let Err(refused) = again(&datapath, &spec).await else { panic!("a changed memory was used") };
        assert!(refused.to_string().contains("not what was stored"), "{refused}");
        let (machine, _reap) = again(&datapath, &spec).await.unwrap();
        assert_ne!(ask("cat /proc/sys/kernel/random/boot_id"), before.0, "booted");
        assert_eq!(ask("cat /root/kept"), "kept");

        // Another machine than the one it was: refused.
        machine.suspend().await.unwrap();
        let larger = VmSpec { memory_mib: spec.memory_mib + 256, ..spec.clone() };
        let Err(refused) = again(&datapath, &larger).await else { panic!("another machine took the memory") };
        assert!(refused.to_string().contains("another machine"), "{refused}");
        assert!(!spec.dir.join("memory.zst").exists());
    });
}
