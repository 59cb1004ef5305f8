//! A VM's port of the host: the first that no other VM and nobody else has.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use common::*;
use std::sync::Arc;
use tapgate_store::*;

#[tokio::test]
async fn a_port_that_somebody_has_is_passed_over_and_a_full_range_is_said_so() {
    let (_folder, store) = fresh();
    let user = user(&store, "ports@example.com").await;
    let with = |name: &str, busy: &'static [u16]| {
        let is_free: Arc<dyn Fn(u16) -> bool + Send + Sync> = Arc::new(move |port| !busy.contains(&port));
        NewVm { ssh_ports: SshPorts { range: 2200..=2203, is_free }, ..new_vm(&user, name) }
    };
    let port = async |new| store.vm_create(new).await.map(|made| made.ssh_port);
    assert_eq!(port(with("a", &[2200])).await.unwrap(), 2201);
    assert_eq!(port(with("b", &[2202])).await.unwrap(), 2200);
    assert_eq!(port(with("c", &[2202])).await.unwrap(), 2203);
    let full = port(with("d", &[2202])).await;
    assert!(matches!(full, Err(StoreError::Conflict(Conflict::HostFull))), "{full:?}");
    assert_eq!(port(with("d", &[])).await.unwrap(), 2202);
}
