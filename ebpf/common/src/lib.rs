//! What the BPF programs and user space must agree on: addresses, marks, reasons, address ranges, the contents of the
//! maps, and the classifier that judges each frame.
//!
//! Owns constants, plain data and pure functions. Must never allocate, do I/O or depend on `std`: it is compiled
//! for the BPF target too.
#![no_std]
#![deny(unsafe_code)]

pub mod glance;
pub mod judge;
pub mod maps;
pub mod net;
pub mod packet;
pub mod range;
pub mod reason;

pub use judge::Verdict;
pub use reason::Reason;
