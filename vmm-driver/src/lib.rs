//! Virtual machines: images, disks, seeds and the drivers that boot them behind their gate.
//!
//! Owns processes and files of VMs. Must never start a guest without a `tapgate_datapath::Gate`, touch netlink or a
//! network namespace itself (that is `tapgate-netns`), or know of rules, secrets' values or users.
#![deny(unsafe_code)]

pub mod accel;
mod agent;
pub mod block;
pub mod cgroup;
pub mod confine;
pub mod disk;
mod driver;
mod durable;
pub mod image;
mod netns_driver;
pub mod octets;
pub mod process;
mod qemu;
mod qmp;
pub mod quote;
pub mod ready;
mod rest;
pub mod seed;
mod spec;
pub mod turn;
mod unix;

pub use cgroup::IoLimits;
pub use confine::uid_of;
pub use driver::{BoxFuture, Running, Vmm};
pub use netns_driver::{NetnsDriver, NetnsRunning, exec as netns_exec};
pub use qemu::{MEMORY, QemuDriver, QemuRunning, default_program, keeps_memory, noted_handle, place_memory};
pub use rest::{ASIDE, ApiDriver, ApiRunning, Kind as ApiKind};
pub use seed::Seed;
pub use spec::{
    Exit, Handle, MemorySnapshot, Observed, Place, Resume, SnapshotInfo, Suspended, VmSpec, VmmError,
};
