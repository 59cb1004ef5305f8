//! One module a resource: takes a request apart, asks the store, wakes the engine, answers. Nothing else decides here:
//! what is legal is the model's, what is unique the store's.

pub mod agents;
pub mod audit;
mod audit_stream;
pub mod counters;
pub mod device;
pub mod egress;
pub mod env;
pub mod health;
pub mod keys;
pub mod metrics;
pub mod pages;
pub mod secrets;
pub mod snapshots;
pub mod users;
pub mod vms;
