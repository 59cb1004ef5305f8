//! State in SQLite: typed, transactional, sealed where it is secret. Owns every SQL statement of tapgate.
//!
//! Two files in one folder: `tapgate.db` holds what users made (each commit is on disk before it is acknowledged),
//! `audit.db` holds what their VMs tried (written in batches, never acknowledged, so a power cut may cost the last
//! batch but a killed process costs nothing). Each has one writing thread; readers never wait for it (WAL).
//! Must never speak HTTP, nor let SQL or a rusqlite type out.
#![forbid(unsafe_code)]

mod admin;
mod agents;
pub mod audit;
mod collection;
mod device;
mod env;
mod error;
mod idempotency;
mod keys;
mod page;
mod policy;
mod pool;
mod rules;
mod schema;
mod seal;
mod secrets;
mod snapshots;
mod store;
mod suspension;
mod tickets;
mod time;
mod users;
mod version;
mod vms;

pub use agents::{AgentFilter, AgentRecord, AgentStatus, NewAgent};
pub use audit::{AuditFilter, AuditLoad, AuditLog, AuditRecord, Keep, Recovered};
pub use device::{DeviceCode, DeviceState};
pub use env::EnvRecord;
pub use error::{Conflict, Kind, StoreError};
pub use idempotency::{Known, request::keyed};
pub use keys::{ApiKeyRecord, Caller, IssuedKey};
pub use page::{Order, Page, PageRequest};
pub use policy::{AccountPolicy, VmEgress};
pub use pool::QueueLoad;
pub use rules::{NewRule, RuleFilter, RuleRecord, RuleSort};
pub use seal::{SealError, SealKey};
pub use secrets::{NewSecret, SecretChange, SecretFilter, SecretQuota, SecretRecord, SecretSort};
pub use snapshots::{MemoryObject, SnapshotKind, SnapshotRecord, SnapshotStatus, StoredSnapshot};
pub use store::Store;
pub use suspension::Suspension;
pub use time::now_us;
pub use users::{NewUser, UserRecord};
pub use version::Expected;
pub use vms::{CaPem, Capacity, Desired, NewVm, Resources, SshPorts, VmFilter, VmRecord, VmSort};
