//! What Cloud Hypervisor is told, as data: the whole VM by its arguments, with the tap and the API's socket as descriptors;
//! then requests of its API (`cloud-hypervisor.yaml`, version 1).

use super::Plan;
use super::client::Request;
use std::ffi::OsString;

const GUEST_CID: u32 = 3;

/// The descriptors that it inherits, by their numbers in its process.
pub mod fd {
    /// The tap.
    pub const TAP: i32 = 3;
    /// The listening socket of its API.
    pub const API: i32 = 4;
}

/// The program's arguments.
pub fn args(plan: &Plan<'_>) -> Vec<OsString> {
    let mac = plan.net.mac.map(|byte| format!("{byte:02x}")).join(":");
    let cmdline = format!("console=ttyS0 panic=-1 {}", plan.cmdline);
    let words = [
        ("--api-socket", format!("fd={}", fd::API)),
        // It is on by default; written out, so that no default can take it away.
        ("--seccomp", "true".to_owned()),
        ("--cpus", format!("boot={}", plan.vcpus)),
        ("--memory", format!("size={}M", plan.memory_mib)),
        ("--kernel", super::KERNEL.to_owned()),
        ("--initramfs", super::INITRD.to_owned()),
        ("--cmdline", cmdline),
        ("--net", format!("fd=[{}],mac={mac},num_queues=2", fd::TAP)),
        ("--rng", "src=/dev/urandom".to_owned()),
        ("--vsock", format!("cid={GUEST_CID},socket={}", super::AGENT)),
        ("--serial", format!("file={}", super::CONSOLE)),
        ("--console", "off".to_owned()),
        ("--event-monitor", format!("path={}", super::EVENTS)),
        ("--log-file", super::LOG.to_owned()),
        ("--disk", format!("path={},image_type=raw", super::DISK)),
    ];
    let mut args: Vec<OsString> =
        words.iter().flat_map(|(flag, value)| [flag.into(), value.into()]).collect();
    args.push(format!("path={},image_type=raw,readonly=on", super::SEED).into());
    args
}

/// Holds the guest's CPUs, or lets them go on.
pub fn hold(held: bool) -> Request {
    Request::act(if held { "/api/v1/vm.pause" } else { "/api/v1/vm.resume" })
}

/// Its state: `Created`, `Running`, `Shutdown` or `Paused`.
pub fn state() -> Request {
    Request::get("/api/v1/vm.info")
}

/// Presses the power button.
pub fn end() -> Request {
    Request::act("/api/v1/vm.power-button")
}
