//! The closed world that tapgate is shown and tested in: an `internet` of namespaces with its own DNS, TLS hosts, HTTP
//! echo and git server; a `host` that the daemon runs on; clients for its API and its guests. Real programs and
//! addresses reserved for documentation; nothing outside is ever reached.
#![forbid(unsafe_code)]

pub mod api;
pub mod bucket;
pub mod chaos;
pub mod counters;
pub mod daemon;
pub mod demo;
pub mod journal;
pub mod kvm_box;
pub mod net;
pub mod power;
pub mod raw;
pub mod reaper;
pub mod server;
pub mod sh;
pub mod sites;
pub mod ssh;
pub mod wait;
pub mod world;

pub use world::World;
