//! Runs one of this file's tests inside a KVM host in a box, for no test machine can be trusted to have a KVM that runs guests:
//! this very program is copied in, with the image, and started there.

use std::path::{Path, PathBuf};
use tapgate_e2e::kvm_box::{Kernel, KvmBox};
use tapgate_vmm::accel::{self, Accel};

/// The image is read only; a driver may put its unpacked kernel beside it.
const IMAGES: &str = "modprobe -a overlay tun && mkdir -p /var/cache/tapgate/images /run/over/upper /run/over/work && \
    mount -t overlay overlay -o lowerdir=/share/images,upperdir=/run/over/upper,workdir=/run/over/work /var/cache/tapgate/images";

/// Whether the test runs in the box, or on a machine that needs none.
pub fn kvm_is_here() -> bool {
    let dir = tempfile::tempdir().unwrap();
    let found = accel::probe(&crate::common::debian(), &tapgate_vmm::default_program(), dir.path());
    found.accel == Accel::Kvm
}

/// The kernels of an ordinary run, and of a long one.
pub fn kernels() -> &'static [Kernel] {
    match std::env::var_os("TAPGATE_LONG") {
        Some(_) => &[Kernel::V6_12, Kernel::V6_1],
        None => &[Kernel::V6_12],
    }
}

/// Runs the test there. Each variable is set; one that names a file of this machine gets it in the box.
pub fn run(kernel: Kernel, test: &str, variables: &[(&str, &str)]) {
    let image = crate::common::debian();
    let program = std::env::current_exe().unwrap();
    let in_share = format!("images/{}", image.dir().file_name().unwrap().to_string_lossy());
    let files: Vec<(PathBuf, String)> = variables
        .iter()
        .filter(|(_, value)| value.starts_with('/'))
        .map(|(name, value)| (value.into(), format!("bin/{name}")))
        .collect();
    let mut share = vec![(program.as_path(), "bin/suite"), (image.dir(), in_share.as_str())];
    share.extend(files.iter().map(|(path, name): &(PathBuf, String)| (Path::new(path), name.as_str())));
    let host = KvmBox::boot(kernel, &share).unwrap();
    host.expect(IMAGES).unwrap();
    let mut environment = String::new();
    for (name, value) in variables {
        let value =
            if value.starts_with('/') { format!("/usr/local/bin/{name}") } else { (*value).to_owned() };
        environment.push_str(&format!("{name}={value} "));
    }
    for (_, name) in &files {
        host.expect(&format!("install -m 755 /share/{name} /usr/local/bin/")).unwrap();
    }
    let done = host
        .sh(&format!("uname -r; {environment} /share/bin/suite --exact {test} --nocapture 2>&1"))
        .unwrap();
    eprintln!("{}", done.out);
    assert!(
        done.ok() && done.out.contains("1 passed"),
        "{test} in the box ended with {}: {}",
        done.code,
        done.err
    );
}
