//! The datapath's user-space half. On this branch: only what the drivers need of it.
#![forbid(unsafe_code)]

mod gate;

pub use gate::Gate;
