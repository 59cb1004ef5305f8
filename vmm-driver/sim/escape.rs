//! What a guest that took its VMM over would try. Everything that works is reported.

use std::fs;
use std::net::{TcpStream, UdpSocket};
use std::path::Path;

/// What worked.
pub fn attempts() -> Vec<String> {
    let mut worked = Vec::new();
    let mut note = |what: &str, did: bool| {
        if did {
            worked.push(what.to_owned());
        }
    };
    for path in [
        "/etc/passwd",
        "/etc/shadow",
        "/root",
        "/home",
        "/proc/1/root",
        "/proc/self",
        "/sys/kernel",
        "/dev/vda",
    ] {
        note(path, Path::new(path).exists());
    }
    // The other VM's disk, the database.
    for path in probes() {
        note(&path, fs::File::open(&path).is_ok());
        note(&format!("up from /: {path}"), fs::File::open(format!("/../../../..{path}")).is_ok());
    }
    for path in ["/x", "/vm/x", "/usr/lib/x", "/dev/x"] {
        note(&format!("a new file {path}"), fs::File::create(path).is_ok());
    }
    for path in ["/vm/kernel", "/vm/initrd", "/vm/seed"] {
        note(&format!("writing {path}"), fs::OpenOptions::new().write(true).open(path).is_ok());
    }
    note("a TCP socket", made_a_socket());
    note("a UDP socket", UdpSocket::bind("0.0.0.0:0").is_ok());
    note("a namespace", nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWUSER).is_ok());
    let nothing = None::<&str>;
    let mounted = nix::mount::mount(nothing, "/run", Some("tmpfs"), nix::mount::MsFlags::empty(), nothing);
    note("a mount", mounted.is_ok());
    note("becoming root", nix::unistd::setuid(nix::unistd::Uid::from_raw(0)).is_ok());
    note("a shell", std::process::Command::new("/bin/sh").arg("-c").arg("true").status().is_ok());
    let parent = nix::unistd::getppid();
    note("killing the daemon", parent.as_raw() != 0 && nix::sys::signal::kill(parent, None).is_ok());
    worked
}

/// A refused connection means that there was a socket.
fn made_a_socket() -> bool {
    match TcpStream::connect("127.0.0.1:22") {
        Ok(_) => true,
        Err(error) => error.kind() != std::io::ErrorKind::PermissionDenied,
    }
}

fn probes() -> Vec<String> {
    let named = crate::wishes::wish("PROBE").unwrap_or_default();
    named.split(':').filter(|path| !path.is_empty()).map(str::to_owned).collect()
}
