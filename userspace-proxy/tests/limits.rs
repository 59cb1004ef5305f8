//! A VM at one of its limits is refused or held back, and others notice nothing.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::{net::Ipv4Addr, sync::Arc};
use support::{ATTACKER, GUEST, SERVER, World, world};
use tapgate_model::{GuestNet, Mode, Reason, Verdict, VmId, VmPolicy};
use tapgate_proxy::{Limits, VmCa};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
};

const OTHER_GUEST: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 2);
const GET: &str = "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n";

async fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.serve((SERVER, 80), None).await;
    w.rules(Mode::Enforce, &["api.example"], &[]);
    let net = GuestNet::new(1, Ipv4Addr::new(10, 214, 0, 0), None);
    assert_eq!(net.v4, OTHER_GUEST);
    let vm = VmId::generate();
    let ca = Arc::new(VmCa::generate(&vm).unwrap());
    w.table.insert(net, ca, Arc::new(VmPolicy { vm, ..VmPolicy::clone(&w.policy) }));
}

/// Uploads so many octets and gives the answer.
async fn upload(stream: TcpStream, octets: usize) -> String {
    let (mut read, mut write) = stream.into_split();
    let head = format!(
        "POST /u HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nContent-Length: {octets}\r\n\r\n"
    );
    let body = vec![b'x'; octets];
    let mut answer = Vec::new();
    let (_, read) = tokio::join!(
        async {
            write.write_all(head.as_bytes()).await.unwrap();
            write.write_all(&body).await
        },
        async {
            let mut start = [0; 64];
            let length = read.read(&mut start).await.unwrap();
            answer.extend_from_slice(&start[..length]);
        }
    );
    let () = read;
    String::from_utf8_lossy(&answer).into_owned()
}

#[test]
fn octets_beyond_the_rate_wait_and_only_that_vms() {
    world(|mut w| async move {
        start(&mut w).await;
        // A second's worth at once and three more: far longer than the other VM takes for all of its own.
        let rate = 100 * 1024;
        assert!(w.table.limit(&w.policy.vm, Limits { octets_per_second: Some(rate), ..Limits::default() }));
        let octets = usize::try_from(rate).unwrap() * 4;
        let slow = upload(w.connect_as(GUEST, (ATTACKER, 80)).await, octets);
        let mut others = Vec::new();
        for _ in 0..3 {
            others.push(w.connect_as(OTHER_GUEST, (ATTACKER, 80)).await);
        }
        let quick = async {
            for other in others {
                assert!(upload(other, octets).await.starts_with("HTTP/1.1 200"));
            }
        };
        let (mut slow, mut quick) = (Box::pin(slow), Box::pin(quick));
        tokio::select! {
            said = &mut slow => panic!("the VM at its rate was done before one without a bound: {said}"),
            () = &mut quick => {}
        }
        // The bound can be lifted while it runs, and nothing is lost by waiting.
        assert!(w.table.limit(&w.policy.vm, Limits::default()));
        assert!(slow.await.starts_with("HTTP/1.1 200"));
        let events = w.events(4).await;
        assert!(events.iter().all(|event| event.bytes_out == octets as u64), "{events:#?}");
    });
}

#[test]
fn connections_beyond_the_rate_are_reset_and_only_that_vms() {
    world(|mut w| async move {
        start(&mut w).await;
        assert!(w.table.limit(&w.policy.vm, Limits { new_per_second: 1, ..Limits::default() }));
        let mut refused = 0;
        for _ in 0..20 {
            let mut stream = w.connect_as(GUEST, (ATTACKER, 80)).await;
            let _ = stream.write_all(GET.as_bytes()).await;
            let mut all = Vec::new();
            refused += usize::from(stream.read_to_end(&mut all).await.is_err() || all.is_empty());
            let mut other = w.connect_as(OTHER_GUEST, (ATTACKER, 80)).await;
            other.write_all(GET.as_bytes()).await.unwrap();
            all.clear();
            other.read_to_end(&mut all).await.unwrap();
            assert!(all.starts_with(b"HTTP/1.1 200"), "the other VM is served");
        }
        assert!(refused > 0);
        let events = w.events(40).await;
        let limited = events.iter().filter(|event| event.verdict == Verdict::Deny { reason: Reason::Limit });
        assert_eq!(limited.count(), refused, "one event for each");
    });
}
