//! What Firecracker is told, as data: its arguments and the requests of its API (`firecracker.yaml`), in their order.

use super::Plan;
use super::client::Request;
use serde_json::json;
use std::ffi::OsString;

/// Vsock addresses of guests are seen by no one but their own VMM, so all have the first free one.
const GUEST_CID: u32 = 3;

/// The program's arguments. Its own system call filter is on unless it is switched off.
pub fn args(plan: &Plan<'_>) -> Vec<OsString> {
    let id: String = plan.id.as_str().chars().map(|c| if c == '_' { '-' } else { c }).collect();
    ["--api-sock", super::API, "--id", &id, "--level", "Warning", "--log-path", super::LOG]
        .map(OsString::from)
        .to_vec()
}

/// Everything that makes and starts the VM.
pub fn configure(plan: &Plan<'_>) -> Vec<Request> {
    let mac = plan.net.mac.map(|byte| format!("{byte:02x}")).join(":");
    // A guest's restart is a reset by its keyboard controller, upon which Firecracker ends.
    let boot_args = format!("console=ttyS0 reboot=k panic=-1 {}", plan.cmdline);
    // Writeback: the guest's flushes reach the host's disk.
    let drive = |id: &str, path: &str, read_only: bool| {
        let body = json!({"drive_id": id, "path_on_host": path, "is_root_device": false, "is_read_only": read_only,
            "cache_type": "Writeback"});
        Request::put(&format!("/drives/{id}"), body)
    };
    vec![
        Request::put("/machine-config", json!({"vcpu_count": plan.vcpus, "mem_size_mib": plan.memory_mib})),
        Request::put(
            "/boot-source",
            json!({"kernel_image_path": super::KERNEL, "initrd_path": super::INITRD, "boot_args": boot_args}),
        ),
        drive("root", super::DISK, false),
        drive("seed", super::SEED, true),
        Request::put(
            "/network-interfaces/eth0",
            json!({"iface_id": "eth0", "guest_mac": mac, "host_dev_name": plan.net.link()}),
        ),
        Request::put("/vsock", json!({"guest_cid": GUEST_CID, "uds_path": super::AGENT})),
        Request::put("/entropy", json!({})),
        Request::put("/actions", json!({"action_type": "InstanceStart"})),
    ]
}

/// Holds the guest's CPUs, or lets them go on.
pub fn hold(held: bool) -> Request {
    Request::patch("/vm", json!({"state": if held { "Paused" } else { "Resumed" }}))
}

/// Its state: `Not started`, `Running` or `Paused`.
pub fn state() -> Request {
    Request::get("/")
}

/// Asks the guest to end: the three keys, on which its system restarts, upon which Firecracker ends.
pub fn end() -> Request {
    Request::put("/actions", json!({"action_type": "SendCtrlAltDel"}))
}

/// What it cannot do.
pub fn check(vcpus: u32) -> Result<(), String> {
    match vcpus {
        1 => Ok(()),
        n if n <= 32 && n.is_multiple_of(2) => Ok(()),
        n => Err(format!("Firecracker gives a VM one virtual CPU or an even number up to 32, not {n}")),
    }
}
