//! A program of two instructions that lets the next one decide: what `run_time_ns` says of it is what measuring costs.
#![expect(unsafe_code, reason = "a program without an object file goes to bpf(2) by hand")]

use aya::programs::{LinkOrder, ProgramInfo, SchedClassifier, TcAttachType, tc::TcAttachOptions};
use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd as _, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};
use tapgate_datapath::Datapath;

const PROG_LOAD: i32 = 5;
const OBJ_PIN: i32 = 6;
const SCHED_CLS: u32 = 3;
/// `r0 = TCX_NEXT; exit`.
const CODE: [[u8; 8]; 2] = [[0xb7, 0, 0, 0, 0xff, 0xff, 0xff, 0xff], [0x95, 0, 0, 0, 0, 0, 0, 0]];

/// Attached before the gate's own until it is dropped.
pub struct Empty(SchedClassifier);

impl Empty {
    pub fn attach(datapath: &Datapath, link: &str, pin: &Path) -> Self {
        load(pin);
        let mut program = SchedClassifier::from_pin(pin).unwrap();
        std::fs::remove_file(pin).unwrap();
        let options = || TcAttachOptions::TcxOrder(LinkOrder::first());
        let attach = || program.attach_with_options(link, TcAttachType::Ingress, options());
        datapath.egress().run(attach).unwrap().unwrap();
        Self(program)
    }

    pub fn info(&self) -> ProgramInfo {
        self.0.info().unwrap()
    }
}

/// The first fields of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
struct Load {
    kind: u32,
    instructions: u32,
    code: u64,
    license: u64,
}

/// The same for `BPF_OBJ_PIN`.
#[repr(C)]
struct Pin {
    path: u64,
    fd: u32,
    flags: u32,
}

fn load(pin: &Path) {
    let (license, path) = (c"GPL", CString::new(pin.as_os_str().as_bytes()).unwrap());
    let load = Load {
        kind: SCHED_CLS,
        instructions: CODE.len() as u32,
        code: CODE.as_ptr() as u64,
        license: license.as_ptr() as u64,
    };
    let fd = bpf(PROG_LOAD, &load);
    // SAFETY: the kernel just gave it to this process.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    bpf(OBJ_PIN, &Pin { path: path.as_ptr() as u64, fd: fd.as_raw_fd() as u32, flags: 0 });
}

fn bpf<T>(command: i32, attributes: &T) -> i64 {
    // SAFETY: the kernel reads as many octets as it is told, and what they point to lives until it returns.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes, size_of::<T>()) };
    assert!(result >= 0, "{}", io::Error::last_os_error());
    result
}
