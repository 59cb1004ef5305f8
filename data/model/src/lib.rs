//! The words that tapgate's parts share: ids, host names and patterns, policy and verdicts, secrets, audit events.
//!
//! Pure types: no I/O, no async, no SQL, no HTTP. What is constructed here is valid; parsing happens once, at the edge.
#![forbid(unsafe_code)]

pub mod audit;
pub mod cidr;
pub mod guest;
pub mod host;
pub mod id;
pub mod lifecycle;
pub mod note;
pub mod policy;
pub mod secret;
pub mod vm;

pub use audit::{AuditEvent, AuditSink, Protocol};
pub use cidr::Cidr;
pub use guest::GuestNet;
pub use host::{HostName, HostPattern};
pub use id::{AgentId, ApiKeyId, EnvId, EventId, RuleId, SecretId, SnapshotId, UserId, VmId};
pub use note::{Journal, Note, Stage};
pub use policy::{Mode, Rule, RuleLayer, RuleSet, RuleTarget, Verdict, VmPolicy};
pub use secret::{SecretBinding, SecretValue};
pub use tapgate_ebpf_common::Reason;
pub use vm::{Status, StatusDetail};
