//! Virtual machines: images, disks, seeds and the drivers that boot them behind their gate.
//!
//! Owns processes and files of VMs. Must never start a guest without a `tapgate_datapath::Gate`, touch netlink or a
//! network namespace itself (that is `tapgate-netns`), or know of rules, secrets' values or users.
#![deny(unsafe_code)]

pub mod image;
pub mod quote;
pub mod seed;
