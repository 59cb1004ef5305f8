//! What is the daemon's own trouble costs no VM its life: a port that another process has, records that are locked or do not open, a
//! VMM that answers late. The same process serves the VM afterwards, and what it sends is judged all the while.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::{
    fs,
    io::{BufRead as _, BufReader},
    process::{Child, Stdio},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    sh, sites,
    wait::until,
};

fn stage(world: &World, driver: Driver) -> Stage<'_> {
    let settings = Settings::of(driver).unwrap();
    let mut stage = Stage::new(world, Daemon::start(world, settings).unwrap()).unwrap();
    stage.boot("box").unwrap();
    stage
}

/// A script that says when it has what it is to hold, and holds it until its input ends.
struct Holder(Child);

impl Holder {
    fn start(world: &World, script: &str, word: &str) -> Self {
        let mut command = world.on_host("python3");
        command.args(["-c", script, word]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line.trim(), "held");
        Self(child)
    }

    fn let_go(mut self) {
        drop(self.0.stdin.take());
        self.0.wait().unwrap();
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Takes a port as another daemon's forward would.
const PORT: &str = "import socket, sys\ns = socket.socket()\ns.bind(('0.0.0.0', int(sys.argv[1])))\ns.listen()\n\
    print('held', flush=True)\nsys.stdin.read()";
/// Locks the records against whoever writes.
const LOCK: &str = "import sqlite3, sys\ndb = sqlite3.connect(sys.argv[1], isolation_level=None)\ndb.execute('BEGIN EXCLUSIVE')\n\
    print('held', flush=True)\nsys.stdin.read()\ndb.execute('ROLLBACK')";

fn change(stage: &Stage<'_>, sql: &str) {
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])";
    let database = stage.daemon().data_dir().join("tapgate.db");
    sh::run("python3", ["-c", script, database.to_str().unwrap(), sql]).unwrap();
}

/// The daemon dies, and its SSH connections with it.
fn kill(stage: &mut Stage<'_>) -> (String, u32) {
    let vm = stage.vm().unwrap().to_owned();
    let vmm = stage.daemon().vmm(&vm).unwrap();
    stage.guest().unwrap().hang_up();
    stage.daemon_mut().kill().unwrap();
    (vm, vmm)
}

fn detail(stage: &Stage<'_>, vm: &str) -> String {
    let body = stage.api().get(&format!("/v1/vms/{vm}")).unwrap().expect(200).unwrap();
    body["status_detail"].as_str().unwrap().to_owned()
}

fn same(stage: &Stage<'_>, vm: &str, vmm: u32) {
    assert_eq!(stage.daemon().vmm(vm), Some(vmm), "another VMM runs");
    assert_eq!(detail(stage, vm), "ready");
    assert!(!stage.daemon().log().contains("vm.not_adopted"), "{}", stage.daemon().log());
}

#[test]
fn a_vm_lives_although_another_process_has_its_ssh_port() {
    let world = World::new().unwrap();
    let mut stage = stage(&world, Driver::Netns);
    let (vm, vmm) = kill(&mut stage);
    let port = Holder::start(&world, PORT, "22000");
    stage.daemon_mut().start_again().unwrap();
    until("the port is missed", || stage.daemon().log().contains("ssh.port_taken"));
    same(&stage, &vm, vmm);
    // One that is made meanwhile gets a port that is free.
    let other = stage.api().create_vm("other", &tapgate_e2e::ssh::key(&world).unwrap()).unwrap();
    stage.api().wait_ready(&other).unwrap();
    port.let_go();
    until("the port is back", || stage.daemon().log().contains("ssh.port_open"));
    assert_eq!(stage.guest().unwrap().expect("echo in").unwrap(), "in");
    same(&stage, &vm, vmm);
}

/// What is busy when a VM is made is not given to it.
#[test]
fn a_new_vm_gets_no_port_that_another_process_has() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let _ports = [22000, 22001].map(|port: u16| Holder::start(&world, PORT, &port.to_string()));
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let path = format!("/v1/vms/{}/ssh", stage.vm().unwrap());
    let info = stage.api().get(&path).unwrap().expect(200).unwrap();
    assert_eq!(info["port"], 22002);
    assert_eq!(stage.guest().unwrap().expect("echo in").unwrap(), "in");
}

#[test]
fn a_vm_lives_although_the_records_are_locked_for_ten_seconds() {
    let world = World::new().unwrap();
    let mut stage = stage(&world, Driver::Netns);
    let (vm, vmm) = kill(&mut stage);
    let database = stage.daemon().data_dir().join("tapgate.db");
    let lock = Holder::start(&world, LOCK, database.to_str().unwrap());
    let unlock = thread::spawn(move || {
        thread::sleep(Duration::from_secs(10));
        lock.let_go();
    });
    stage.daemon_mut().start_again().unwrap();
    unlock.join().unwrap();
    until("it is adopted", || stage.daemon().log().contains("vm.adopted"));
    same(&stage, &vm, vmm);
    assert_eq!(stage.guest().unwrap().expect("echo in").unwrap(), "in");
}

/// Its CA does not open: the VM runs on, what would have to be opened is refused, and all is well once the CA is there again.
#[test]
fn a_vm_lives_without_its_ca_and_nothing_of_it_is_opened_or_let_past() {
    let world = World::new().unwrap();
    let mut stage = stage(&world, Driver::Netns);
    let api = sites::API.name;
    stage.api().rule("host", api).unwrap();
    stage.api().secret("token", "TOKEN", "real-value-of-the-test", &[api]).unwrap();
    // An answer only where it is opened: the guest trusts the VM's own authority.
    let asked =
        |stage: &Stage<'_>| stage.sh(&format!("curl -sS -m 20 https://{api}/ 2>&1; true")).unwrap().out;
    assert!(asked(&stage).contains("hello from"), "{}", asked(&stage));
    let (vm, vmm) = kill(&mut stage);
    change(&stage, "CREATE TABLE kept AS SELECT id, ca_key FROM vms; UPDATE vms SET ca_key = zeroblob(64)");
    stage.daemon_mut().start_again().unwrap();
    until("its CA is missed", || stage.daemon().log().contains("vm.ca_not_read"));
    until("it is adopted", || stage.daemon().log().contains("vm.adopted"));
    same(&stage, &vm, vmm);
    let before = world.counters().unwrap();
    assert!(!asked(&stage).contains("hello from"), "TLS was let past");
    assert_eq!(world.counters().unwrap().since(&before).of(sites::API), 0, "something reached the site");
    change(
        &stage,
        "UPDATE vms SET ca_key = (SELECT ca_key FROM kept WHERE kept.id = vms.id); DROP TABLE kept",
    );
    until("its CA is read", || stage.daemon().log().contains("vm.ca_read"));
    assert!(asked(&stage).contains("hello from"), "{}", asked(&stage));
    same(&stage, &vm, vmm);
}

/// A VMM that is stopped for some seconds while the next daemon comes.
#[test]
fn a_vm_lives_although_its_vmm_leaves_a_look_unanswered() {
    let world = World::new().unwrap();
    let mut stage = stage(&world, Driver::Netns);
    let (vm, vmm) = kill(&mut stage);
    let signal = |name: &str| sh::run("kill", [name, &vmm.to_string()]).unwrap();
    signal("-STOP");
    let log = world.folder().join("tapgate.log");
    thread::scope(|scope| {
        scope.spawn(|| {
            let said = |word: &str| fs::read_to_string(&log).unwrap().contains(word);
            until("a look at it", || said("vm.look_unanswered") || said("vm.not_adopted"));
            signal("-CONT");
        });
        stage.daemon_mut().start_again().unwrap();
    });
    until("it is adopted", || stage.daemon().log().contains("vm.adopted"));
    same(&stage, &vm, vmm);
    assert_eq!(stage.guest().unwrap().expect("echo in").unwrap(), "in");
}
