//! A store in a folder of its own, with a user, for the tests of this crate.
#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "each test file uses a part of it")]

use std::path::Path;
use tapgate_model::{SecretValue, UserId, VmId};
use tapgate_store::*;

pub fn open(folder: &Path) -> Store {
    let key = SealKey::load_or_create(&folder.join("seal.key")).unwrap();
    Store::open(&folder.join("db"), key).unwrap()
}

pub fn fresh() -> (tempfile::TempDir, Store) {
    let folder = tempfile::tempdir().unwrap();
    let store = open(folder.path());
    (folder, store)
}

pub async fn user(store: &Store, email: &str) -> UserId {
    let new = NewUser {
        first_name: "A".into(),
        last_name: "B".into(),
        email: email.into(),
        password: "$argon2id$".into(),
    };
    store.user_create(new, "CLI").await.unwrap().0.id
}

pub fn new_vm(user: &UserId, name: &str) -> NewVm {
    NewVm {
        id: VmId::generate(),
        user: user.clone(),
        name: name.into(),
        public_key: "ssh-ed25519 AAAA".into(),
        snapshot: None,
        resources: Resources { vcpus: 1, memory_mib: 512, disk_bytes: 1 << 30 },
        ca: CaPem { cert: "cert".into(), key: String::from("ca key of a VM").into() },
        ssh_ports: SshPorts { range: 2200..=2299, is_free: std::sync::Arc::new(|_| true) },
        slots: 100,
        quota: 50,
        capacity: Capacity::default(),
    }
}

pub fn new_secret(name: &str, env_var: &str, value: &str) -> NewSecret {
    NewSecret {
        name: name.into(),
        value: SecretValue::new(value.as_bytes().to_vec()).unwrap(),
        env_var: env_var.into(),
        hosts: vec!["*".parse().unwrap()],
        comment: None,
    }
}

/// So many secrets, of any length.
pub fn secrets(count: u32) -> SecretQuota {
    SecretQuota { count, octets: u32::MAX }
}

pub fn page(limit: u32) -> PageRequest {
    PageRequest { limit, cursor: None, order: Order::Desc }
}
