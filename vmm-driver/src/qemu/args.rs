//! QEMU's command line, as data: no shell; kernel and initramfs by the names that they have in the VMM's view, every other
//! file a descriptor.
//!
//! Pure: the same plan makes the same arguments. What comes from users (names, keys, variables) is not in it at all.

use crate::accel::Accel;
use crate::disk::Format;
use serde_json::json;
use std::ffi::OsString;
use std::path::Path;
use tapgate_model::{GuestNet, VmId};

/// The descriptors that QEMU inherits, by their numbers in its process.
pub mod fd {
    /// The tap.
    pub const TAP: i32 = 3;
    /// The listening control socket.
    pub const QMP: i32 = 4;
    /// The VM's own disk, for reading and writing.
    pub const DISK: i32 = 5;
    /// The image's disk, for reading.
    pub const BASE: i32 = 6;
    /// The seed disk, for reading.
    pub const SEED: i32 = 7;
    /// The listening socket of the guest agent's channel.
    pub const AGENT: i32 = 11;
}

/// How much console output is kept until the daemon fetches it.
pub const CONSOLE: u32 = 256 << 10;

/// What goes on the command line.
#[derive(Clone, Debug)]
pub struct Plan<'a> {
    /// The VM, for its name in `ps`.
    pub id: &'a VmId,
    /// How the CPU is provided.
    pub accel: Accel,
    /// Virtual CPUs.
    pub vcpus: u32,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// How the VM's disk is stored, and whether it lies over the image's.
    pub disk: Format,
    /// MAC address.
    pub net: GuestNet,
    /// Where the VMM finds the kernel.
    pub kernel: &'a Path,
    /// Where the VMM finds the initramfs.
    pub initrd: &'a Path,
    /// The image's part of the kernel command line.
    pub cmdline: &'a str,
    /// The rate of the counter that an emulated guest counts time by.
    pub tsc_khz: Option<u64>,
    /// Whether it waits for the memory of a suspended VM instead of booting.
    pub incoming: bool,
}

/// The arguments after the program's name.
pub fn build(plan: &Plan<'_>) -> Vec<OsString> {
    let mut args: Vec<OsString> = Vec::new();
    let mut add = |words: &[&str]| args.extend(words.iter().map(OsString::from));
    add(&["-name", &format!("guest={},debug-threads=on", plan.id)]);
    add(&["-nodefaults", "-no-user-config", "-display", "none"]);
    // Nothing of the VMM may start programs, gain rights or use calls that nobody needs any more.
    add(&["-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
    add(&["-M", "microvm,acpi=on,pcie=off,rtc=on,usb=off,graphics=off"]);
    match plan.accel {
        // By its name: an older QEMU takes no descriptor, and the node in the VMM's view is its own.
        Accel::Kvm => add(&["-accel", "kvm", "-cpu", "host"]),
        Accel::Tcg => add(&["-accel", "tcg,thread=multi,tb-size=128", "-cpu", "max"]),
    }
    add(&["-smp", &plan.vcpus.to_string(), "-m", &format!("{}M", plan.memory_mib)]);
    let path = |path: &Path| path.display().to_string();
    add(&["-kernel", &path(plan.kernel), "-initrd", &path(plan.initrd)]);
    let timing = match (plan.accel, plan.tsc_khz) {
        (Accel::Tcg, Some(khz)) => format!("tsc_early_khz={khz} no_timer_check "),
        _ => String::new(),
    };
    add(&["-append", &format!("console=ttyS0 panic=-1 {timing}{}", plan.cmdline)]);
    disks(plan.disk, &mut add);
    add(&["-netdev", &format!("tap,id=net,fd={}", fd::TAP)]);
    let mac = plan.net.mac.map(|byte| format!("{byte:02x}")).join(":");
    add(&["-device", &format!("virtio-net-device,netdev=net,mac={mac}")]);
    add(&["-object", "rng-builtin,id=rng", "-device", "virtio-rng-device,rng=rng"]);
    // The console stays in memory of a fixed size; the daemon fetches it. A file could fill the host's disk.
    add(&["-chardev", &format!("ringbuf,id=console,size={CONSOLE}"), "-serial", "chardev:console"]);
    add(&["-chardev", &format!("socket,id=qmp,fd={},server=on,wait=off", fd::QMP)]);
    add(&["-mon", "chardev=qmp,mode=control"]);
    // The guest agent's channel: for freezing file systems before a snapshot.
    add(&["-device", "virtio-serial-device,max_ports=2"]);
    add(&["-chardev", &format!("socket,id=agent,fd={},server=on,wait=off", fd::AGENT)]);
    add(&["-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"]);
    // After a guest's shutdown QEMU waits for the daemon, which learns by this that it was one, even if it was away.
    add(&["-action", "shutdown=pause"]);
    if plan.incoming {
        // Held until all of it is there and the daemon says so.
        add(&["-incoming", "defer", "-S"]);
    }
    args
}

fn disks(format: Format, add: &mut impl FnMut(&[&str])) {
    let set = |number: i32| format!("/dev/fdset/{number}");
    for number in [fd::DISK, fd::BASE, fd::SEED] {
        add(&["-add-fd", &format!("fd={number},set={number}")]);
    }
    let read_only = |number: i32| {
        json!({"driver": "file", "filename": set(number), "read-only": true, "auto-read-only": false,
               "locking": "off"})
    };
    let own = json!({"driver": "file", "filename": set(fd::DISK), "locking": "off", "discard": "unmap"});
    let root = match format {
        Format::Raw => json!({"node-name": "root", "driver": "raw", "discard": "unmap", "file": own}),
        // The image's disk is named here, not in the overlay's header: that is a file that exists for the guest alone.
        Format::Standalone => json!({"node-name": "root", "driver": "qcow2", "discard": "unmap", "file": own,
            "backing": null}),
        Format::Qcow2 => json!({"node-name": "root", "driver": "qcow2", "discard": "unmap", "file": own,
            "backing": {"driver": "raw", "read-only": true, "file": read_only(fd::BASE)}}),
    };
    let seed = json!({"node-name": "seed", "driver": "raw", "read-only": true, "file": read_only(fd::SEED)});
    add(&["-blockdev", &root.to_string(), "-device", "virtio-blk-device,drive=root,discard=on"]);
    add(&["-blockdev", &seed.to_string(), "-device", "virtio-blk-device,drive=seed"]);
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn words(accel: Accel, disk: Format) -> Vec<String> {
        let id = "vm_abc".parse().unwrap();
        let net = GuestNet::new(6, Ipv4Addr::new(192, 0, 2, 0), None);
        let plan = Plan {
            id: &id,
            accel,
            vcpus: 2,
            memory_mib: 512,
            disk,
            net,
            kernel: Path::new("/vm/kernel"),
            initrd: Path::new("/vm/initrd"),
            cmdline: "root=/dev/vda rw",
            tsc_khz: Some(2_500_000),
            incoming: false,
        };
        build(&plan).into_iter().map(|word| word.into_string().unwrap()).collect()
    }

    fn after<'a>(words: &'a [String], flag: &str) -> Vec<&'a str> {
        words.windows(2).filter(|pair| pair[0] == flag).map(|pair| pair[1].as_str()).collect()
    }

    #[test]
    fn the_sandbox_is_on_whole() {
        for accel in [Accel::Kvm, Accel::Tcg] {
            let words = words(accel, Format::Raw);
            let sandbox = after(&words, "-sandbox");
            assert_eq!(sandbox, ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]);
            assert!(
                words.contains(&"-no-user-config".to_owned()) && words.contains(&"-nodefaults".to_owned())
            );
        }
    }

    #[test]
    fn every_file_is_a_descriptor() {
        let words = words(Accel::Tcg, Format::Qcow2);
        for word in &words {
            let path = word.contains("/var") || word.contains("/tmp") || word.contains("/home");
            assert!(!path, "{word}");
        }
        assert_eq!(after(&words, "-netdev"), ["tap,id=net,fd=3"]);
        assert!(after(&words, "-blockdev")[0].contains("\"backing\""));
        assert!(after(&words, "-blockdev")[1].contains("\"read-only\":true"));
    }

    #[test]
    fn an_emulated_guest_is_told_how_fast_it_counts() {
        assert!(after(&words(Accel::Tcg, Format::Raw), "-append")[0].contains("tsc_early_khz=2500000 "));
        assert!(!after(&words(Accel::Kvm, Format::Raw), "-append")[0].contains("tsc"));
    }

    #[test]
    fn nothing_but_the_tap_is_a_network() {
        let words = words(Accel::Tcg, Format::Raw);
        assert_eq!(words.iter().filter(|w| w.contains("virtio-net")).count(), 1);
        assert_eq!(words.iter().filter(|w| *w == "-netdev" || *w == "-nic" || *w == "-net").count(), 1);
        assert!(words.iter().any(|w| w.ends_with("mac=06:74:00:00:00:06")));
    }
}
