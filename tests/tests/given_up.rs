//! A disk that is still being fetched, from a store that trickles: whoever stops the VM, destroys it or ends the daemon does not wait
//! for it, and no half of it is left. With a real guest.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use std::{
    fs,
    path::PathBuf,
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};
use tapgate_e2e::{
    World,
    bucket::Bucket,
    daemon::{Daemon, Driver, Settings},
    demo::Stage,
    ssh,
    wait::until,
};

const ADDRESS: &str = "127.0.0.1:9200";
/// How many times a state is looked at, ten times a second.
const TRIES: usize = 300;
/// Reads of S3, as far as fetching needs them: from a folder, an octet now and then while a file `slow` is in it.
const STORE: &str = r#"
import http.server, os, re, socketserver, sys, time
folder, slow = sys.argv[1], sys.argv[2]
class Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def open_object(self):
        return open(os.path.join(folder, self.path.split("/", 2)[2]), "rb")
    def do_HEAD(self):
        file = self.open_object()
        size = os.fstat(file.fileno()).st_size
        self.send_response(200)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", '"one"')
        self.end_headers()
    def do_GET(self):
        file = self.open_object()
        size = os.fstat(file.fileno()).st_size
        first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"]).groups())
        file.seek(first)
        octets = file.read(last + 1 - first)
        self.send_response(206)
        self.send_header("Content-Length", str(len(octets)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(octets) - 1}/{size}")
        self.send_header("ETag", '"one"')
        self.end_headers()
        while octets and os.path.exists(slow):
            try:
                self.wfile.write(octets[:1])
            except OSError:
                print("hung up", flush=True)
                self.close_connection = True
                return
            octets = octets[1:]
            time.sleep(0.1)
        self.wfile.write(octets)
class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = allow_reuse_address = True
Server((sys.argv[3], int(sys.argv[4])), Store).serve_forever()
"#;

/// The store, until the test ends.
struct Store(Child);

impl Store {
    fn start(world: &World, folder: &std::path::Path) -> Self {
        let log = fs::File::create(world.folder().join("store.log")).unwrap();
        let (host, port) = ADDRESS.split_once(':').unwrap();
        let mut command = world.on_host("python3");
        command.args(["-c", STORE]).arg(folder).arg(slow(world)).args([host, port]);
        Self(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn slow(world: &World) -> PathBuf {
    world.folder().join("slow")
}

fn detail(stage: &Stage<'_>, vm: &str) -> String {
    let now = stage.api().get(&format!("/v1/vms/{vm}")).unwrap().expect(200).unwrap();
    now["status_detail"].as_str().unwrap().to_owned()
}

fn becomes(stage: &Stage<'_>, vm: &str, wanted: &str) {
    let mut last = String::new();
    for _ in 0..TRIES {
        last = detail(stage, vm);
        if last == wanted {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("it stays {last} and never becomes {wanted}\n{}", stage.daemon().log());
}

/// What there is of a disk in the VM's folder.
fn halves(stage: &Stage<'_>, vm: &str) -> Vec<String> {
    let files = fs::read_dir(stage.daemon().vm_folder(vm)).into_iter().flatten().flatten();
    let names = files.map(|file| file.file_name().into_string().unwrap());
    names.filter(|name| name.contains("packed") || name.contains("snapshot")).collect()
}

/// Makes a VM of the snapshot and comes back while its disk is fetched.
fn fetching(stage: &Stage<'_>, name: &str, snapshot: &str) -> String {
    let key = ssh::key(stage.world()).unwrap();
    let body = json!({"name": name, "public_key": key, "snapshot_id": snapshot});
    let vm = stage.api().post("/v1/vms", &body).unwrap().expect(201).unwrap();
    let vm = vm["id"].as_str().unwrap().to_owned();
    until("it is fetched", || !halves(stage, &vm).is_empty());
    assert_eq!(detail(stage, &vm), "creating");
    vm
}

fn call(stage: &Stage<'_>, vm: &str, what: &str, status: u16) -> Value {
    let path = format!("/v1/vms/{vm}/{what}");
    stage.api().post(&path, &json!({})).unwrap().expect(status).unwrap()
}

#[test]
fn real_vm_nobody_waits_for_a_disk_that_is_not_wanted_any_more() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Qemu).unwrap();
    let daemon = Daemon::start_with(&world, settings, "", &Bucket::environment()).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("parent").unwrap();
    stage.guest().unwrap().expect("echo kept > /root/marker; sync").unwrap();
    let path = format!("/v1/vms/{}/snapshots", stage.vm().unwrap());
    let made = stage.api().post(&path, &json!({})).unwrap().expect(201).unwrap();
    let snapshot = made["data"]["id"].as_str().unwrap().to_owned();
    until("the snapshot is ready", || {
        let now = stage.api().get(&format!("/v1/snapshots/{snapshot}")).unwrap().expect(200).unwrap();
        now["data"]["status"] == "ready"
    });
    stage.clear().unwrap();

    // From now on they come from far.
    stage.daemon_mut().kill().unwrap();
    let config = world.folder().join("tapgate.toml");
    let text = fs::read_to_string(&config).unwrap();
    let lines = format!(
        "snapshot_store = \"s3://far\"\ns3_endpoint = \"http://{ADDRESS}\"\ns3_region = \"us-east-1\"\n{text}"
    );
    fs::write(&config, lines).unwrap();
    fs::write(slow(&world), "").unwrap();
    let _store = Store::start(&world, &stage.daemon().data_dir());
    stage.daemon_mut().start_again().unwrap();

    let vm = fetching(&stage, "first", &snapshot);
    assert_eq!(stage.api().delete(&format!("/v1/vms/{vm}")).unwrap().status, 409, "it is not stopped");
    call(&stage, &vm, "start", 409);
    call(&stage, &vm, "stop", 200);
    for what in ["stop", "snapshots"] {
        call(&stage, &vm, what, 409);
    }
    becomes(&stage, &vm, "stopped");
    assert!(halves(&stage, &vm).is_empty(), "{:?}", halves(&stage, &vm));
    let told = || fs::read_to_string(world.folder().join("store.log")).unwrap().matches("hung up").count();
    until("the store is let go", || told() == 1);

    // Started again it is fetched again, and that can be ended too, whatever else is asked meanwhile.
    call(&stage, &vm, "start", 200);
    until("it is fetched", || !halves(&stage, &vm).is_empty());
    call(&stage, &vm, "stop", 200);
    let gone = stage.api().delete(&format!("/v1/vms/{vm}")).unwrap();
    assert_eq!(gone.status, 204);
    becomes(&stage, &vm, "destroyed");
    assert!(!stage.daemon().vm_folder(&vm).exists());

    // The daemon ends in the middle of it.
    let vm = fetching(&stage, "second", &snapshot);
    let pid = stage.daemon().pid().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    stage.daemon_mut().wait_for_death().unwrap();
    assert!(halves(&stage, &vm).is_empty(), "{:?}", halves(&stage, &vm));
    stage.daemon_mut().start_again().unwrap();
    until("it is fetched", || !halves(&stage, &vm).is_empty());
    call(&stage, &vm, "stop", 200);
    becomes(&stage, &vm, "stopped");

    // It is none the worse for it.
    fs::remove_file(slow(&world)).unwrap();
    call(&stage, &vm, "start", 200);
    stage.api().wait_ready(&vm).unwrap();
    stage.enter(vm).unwrap();
    assert_eq!(stage.guest().unwrap().expect("cat /root/marker").unwrap().trim(), "kept");
    stage.clear().unwrap();
}
