//! What the BPF programs and user space must agree on: addresses, marks, reasons, address ranges.
//!
//! Owns constants and plain data only. Must never allocate, do I/O or depend on `std`: it is compiled
//! for the BPF target too.
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod net;
pub mod range;
pub mod reason;

pub use reason::Reason;
