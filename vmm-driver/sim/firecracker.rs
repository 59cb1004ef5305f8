//! Firecracker's part: the requests of `firecracker.yaml` that make a VM, in an order that it takes.

use crate::api::{self, Answer, Call};
use crate::fields::{Field, Kind, check};
use crate::{Machine, Role, agent, flag, refuse};
use serde_json::{Value, json};
use std::fs::{self, File, OpenOptions};
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex};
use tokio::net::UnixListener;

const MACHINE: &[Field] = &[
    ("vcpu_count", true, Kind::Integer(1, 32)),
    ("mem_size_mib", true, Kind::Integer(1, u64::MAX)),
    ("smt", false, Kind::Bool),
    ("track_dirty_pages", false, Kind::Bool),
    ("cpu_template", false, Kind::OneOf(&["C3", "T2", "T2S", "T2CL", "T2A", "V1N1", "None"])),
    ("huge_pages", false, Kind::OneOf(&["None", "Transparent", "2M"])),
];
const BOOT: &[Field] = &[
    ("kernel_image_path", true, Kind::Text),
    ("initrd_path", false, Kind::Text),
    ("boot_args", false, Kind::Text),
];
const DRIVE: &[Field] = &[
    ("drive_id", true, Kind::Text),
    ("is_root_device", true, Kind::Bool),
    ("partuuid", false, Kind::Text),
    ("cache_type", false, Kind::OneOf(&["Unsafe", "Writeback"])),
    ("is_read_only", false, Kind::Bool),
    ("path_on_host", false, Kind::Text),
    ("io_engine", false, Kind::OneOf(&["Sync", "Async"])),
];
const NET: &[Field] = &[
    ("iface_id", true, Kind::Text),
    ("host_dev_name", true, Kind::Text),
    ("guest_mac", false, Kind::Text),
    ("mtu", false, Kind::Integer(68, 65535)),
];
const VSOCK: &[Field] = &[
    ("guest_cid", true, Kind::Integer(3, u32::MAX as u64)),
    ("uds_path", true, Kind::Text),
    ("vsock_id", false, Kind::Text),
];
const ACTION: &[Field] =
    &[("action_type", true, Kind::OneOf(&["FlushMetrics", "InstanceStart", "SendCtrlAltDel"]))];
const STATE: &[Field] = &[("state", true, Kind::OneOf(&["Paused", "Resumed"]))];

/// What was configured so far.
#[derive(Default)]
struct Config {
    machine: bool,
    boot: Option<File>,
    drives: Vec<(String, File)>,
    tap: Option<OwnedFd>,
    vsock: Option<String>,
}

pub fn serve(args: &[String]) -> Arc<Machine> {
    for pair in args.chunks(2) {
        if !["--api-sock", "--id", "--level", "--log-path"].contains(&pair[0].as_str()) || pair.len() != 2 {
            refuse(&format!("unknown argument {pair:?}"));
        }
    }
    let id = flag(args, "--id");
    if id.len() > 64 || !id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-') {
        refuse("the id may have 64 letters, digits and `-`");
    }
    if !["Off", "Trace", "Debug", "Info", "Warning", "Error"].contains(&flag(args, "--level")) {
        refuse("no such level");
    }
    OpenOptions::new().create(true).append(true).open(flag(args, "--log-path")).unwrap();
    match OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        Err(e) if e.kind() == std::io::ErrorKind::PermissionDenied => refuse("/dev/kvm is not the VMM's"),
        // A machine without KVM has the node in the view all the same.
        _ => {}
    }
    let listener =
        UnixListener::bind(flag(args, "--api-sock")).unwrap_or_else(|e| refuse(&format!("the socket: {e}")));
    let stdout: OwnedFd = std::io::stdout().as_fd().try_clone_to_owned().unwrap();
    let machine = Arc::new(Machine {
        role: Role::Firecracker,
        state: Mutex::new("Not started"),
        console: Mutex::new(stdout.into()),
        events: Mutex::new(None),
        refusals: Mutex::new(crate::wishes::refusals()),
    });
    let (config, served) = (Mutex::new(Config::default()), machine.clone());
    let id = id.to_owned();
    api::serve(listener, move |call| answer(&call, &mut config.lock().unwrap(), &served, &id));
    machine
}

fn answer(call: &Call, config: &mut Config, machine: &Arc<Machine>, id: &str) -> Answer {
    let state = *machine.state.lock().unwrap();
    let before = || match state {
        "Not started" => Ok(()),
        _ => Err("The requested operation is not supported after starting the microVM.".to_owned()),
    };
    let text = |name: &str| call.body[name].as_str().unwrap_or_default().to_owned();
    let open = |path: &str, write: bool| {
        OpenOptions::new().read(true).write(write).open(path).map_err(|e| format!("{path}: {e}"))
    };
    match (call.method.as_str(), call.path.as_str()) {
        ("GET", "/") => {
            return Ok(Some(
                json!({"id": id, "state": state, "vmm_version": "0-simulated", "app_name": "Firecracker"}),
            ));
        }
        ("PUT", "/machine-config") => {
            before()?;
            check(&call.body, MACHINE)?;
            let vcpus = call.body["vcpu_count"].as_u64().unwrap();
            if vcpus != 1 && !vcpus.is_multiple_of(2) {
                return Err("The vCPU number is invalid!".into());
            }
            config.machine = true;
        }
        ("PUT", "/boot-source") => {
            before()?;
            check(&call.body, BOOT)?;
            let kernel = text("kernel_image_path");
            if !fs::read(&kernel).map_err(|e| format!("{kernel}: {e}"))?.starts_with(b"\x7fELF") {
                return Err("the kernel is no ELF file".into());
            }
            open(&text("initrd_path"), false)?;
            if !text("boot_args").contains("reboot=k") {
                return Err("a guest's restart would go unseen".into());
            }
            config.boot = Some(open(&kernel, false)?);
        }
        ("PUT", path) if path.starts_with("/drives/") => {
            before()?;
            check(&call.body, DRIVE)?;
            if path["/drives/".len()..] != text("drive_id") {
                return Err("path and body name two drives".into());
            }
            let read_only = call.body["is_read_only"] == Value::Bool(true);
            config.drives.push((text("drive_id"), open(&text("path_on_host"), !read_only)?));
        }
        ("PUT", "/network-interfaces/eth0") => {
            before()?;
            check(&call.body, NET)?;
            let name = text("host_dev_name");
            config.tap = Some(tapgate_netns::tap::attach(&name).map_err(|e| format!("tap {name}: {e}"))?);
        }
        ("PUT", "/vsock") => {
            before()?;
            check(&call.body, VSOCK)?;
            config.vsock = Some(text("uds_path"));
        }
        ("PUT", "/entropy") => {
            before()?;
            check(&call.body, &[])?;
        }
        ("PUT", "/actions") => {
            check(&call.body, ACTION)?;
            return act(&text("action_type"), config, machine, state);
        }
        ("PATCH", "/vm") => {
            check(&call.body, STATE)?;
            if state == "Not started" {
                return Err("The requested operation is not supported before starting the microVM.".into());
            }
            if text("state") == "Resumed" {
                machine.refuses()?;
            }
            *machine.state.lock().unwrap() = if text("state") == "Paused" { "Paused" } else { "Running" };
        }
        (method, path) => return Err(format!("Invalid request method and/or path: {method} {path}.")),
    }
    Ok(None)
}

fn act(action: &str, config: &Config, machine: &Arc<Machine>, state: &str) -> Answer {
    match (action, state) {
        ("InstanceStart", "Not started") => {
            let root = config.drives.first().filter(|(id, _)| id == "root");
            let whole =
                config.machine && config.boot.is_some() && config.tap.is_some() && config.drives.len() == 2;
            let Some((_, root)) = root.filter(|_| whole) else {
                return Err("the VM is started before it is whole".into());
            };
            if let Some(path) = &config.vsock {
                agent::listen(path, machine.clone());
            }
            machine.start(root);
            Ok(None)
        }
        ("SendCtrlAltDel", "Running") => {
            machine.restart();
            Ok(None)
        }
        (action, state) => Err(format!("{action} is not possible: {state}")),
    }
}
