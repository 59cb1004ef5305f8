//! The one binary on a fresh host, as an operator would put it there: `doctor`, the unit under systemd, a VM under real
//! KVM, the daemon killed, the host rebooted, and the demo's whole story. On Debian 12's kernel and on a newer one.
//!
//! The ordinary run takes the old kernel as far as the daemon's death, for the machine's own is a newer one; with
//! `TAPGATE_LONG` set, both kernels go the whole way.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::{path::PathBuf, process::Command, thread, time::Duration};
use tapgate_e2e::{
    daemon,
    kvm_box::{Kernel, KvmBox},
    sh,
};

/// An internet that answers pings at two addresses and counts what arrives.
const INTERNET: &str = "set -e
ip netns add internet
ip link add up0 type veth peer name uplink netns internet
ip address add 198.51.100.1/24 dev up0 && ip link set up0 up
ip -n internet link set lo up && ip -n internet link set uplink up
ip -n internet address add 198.51.100.2/24 dev uplink
ip -n internet address add 203.0.113.10/32 dev lo && ip -n internet address add 203.0.113.20/32 dev lo
ip route add default via 198.51.100.2
ip netns exec internet nft 'add table inet count; add chain inet count in { type filter hook prerouting priority 0; };
    add rule inet count in iifname uplink ip daddr 203.0.113.20 counter'";

/// What a VM may write to the host's disk a second.
const DISK_MIB: u64 = 16;

/// How many packets arrived at the address that no rule allows.
fn leaked(host: &KvmBox) -> u64 {
    let text = host.expect("ip netns exec internet nft list chain inet count in").unwrap();
    let mut words = text.split_whitespace().skip_while(|word| *word != "packets").skip(1);
    words.next().unwrap().parse().unwrap()
}

/// In the guest of the VM `box`; asked again while nobody forwards its port, as between two daemons.
fn guest(host: &KvmBox, script: &str) -> sh::Done {
    let ask = || host.sh(&format!("tapgate ssh -i /root/.ssh/id_ed25519 box -- '{script}'")).unwrap();
    for _ in 0..60 {
        let done = ask();
        if done.code != 255 {
            return done;
        }
        thread::sleep(Duration::from_secs(1));
    }
    ask()
}

/// What a rule allows passes, and nothing else does.
fn gate_holds(host: &KvmBox) {
    let open = guest(host, "ping -c1 -W20 203.0.113.10");
    assert!(open.ok(), "the rule's address cannot be reached: {open:?}");
    let closed = guest(
        host,
        "ping -c1 -W2 203.0.113.20; curl -sS -m20 http://203.0.113.20/; curl -sS -m20 http://192.0.2.2/",
    );
    assert!(closed.out.contains(" 0 received"), "{closed:?}");
    assert_eq!(closed.out.matches("egress_denied").count(), 2, "{closed:?}");
    assert_eq!(leaked(host), 0, "something got out");
}

/// What systemd left to us limits the disk, and the VM's limits are the configured ones. A limit makes slow, however slow the
/// machine is: so much cannot have been written any sooner.
fn disk_is_limited(host: &KvmBox) {
    let limit = host.expect("cat /sys/fs/cgroup/tapgate/vm_*/io.max").unwrap();
    let octets = DISK_MIB << 20;
    let wanted = format!(" rbps={octets} wbps={octets} riops=20000 wiops=20000");
    assert!(limit.lines().any(|line| line.ends_with(&wanted)), "{limit}");
    let written = 6 * DISK_MIB;
    let script = format!(
        "dd if=/dev/zero of=/root/large bs=1M count={written} conv=fsync 2>&1 | tail -1; rm /root/large"
    );
    let said = guest(host, &script).out;
    let seconds = said.split(", ").find_map(|part| part.trim().strip_suffix(" s")?.parse::<f64>().ok());
    let seconds = seconds.unwrap_or_else(|| panic!("{said}"));
    println!("{written} MiB at {DISK_MIB} MiB/s: {seconds} s");
    assert!(seconds > 4.0, "{written} MiB were written in {seconds} s, with a limit of {DISK_MIB} MiB/s");
}

fn wait_ready(host: &KvmBox) {
    for _ in 0..300 {
        if host.sh("tapgate vm show box").unwrap().out.contains("ready") {
            return;
        }
        thread::sleep(Duration::from_secs(1));
    }
    let log = host.sh("tapgate vm show box; journalctl -u tapgate | tail -40").unwrap().out;
    panic!("the VM does not come back: {log}");
}

fn long() -> bool {
    std::env::var_os("TAPGATE_LONG").is_some()
}

fn story(kernel: Kernel, attaches_by: &str) {
    let tapgate = daemon::binary().unwrap();
    let image = sh::expect(Command::new(&tapgate).args(["image", "build"]), b"").unwrap();
    let image = PathBuf::from(image.trim());
    let in_share = format!("images/{}", image.file_name().unwrap().to_string_lossy());
    let (demo, world) = (sh::sibling("tapgate-demo").unwrap(), sh::sibling("tapgate-world").unwrap());
    let share = [
        (tapgate.as_path(), "bin/tapgate"),
        (demo.as_path(), "bin/tapgate-demo"),
        (world.as_path(), "bin/tapgate-world"),
        (image.as_path(), in_share.as_str()),
    ];
    let mut host = KvmBox::boot(kernel, &share).unwrap();
    assert!(host.expect("uname -r").unwrap().starts_with(kernel.release()));

    let config = format!("image_dir = \"/share/images\"\ndisk_mib_per_second = {DISK_MIB}\n");
    host.expect(&format!(
        "install /share/bin/tapgate /usr/local/bin/ && printf '{config}' > /etc/tapgate.toml"
    ))
    .unwrap();
    let doctor = host.expect("tapgate doctor --config /etc/tapgate.toml").unwrap();
    assert!(doctor.contains(attaches_by) && doctor.contains("KVM runs guests"), "{doctor}");
    assert!(!doctor.contains("FAIL"), "{doctor}");

    host.expect(INTERNET).unwrap();
    host.expect("tapgate unit > /etc/systemd/system/tapgate.service && systemctl enable --now tapgate")
        .unwrap();
    host.expect("ssh-keygen -q -t ed25519 -N '' -f /root/.ssh/id_ed25519").unwrap();
    host.expect(
        "echo correct-horse-battery | tapgate signup --email ada@example.com --first-name Ada --last-name L",
    )
    .unwrap();
    host.expect("tapgate vm create box --wait").unwrap();
    let log = host.expect("journalctl -u tapgate").unwrap();
    assert!(log.contains("KVM runs guests"), "{log}");
    host.expect("tapgate egress rule add 203.0.113.10/32").unwrap();
    gate_holds(&host);
    disk_is_limited(&host);

    // The daemon killed: systemd starts it again, and it adopts the VM as it is.
    let boot_id = || guest(&host, "cat /proc/sys/kernel/random/boot_id").out;
    let before = boot_id();
    host.expect("systemctl kill --kill-whom=main -s KILL tapgate && sleep 2 && for i in $(seq 60); do systemctl is-active tapgate && exit; sleep 1; done; false").unwrap();
    wait_ready(&host);
    assert_eq!(boot_id(), before, "the guest was booted again");
    gate_holds(&host);

    if !long() {
        return;
    }
    // The host rebooted: the VM comes back, behind its gate.
    host.reboot().unwrap();
    host.expect(INTERNET).unwrap();
    wait_ready(&host);
    gate_holds(&host);
    host.expect(
        "tapgate vm stop box --wait && tapgate vm destroy box --wait && systemctl disable --now tapgate",
    )
    .unwrap();

    let demo =
        host.sh("/share/bin/tapgate-demo --tapgate /usr/local/bin/tapgate --images /share/images").unwrap();
    assert!(demo.out.contains("8 passed, 0 failed"), "{}\n{}", demo.out, demo.err);
}

#[test]
fn real_vm_on_a_fresh_host_with_kernel_6_1() {
    story(Kernel::V6_1, "clsact");
}

#[test]
fn real_vm_on_a_fresh_host_with_kernel_6_12() {
    if !long() {
        eprintln!("skipped: set TAPGATE_LONG (cargo xtask test --long) for a host with kernel 6.12");
        return;
    }
    story(Kernel::V6_12, "TCX");
}
