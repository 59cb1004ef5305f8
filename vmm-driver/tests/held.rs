//! A guest that is held while its disk is copied goes on afterwards, or its VM has failed: never is one held that is said to run.
//! The VMMs are the simulated ones; one refuses to let its guest go on as often as it is told.
#![allow(missing_docs, dead_code, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;
mod subject;

use common::{PATIENCE, Reap, World};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;
use subject::Subject;
use tapgate_datapath::Datapath;
use tapgate_model::VmId;
use tapgate_vmm::{ApiKind, Exit, Running, VmSpec};

pub fn fresh() -> VmId {
    VmId::generate()
}

/// A VM whose guest cannot hold its file systems still, so that it is held itself.
async fn boot(
    subject: &Subject,
    world: &World,
    datapath: &Datapath,
    refusals: u32,
) -> (VmSpec, Box<dyn Running>, Reap) {
    let env = [("FREEZES", "no".to_owned()), ("REFUSALS", refusals.to_string())];
    let env = env.map(|(name, value)| (name.to_owned(), value)).to_vec();
    let spec = subject.spec(world, 45, env);
    let gate = common::gate(datapath, &spec).await;
    let machine = subject.driver().boot(&spec, gate).await.unwrap_or_else(|error| panic!("{error}"));
    let reap = Reap::of(machine.handle().process.pid);
    subject.ready(datapath, &spec, machine.as_ref()).await;
    (spec, machine, reap)
}

/// Asks the VMM behind the driver's back.
fn ask(kind: ApiKind, spec: &VmSpec, machine: &dyn Running, words: [&str; 2]) -> String {
    let (path, request) = match kind {
        ApiKind::CloudHypervisor => (spec.dir.join("qmp.sock"), words[0]),
        ApiKind::Firecracker => {
            (format!("/proc/{}/root/run/api.sock", machine.handle().process.pid).into(), words[1])
        }
    };
    let (head, body) = request.split_once('|').unwrap_or((request, ""));
    let mut stream = UnixStream::connect(path).unwrap();
    let length = body.len();
    write!(
        stream,
        "{head} HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    answer
}

fn hold(kind: ApiKind, spec: &VmSpec, machine: &dyn Running) {
    let answer = ask(kind, spec, machine, ["PUT /api/v1/vm.pause", "PATCH /vm|{\"state\":\"Paused\"}"]);
    assert!(answer.starts_with("HTTP/1.1 204"), "{answer}");
    assert!(!runs(kind, spec, machine));
}

fn runs(kind: ApiKind, spec: &VmSpec, machine: &dyn Running) -> bool {
    ask(kind, spec, machine, ["GET /api/v1/vm.info", "GET /"]).contains("\"Running\"")
}

const KINDS: [ApiKind; 2] = [ApiKind::CloudHypervisor, ApiKind::Firecracker];

#[test]
fn a_guest_that_is_not_let_go_on_at_once_is_let_go_on_later() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        for kind in KINDS {
            let subject = Subject::simulated(&world, kind);
            let (spec, machine, _reap) = boot(&subject, &world, &datapath, 2).await;
            let file = world.dir.path().join(format!("{}.qcow2", spec.id));
            let info = machine.snapshot(&file).await.unwrap();
            assert!(!info.frozen && file.exists(), "{info:?}");
            assert!(runs(kind, &spec, machine.as_ref()), "{kind:?}: it is still held");
            machine.check().await.unwrap();
            assert_eq!(machine.kill().await.unwrap(), Exit::Stopped);
            datapath.detach(spec.net).await.unwrap();
        }
    });
}

#[test]
fn a_guest_that_is_never_let_go_on_has_failed() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        for kind in KINDS {
            let subject = Subject::simulated(&world, kind);
            let (spec, machine, _reap) = boot(&subject, &world, &datapath, u32::MAX).await;
            let file = world.dir.path().join(format!("{}.qcow2", spec.id));
            let error = machine.snapshot(&file).await.unwrap_err().to_string();
            assert!(error.contains("could not be let go on"), "{error}");
            assert!(!file.exists());
            let exit = tokio::time::timeout(PATIENCE, machine.wait()).await.expect("it ends");
            let told = matches!(&exit, Exit::Crashed(why) if why.contains("could not be let go on"));
            assert!(told, "{kind:?}: {exit:?}");
            datapath.detach(spec.net).await.unwrap();
        }
    });
}

/// As after a snapshot whose task was given up in the middle.
#[test]
fn a_guest_that_is_held_for_nobody_is_noticed() {
    World::run(|world| async move {
        let datapath = world.datapath().await;
        for kind in KINDS {
            let subject = Subject::simulated(&world, kind);
            let (spec, machine, _reap) = boot(&subject, &world, &datapath, 1).await;
            let machine = Arc::<dyn Running>::from(machine);
            hold(kind, &spec, machine.as_ref());
            machine.check().await.unwrap();
            assert!(runs(kind, &spec, machine.as_ref()), "{kind:?}: whoever asked let it be");

            hold(kind, &spec, machine.as_ref());
            let goes_on = async {
                while !runs(kind, &spec, machine.as_ref()) {
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            };
            tokio::time::timeout(PATIENCE, goes_on).await.expect("nobody had to ask");
            assert_eq!(machine.kill().await.unwrap(), Exit::Stopped);
            datapath.detach(spec.net).await.unwrap();
        }
    });
}
