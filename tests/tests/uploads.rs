//! Uploads to a store that is slow with one account's: another's are not behind all of these, and what is deleted goes meanwhile.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::json;
use std::{
    fs,
    path::Path,
    process::{Child, Stdio},
};
use tapgate_e2e::{
    World,
    api::Client,
    bucket::Bucket,
    daemon::{Daemon, Driver, Settings},
    sh, ssh,
    wait::until,
};

const ADDRESS: &str = "127.0.0.1:9300";
/// Writes of S3, as far as storing and removing need them; a part waits while a file with the snapshot's ID is in the folder.
const STORE: &str = r#"
import http.server, os, re, socketserver, sys, time
slow = sys.argv[1]
class Store(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def answer(self, status, body="", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())
    def body(self):
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))
    def do_PUT(self):
        self.body()
        print("PUT", self.path, flush=True)
        snapshot = re.search(r"snap_\w+", self.path)[0]
        while os.path.exists(os.path.join(slow, snapshot)):
            time.sleep(0.05)
        self.answer(200, ETag='"part"')
    def do_POST(self):
        body = self.body().decode()
        if "uploads" in self.path:
            kind, more = "InitiateMultipartUploadResult", "<UploadId>one</UploadId>"
        elif "uploadId" in self.path:
            kind, more = "CompleteMultipartUploadResult", '<ETag>"whole"</ETag>'
        else:
            print("DELETE", body, flush=True)
            kind, more = "DeleteResult", ""
        self.answer(200, f"<{kind}>{more}</{kind}>")
    def do_DELETE(self):
        print("DELETE", self.path, flush=True)
        self.answer(204)
    def log_message(self, *_):
        pass
class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = allow_reuse_address = True
Server((sys.argv[2], int(sys.argv[3])), Store).serve_forever()
"#;

/// The store, until the test ends.
struct Store(Child);

impl Store {
    fn start(world: &World, slow: &Path) -> Self {
        let log = fs::File::create(world.folder().join("store.log")).unwrap();
        let (host, port) = ADDRESS.split_once(':').unwrap();
        let mut command = world.on_host("python3");
        command.args(["-c", STORE]).arg(slow).args([host, port]);
        Self(command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn().unwrap())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn change(daemon: &Daemon<'_>, sql: &str) {
    let script = "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])";
    let database = daemon.data_dir().join("tapgate.db");
    sh::run("python3", ["-c", script, database.to_str().unwrap(), sql]).unwrap();
}

fn status(api: &Client<'_>, snapshot: &str) -> String {
    let now = api.get(&format!("/v1/snapshots/{snapshot}")).unwrap().expect(200).unwrap();
    now["data"]["status"].as_str().unwrap().to_owned()
}

/// As many records of snapshots. A namespace has none to give: they fail.
fn snapshots(world: &World, api: &Client<'_>, count: usize) -> Vec<String> {
    let vm = api.create_vm("one", &ssh::key(world).unwrap()).unwrap();
    api.wait_ready(&vm).unwrap();
    let made = (0..count).map(|_| {
        let made = api.post(&format!("/v1/vms/{vm}/snapshots"), &json!({})).unwrap().expect(201).unwrap();
        made["data"]["id"].as_str().unwrap().to_owned()
    });
    made.collect()
}

/// Copies that a daemon before this one left to be uploaded.
#[test]
fn an_account_with_much_to_store_holds_up_neither_another_nor_what_is_deleted() {
    let world = World::new().unwrap();
    let slow = world.folder().join("slow");
    fs::create_dir(&slow).unwrap();
    let _store = Store::start(&world, &slow);
    let lines = format!(
        "snapshot_store = \"s3://far\"\ns3_endpoint = \"http://{ADDRESS}\"\ns3_region = \"us-east-1\"\n"
    );
    let settings = Settings::of(Driver::Netns).unwrap();
    let mut daemon = Daemon::start_with(&world, settings, &lines, &Bucket::environment()).unwrap();
    let busy = daemon.client().sign_up("ada").unwrap();
    let other = daemon.client().sign_up("grace").unwrap();
    let mut many = snapshots(&world, &busy, 5);
    let (old, dropped) = (many.pop().unwrap(), many.pop().unwrap());
    let single = snapshots(&world, &other, 1).remove(0);
    for (api, id) in many.iter().chain([&old, &dropped]).map(|id| (&busy, id)).chain([(&other, &single)]) {
        until("it fails", || status(api, id) == "failed");
    }
    daemon.kill().unwrap();
    change(
        &daemon,
        &format!(
            "UPDATE snapshots SET status = 'uploading', failure = NULL;
             UPDATE snapshots SET status = 'ready', r2_key = 'snapshots/{old}.qcow2.zst', size_bytes = 1 WHERE id = '{old}'"
        ),
    );
    for id in many.iter().chain([&dropped, &single]) {
        fs::write(daemon.data_dir().join("staging").join(format!("{id}.qcow2")), vec![7; 1 << 20]).unwrap();
    }
    fs::write(slow.join(&many[0]), "").unwrap();
    daemon.start_again().unwrap();
    let told = |what: &str, id: &str| {
        let log = fs::read_to_string(world.folder().join("store.log")).unwrap();
        log.lines().any(|line| line.starts_with(what) && line.contains(id))
    };
    until("the first of many is on its way", || told("PUT", &many[0]));

    until("another account's is stored", || status(&other, &single) == "ready");
    for id in [&old, &dropped] {
        busy.delete(&format!("/v1/snapshots/{id}")).unwrap().expect(204).unwrap();
    }
    until("what is deleted is removed", || told("DELETE", &old));
    for id in &many {
        assert_eq!(status(&busy, id), "uploading", "they wait for each other all the same");
    }
    for id in &many[1..] {
        assert!(!told("PUT", id), "an account has one upload at a time");
    }

    fs::remove_file(slow.join(&many[0])).unwrap();
    for id in &many {
        until("it is stored too", || status(&busy, id) == "ready");
    }
    until("nothing is staged any more", || {
        fs::read_dir(daemon.data_dir().join("staging")).unwrap().next().is_none()
    });
    assert!(!told("PUT", &dropped), "what is deleted need not be stored to be removed");
}

#[test]
fn what_cannot_be_removed_holds_up_no_other() {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    let daemon = Daemon::start(&world, settings).unwrap();
    let api = daemon.client().sign_up("ada").unwrap();
    // More than are given up on at a time.
    let all = snapshots(&world, &api, 13);
    for id in &all {
        until("it fails", || status(&api, id) == "failed");
    }
    // A folder is no object.
    let objects = daemon.data_dir().join("snapshots");
    let place = |id: &String| objects.join(format!("{id}.qcow2.zst")).join("kept");
    let ([stuck @ .., last], free) = all.split_at(11) else { unreachable!() };
    stuck.iter().for_each(|id| fs::create_dir_all(place(id)).unwrap());
    for id in stuck.iter().chain(free) {
        api.delete(&format!("/v1/snapshots/{id}")).unwrap().expect(204).unwrap();
    }
    let collected = |id: &String| {
        daemon.log().lines().any(|line| line.contains("snapshot.collected") && line.contains(id))
    };
    for id in free {
        until("the others are removed", || collected(id));
    }
    assert!(!stuck.iter().any(collected));

    stuck.iter().for_each(|id| fs::remove_dir_all(objects.join(format!("{id}.qcow2.zst"))).unwrap());
    api.delete(&format!("/v1/snapshots/{last}")).unwrap().expect(204).unwrap();
    for id in stuck {
        until("they are tried again", || collected(id));
    }
}
