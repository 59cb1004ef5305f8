//! Real VMs behind real gates: what a guest is given, how it ends, how it is found again. Needs root; TCG will do.
//! Tests that boot a machine have `real_vm` in their names: `cargo xtask test --fast` leaves them out.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use common::{PATIENCE, World, boot, driver, gate, net, ready};
use std::time::Duration;
use tapgate_model::VmId;
use tapgate_vmm::{Exit, NetnsDriver, Seed, VmSpec, Vmm as _, VmmError};

const NASTY: &str = r#"a'b"c$(touch /tmp/x)`id` \ %n %% ; # ! é\" \n end"#;
const LINES: &str = "first\nsecond 'quoted'\n\tthird";

#[test]
fn real_vm_a_guest_is_what_its_seed_says_and_lives_through_a_reboot() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let id = VmId::generate();
        let env = [("TOKEN", "IRONSH_PROXY_token"), ("NASTY", NASTY), ("MANY", LINES)];
        let mut env = env.map(|(n, v)| (n.to_owned(), v.to_owned())).to_vec();
        let random: Vec<String> = (0..40).map(random_value).collect();
        env.extend(random.iter().enumerate().map(|(n, value)| (format!("R{n}"), value.clone())));
        let spec = world.spec(&id, 0, env);
        let (machine, _reap) = boot(&datapath, &spec).await;
        let ask = |command: &str| world.ask(datapath.egress(), spec.net, command);

        assert_eq!(ask("hostname"), "guest-one");
        assert_eq!(ask("printenv TOKEN"), "IRONSH_PROXY_token");
        assert_eq!(ask("printenv NASTY"), NASTY);
        assert_eq!(ask("printenv MANY"), LINES, "several lines, in a command over SSH");
        assert_eq!(ask("env -i bash -lc 'printenv NASTY'"), NASTY, "a login shell");
        assert_eq!(ask("env -i bash -lc 'printenv MANY'"), LINES);
        let service = |name: &str| {
            let unit = format!(
                "[Service]\\nType=oneshot\\nExecStart=/usr/bin/printenv {name}\\nStandardOutput=truncate:/run/printed\\n"
            );
            let command = "systemctl daemon-reload && systemctl start printed && cat /run/printed";
            ask(&format!("printf '{unit}' > /run/systemd/system/printed.service && {command}"))
        };
        assert_eq!(service("NASTY"), NASTY, "a service");
        assert_eq!(service("MANY"), LINES);
        // Forty values of everything that some reader of them could take for its own syntax, everywhere at once.
        let all = "import os, json; print(json.dumps([os.environ.get(f'R{n}') for n in range(40)]))";
        let script = format!("printf '%s' \"{all}\" > /run/all.py");
        ask(&script);
        let unit = "[Service]\\nType=oneshot\\nExecStart=/usr/bin/python3 /run/all.py\\nStandardOutput=truncate:/run/all\\n";
        for (place, command) in [
            ("a command over SSH", "python3 /run/all.py".to_owned()),
            ("a login shell", "env -i bash -lc 'python3 /run/all.py'".to_owned()),
            (
                "a service",
                format!(
                    "printf '{unit}' > /run/systemd/system/all.service && systemctl daemon-reload && systemctl start all && cat /run/all"
                ),
            ),
        ] {
            let arrived: Vec<Option<String>> = serde_json::from_str(&ask(&command)).unwrap();
            for (n, value) in random.iter().enumerate() {
                assert_eq!(arrived[n].as_ref(), Some(value), "R{n} in {place}");
            }
        }
        assert!(ask("ls /tmp/x 2>&1 || true").contains("No such"), "nothing in a value was run");

        let ca = "/usr/local/share/ca-certificates/tapgate.crt";
        assert!(
            ask(&format!("openssl verify -CAfile /etc/ssl/certs/ca-certificates.crt {ca}")).ends_with("OK")
        );
        assert!(ask(&format!("openssl verify -no-CAfile -CApath /etc/ssl/certs {ca}")).ends_with("OK"));
        let python = "import ssl; print(sum('tapgate-test' in str(c) for c in ssl.create_default_context().get_ca_certs()))";
        assert_eq!(ask(&format!("python3 -c \"{python}\"")), "1");
        assert_eq!(ask("printenv NODE_EXTRA_CA_CERTS"), ca);

        assert!(ask("ip -4 -o addr show dev eth0").contains(" 10.214.0.1/32 "));
        assert_eq!(ask("ip route"), "default via 169.254.77.1 dev eth0 onlink ");
        assert!(ask("ip -6 -o addr show dev eth0").contains(" fd74:6761:7465::1/128 "));
        assert_eq!(
            ask("ip -6 route show default"),
            "default via fe80::1 dev eth0 metric 1024 onlink pref medium"
        );
        assert!(
            ask("ping -6 -c 1 -W 5 -I fd74:6761:7465::1 fe80::1%eth0").contains("1 received"),
            "traffic by IPv6"
        );
        assert!(ask("cat /etc/resolv.conf").contains("nameserver 169.254.77.1"));
        let size: u64 = ask("df --output=size -B1 / | tail -1").trim().parse().unwrap();
        assert!(size > 3 << 30, "the root file system has grown into its disk: {size}");
        let skew: i64 = ask("date +%s").parse::<i64>().unwrap() - now();
        assert!(skew.abs() < 30, "the clock is {skew} s off");
        assert_eq!(ask("systemctl list-units --failed --no-legend --plain"), "");

        world.give_java(datapath.egress(), spec.net);
        let before = (ask("cat /etc/machine-id"), ask("cat /etc/ssh/ssh_host_ed25519_key.pub"));
        let mut observed = machine.observed();
        world.ssh(datapath.egress(), spec.net, "systemctl reboot");
        let rebooted = observed.wait_for(|seen| seen.reboots == 1);
        tokio::time::timeout(PATIENCE, rebooted).await.unwrap().unwrap();
        ready(&datapath, &spec, machine.as_ref()).await;
        assert_eq!(before, (ask("cat /etc/machine-id"), ask("cat /etc/ssh/ssh_host_ed25519_key.pub")));
        assert_eq!(ask("printenv NASTY"), NASTY);
        // Java's store got the CA after this boot, by the store's own tool.
        let listed = "for i in $(seq 120); do keytool -exportcert -rfc -alias tapgate -keystore /etc/ssl/certs/java/cacerts \
            -storepass changeit > /run/java.pem 2>/dev/null && break; sleep 1; done; cat /run/java.pem";
        let in_store = ask(listed).replace('\r', "");
        assert_eq!(in_store.trim(), ask(&format!("cat {ca}")).trim(), "Java trusts it too");

        let exit = machine.shutdown(PATIENCE).await.unwrap();
        assert_eq!(exit, Exit::GuestShutdown, "the power button reaches the guest");
        let console = common::console(&spec.dir);
        assert!(console.contains("Linux version") && console.contains("reboot: Power down"), "{console}");
    });
}

/// A value that is made anew from its number, of characters that mean something to some shell or format.
fn random_value(number: u64) -> String {
    const MEANING: [&str; 40] = [
        "'",
        "\"",
        "\\",
        "$",
        "`",
        "(",
        ")",
        "{",
        "}",
        "%",
        "%n",
        "#",
        ";",
        "&",
        "|",
        "<",
        ">",
        "*",
        "?",
        "~",
        "!",
        "=",
        " ",
        "\t",
        "\n",
        "$(touch /tmp/x)",
        "`touch /tmp/x`",
        "${HOME}",
        "\\n",
        "\\x41",
        "'\\''",
        "é",
        "\u{1f600}",
        "\u{202e}",
        "a",
        "B",
        "0",
        "EOF\n",
        "-",
        ": ",
    ];
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ 0xdead_beef;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as usize
    };
    let length = 1 + next() % 24;
    (0..length).map(|_| MEANING[next() % MEANING.len()]).collect()
}

#[test]
fn real_vm_changes_reach_a_running_guest() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let id = VmId::generate();
        let mut spec = world.spec(&id, 4, vec![("OLD".into(), "1".into())]);
        let service = common::Service::start(&datapath, spec.seed.user_data().unwrap());
        let (_machine, _reap) = boot(&datapath, &spec).await;
        let ask = |command: &str| world.ask(datapath.egress(), spec.net, command);
        assert_eq!(ask("printenv OLD"), "1");
        spec.seed.env = vec![("NEW".into(), NASTY.into())];
        *service.answer.lock().unwrap() = spec.seed.user_data().unwrap();
        let end = std::time::Instant::now() + PATIENCE;
        while ask("printenv NEW || true") != NASTY {
            assert!(std::time::Instant::now() < end, "the change never arrived");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        assert_eq!(ask("printenv OLD || echo gone"), "gone");
        let unit = "[Service]\\nType=oneshot\\nExecStart=/usr/bin/printenv NEW\\nStandardOutput=truncate:/run/printed\\n";
        let command = "systemctl daemon-reload && systemctl start printed && cat /run/printed";
        assert_eq!(
            ask(&format!("printf '{unit}' > /run/systemd/system/printed.service && {command}")),
            NASTY
        );

        // Rubbish changes nothing.
        *service.answer.lock().unwrap() = "#!/bin/sh\nreboot\n".into();
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert_eq!(ask("printenv NEW"), NASTY);
    });
}

#[test]
fn real_vm_a_vmm_has_no_rights_and_its_end_is_told_apart() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let id = VmId::generate();
        let spec = world.spec(&id, 1, Vec::new());
        let (machine, _reap) = boot(&datapath, &spec).await;
        let pid = machine.handle().process.pid;

        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_once(':').unwrap().1.split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        let uid = tapgate_vmm::uid_of(1).to_string();
        assert_eq!(field("Uid"), vec![uid.clone(); 4]);
        assert_eq!(field("Gid"), vec![uid; 4]);
        assert!(field("Groups").is_empty());
        for set in ["CapInh", "CapPrm", "CapEff", "CapAmb"] {
            assert_eq!(field(set), ["0000000000000000"], "{set}");
        }
        assert_eq!(field("NoNewPrivs"), ["1"]);
        assert_eq!(field("Seccomp"), ["2"]);
        let session = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let fields: Vec<&str> = session.rsplit_once(')').unwrap().1.split_whitespace().collect();
        assert_eq!(fields[3], pid.to_string(), "a session of its own");

        // Another VM's gate, and another slot's, are no proof for this one.
        let other = world.spec(&VmId::generate(), 2, Vec::new());
        let foreign = gate(&datapath, &other).await;
        assert!(matches!(driver().boot(&spec, foreign).await, Err(VmmError::Gate(_))));

        world.ssh(datapath.egress(), spec.net, "systemctl poweroff");
        let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
        assert_eq!(exit, Exit::GuestShutdown);
        datapath.detach(spec.net).await.unwrap();

        let (machine, _reap) = boot(&datapath, &spec).await;
        nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(machine.handle().process.pid),
            nix::sys::signal::SIGSEGV,
        )
        .unwrap();
        let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
        assert!(matches!(&exit, Exit::Crashed(why) if why.contains("signal 11")), "{exit:?}");
        datapath.detach(spec.net).await.unwrap();

        // A VMM that hangs is noticed and ended, though nobody asked anything of it.
        let (machine, _reap) = boot(&datapath, &spec).await;
        let pid = nix::unistd::Pid::from_raw(machine.handle().process.pid);
        nix::sys::signal::kill(pid, nix::sys::signal::SIGSTOP).unwrap();
        let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
        assert!(matches!(&exit, Exit::Crashed(why) if why.contains("hung")), "{exit:?}");
        assert!(tapgate_vmm::noted_handle(&spec.dir).is_none(), "what is gone leaves no handle");
    });
}

#[test]
fn real_vm_that_cannot_start_says_why_and_leaves_nothing() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let spec = VmSpec { memory_mib: 1 << 30, ..world.spec(&VmId::generate(), 8, Vec::new()) };
        let fail = async |driver: tapgate_vmm::QemuDriver, spec: &VmSpec| {
            let gate = gate(&datapath, spec).await;
            let error = driver.boot(spec, gate).await.err().unwrap().to_string();
            datapath.detach(spec.net).await.unwrap();
            for name in ["vmm.json", "qmp.sock", "agent.sock"] {
                assert!(!spec.dir.join(name).exists(), "{name} after: {error}");
            }
            error
        };
        let error = fail(driver(), &spec).await;
        assert!(error.starts_with("the VMM did not start") && error.contains("memory"), "{error}");
        let missing = tapgate_vmm::QemuDriver { program: "/nowhere/qemu".into(), ..driver() };
        let error = fail(missing, &spec).await;
        assert_eq!(error, "/nowhere/qemu cannot be started; on Debian: apt-get install qemu-system-x86");
        let broken =
            VmSpec { seed: Seed { hostname: "not a name".into(), ..spec.seed.clone() }, ..spec.clone() };
        assert!(fail(driver(), &broken).await.contains("is not a host name"));
        let no_image = VmSpec { image: None, ..spec.clone() };
        assert!(fail(driver(), &no_image).await.contains("no image"));
    });
}

/// The process that is killed after it booted a VM: this test binary again.
const LAUNCHER: &str = "TAPGATE_TEST_LAUNCH_IN";

/// A VM whose daemon was killed: booted by another process, which is dead now.
async fn left_behind(world: &World, test: &str) -> (VmSpec, tapgate_vmm::Handle) {
    let state = world.dir.path().join("state.json");
    let mut launcher = std::process::Command::new(std::env::current_exe().unwrap());
    launcher.args(["--exact", test, "--nocapture"]).env(LAUNCHER, world.dir.path());
    let text = format!("{}\n{}", world.instance, world.key.display());
    std::fs::write(world.dir.path().join("world"), text).unwrap();
    let mut launcher = launcher.spawn().unwrap();
    while !state.exists() {
        assert!(launcher.try_wait().unwrap().is_none(), "the launcher ended");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    launcher.kill().unwrap();
    launcher.wait().unwrap();
    let (id, handle): (VmId, tapgate_vmm::Handle) =
        serde_json::from_slice(&std::fs::read(&state).unwrap()).unwrap();
    (world.spec(&id, 3, Vec::new()), handle)
}

#[test]
fn real_vm_outlives_its_daemon_and_is_adopted() {
    if let Some(at) = std::env::var_os(LAUNCHER) {
        return launch_and_wait_for_death(std::path::Path::new(&at));
    }
    World::run(|world| async move {
        let (spec, handle) = left_behind(&world, "real_vm_outlives_its_daemon_and_is_adopted").await;
        let _reap = common::Reap::of(handle.process.pid);
        let datapath = world.datapath().await;
        assert_eq!(tapgate_vmm::noted_handle(&spec.dir).as_ref(), Some(&handle));
        let gate = datapath.adopt(&spec.id, net(3), &common::policy(&spec.id)).await.unwrap();
        let machine = driver().adopt(&spec, &handle, gate).await.unwrap();
        ready(&datapath, &spec, machine.as_ref()).await;
        assert_eq!(world.ask(datapath.egress(), spec.net, "hostname"), "guest-one");
        assert_eq!(machine.shutdown(PATIENCE).await.unwrap(), Exit::GuestShutdown);

        datapath.detach(spec.net).await.unwrap();
        let mut stranger = handle.clone();
        stranger.process.pid = std::process::id() as i32;
        for gone in [&handle, &stranger] {
            let gate = common::gate(&datapath, &spec).await;
            assert!(matches!(driver().adopt(&spec, gone, gate).await, Err(VmmError::Gone)), "{gone:?}");
            driver().discard(&spec.place(), gone).await.unwrap();
            datapath.detach(spec.net).await.unwrap();
        }
    });
}

#[test]
fn real_vm_that_shut_down_while_nobody_watched_is_known_to_have() {
    if let Some(at) = std::env::var_os(LAUNCHER) {
        return launch_and_wait_for_death(std::path::Path::new(&at));
    }
    World::run(|world| async move {
        let test = "real_vm_that_shut_down_while_nobody_watched_is_known_to_have";
        let (spec, handle) = left_behind(&world, test).await;
        let _reap = common::Reap::of(handle.process.pid);
        let datapath = world.datapath().await;
        tokio::time::timeout(PATIENCE, tapgate_vmm::ready::ssh(datapath.egress(), &spec.net)).await.unwrap();
        world.ssh(datapath.egress(), spec.net, "systemctl poweroff");
        let end = std::time::Instant::now() + PATIENCE;
        while !qemu_says(&spec.dir.join("qmp.sock"), "query-status").contains("\"shutdown\"") {
            assert!(std::time::Instant::now() < end, "it never shut down");
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
        let gate = datapath.adopt(&spec.id, net(3), &common::policy(&spec.id)).await.unwrap();
        let machine = driver().adopt(&spec, &handle, gate).await.unwrap();
        let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.unwrap();
        assert_eq!(exit, Exit::GuestShutdown);
        assert!(common::console(&spec.dir).contains("reboot: Power down"), "its last words are kept");
    });
}

/// Asks QEMU as a driver would, for a moment.
fn qemu_says(socket: &std::path::Path, command: &str) -> String {
    use std::io::{BufRead as _, BufReader, Write as _};
    let mut stream = std::os::unix::net::UnixStream::connect(socket).unwrap();
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    lines.next().unwrap().unwrap();
    for command in ["qmp_capabilities", command] {
        writeln!(stream, "{{\"execute\": \"{command}\"}}").unwrap();
    }
    lines.next().unwrap().unwrap();
    lines.next().unwrap().unwrap()
}

fn launch_and_wait_for_death(dir: &std::path::Path) {
    let text = std::fs::read_to_string(dir.join("world")).unwrap();
    let (instance, key) = text.split_once('\n').unwrap();
    let world = World {
        dir: tempfile::Builder::new().tempdir_in(dir).unwrap(),
        instance: instance.to_owned(),
        host: tapgate_netns::Netns::open(&format!("tgvm-{instance}")).unwrap(),
        key: key.into(),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let datapath = world.datapath().await;
        let id = VmId::generate();
        let mut spec = world.spec(&id, 3, Vec::new());
        spec.dir = dir.join(id.as_str());
        let machine = driver().boot(&spec, gate(&datapath, &spec).await).await.unwrap();
        let text = serde_json::to_vec(&(&id, machine.handle())).unwrap();
        std::fs::write(dir.join("state.new"), text).unwrap();
        std::fs::rename(dir.join("state.new"), dir.join("state.json")).unwrap();
        std::future::pending::<()>().await;
    });
}

#[test]
fn real_vm_a_disk_stays_with_the_image_that_it_was_made_from() {
    use tapgate_vmm::{disk, image};
    let image = common::debian();
    let (dir, newer) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    for name in ["manifest.json", "kernel", "initrd", "disk.raw"] {
        std::os::unix::fs::symlink(image.dir().join(name), newer.path().join(name)).unwrap();
    }
    let newer = image::open(newer.path()).unwrap();
    let first = disk::origin(dir.path(), &image).unwrap();
    let made = disk::prepare(dir.path(), &first, None, 4 << 30, common::work()).unwrap();
    assert_eq!(disk::origin(dir.path(), &newer).unwrap().dir(), image.dir());
    let again = disk::prepare(dir.path(), &image, None, 5 << 30, common::work()).unwrap();
    assert_eq!((again.path, again.format), (made.path, made.format), "the same disk, grown");
    if made_is_qcow2(&dir) {
        use std::os::unix::fs::FileExt as _;
        let file =
            std::fs::File::options().read(true).write(true).open(dir.path().join("disk.qcow2")).unwrap();
        let mut header = [0u8; 1024];
        file.read_exact_at(&mut header, 0).unwrap();
        let backing = u64::from_be_bytes(header[8..16].try_into().unwrap());
        // Another backing file, none, a longer name, an external data file.
        for (at, bytes) in [(backing, &b"/etc"[..]), (8, &[0; 8]), (16, &[0, 0, 1, 0]), (79, &[4])] {
            let mut before = vec![0u8; bytes.len()];
            file.read_exact_at(&mut before, at).unwrap();
            file.write_all_at(bytes, at).unwrap();
            let error =
                disk::prepare(dir.path(), &image, None, 9 << 30, common::work()).unwrap_err().to_string();
            assert!(error.contains("tampered"), "{at}: {error}");
            file.write_all_at(&before, at).unwrap();
        }
        disk::prepare(dir.path(), &image, None, 6 << 30, common::work()).unwrap();
    }
    std::fs::write(dir.path().join("image.json"), "\"/nowhere\"").unwrap();
    let error = disk::origin(dir.path(), &newer).unwrap_err().to_string();
    assert!(error.contains("cannot be used") && error.contains("/nowhere"), "{error}");
}

fn made_is_qcow2(dir: &tempfile::TempDir) -> bool {
    dir.path().join("disk.qcow2").exists()
}

#[test]
fn real_vm_the_probe_believes_a_kernel_alone() {
    let dir = tempfile::tempdir().unwrap();
    let probe = || tapgate_vmm::accel::probe(&common::debian(), &tapgate_vmm::default_program(), dir.path());
    // What could not even be tried is not remembered: it may be mended meanwhile.
    let missing = std::path::Path::new("/nowhere/qemu");
    assert_eq!(
        tapgate_vmm::accel::probe(&common::debian(), missing, dir.path()).accel,
        tapgate_vmm::accel::Accel::Tcg
    );
    let found = probe();
    eprintln!("{:?}: {}", found.accel, found.reason);
    assert!(!found.reason.is_empty() && !found.reason.contains("cannot be started"), "{}", found.reason);
    // What was found is remembered for this boot and kernel: the second time, no QEMU is needed.
    assert_eq!(tapgate_vmm::accel::probe(&common::debian(), missing, dir.path()), found);
    std::fs::write(dir.path().join("accel.json"), "rubbish").unwrap();
    assert_eq!(probe(), found);
}

#[test]
fn a_namespace_stands_for_a_vm_and_says_so() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        let id = VmId::generate();
        let guest = tapgate_netns::Netns::create(&world.guest_name()).unwrap();
        let mut spec = world.spec_without_image(&id, 5, vec![("TOKEN".into(), NASTY.into())]);
        spec.guest_ns = Some(guest.clone());
        let gate = datapath.attach_netns(&id, spec.net, &common::policy(&id), &guest).await.unwrap();
        let machine = NetnsDriver::new().boot(&spec, gate).await.unwrap();
        let _reap = common::Reap::of(machine.handle().process.pid);
        assert!(machine.handle().notes.iter().any(|note| note.contains("nothing but the network")));
        tokio::time::timeout(PATIENCE, machine.ready(datapath.egress())).await.unwrap();
        let run = |program: &str, args: &[&str]| {
            let output = tapgate_vmm::netns_exec(&spec, program, args).unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        assert_eq!(run("printenv", &["TOKEN"]).trim_end_matches('\n'), NASTY);
        assert!(run("ip", &["-4", "-o", "addr", "show", "eth0"]).contains("10.214.0.6/32"));
        assert_eq!(run("cat", &["/etc/resolv.conf"]), "nameserver 169.254.77.1\n");
        let bundle = run("printenv", &["SSL_CERT_FILE"]);
        let text = std::fs::read_to_string(bundle.trim()).unwrap();
        assert!(text.contains(spec.seed.ca_pem.trim()), "its CA is trusted inside");
        assert!(
            !std::fs::read_to_string("/etc/resolv.conf").unwrap().contains("169.254.77.1"),
            "and the host's own file is as it was"
        );

        let handle = machine.handle().clone();
        drop(machine);
        let other = VmId::generate();
        let gate = datapath.adopt(&other, spec.net, &common::policy(&other)).await;
        assert!(gate.is_err(), "this datapath holds it for its VM");
        let gate = datapath.adopt(&id, spec.net, &common::policy(&id)).await.unwrap();
        let machine = NetnsDriver::new().adopt(&spec, &handle, gate).await.unwrap();
        assert_eq!(machine.kill().await.unwrap(), Exit::Stopped);
    });
}

fn now() -> i64 {
    i64::try_from(std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs())
        .unwrap()
}
