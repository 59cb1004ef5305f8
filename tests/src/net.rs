//! The world's network: the namespaces `internet` and `host`, the cable between them, addresses and routes. Made with
//! `ip` as a person would; taken down by the reaper.

use crate::{
    sh::{ip, run},
    sites::{self, HOST_V4, HOST_V6, ROUTER_V4, ROUTER_V6},
};
use anyhow::Result;
use std::{fs, path::PathBuf, process::Command};

/// The names of one world's namespaces; unique on the machine.
#[derive(Clone, Debug)]
pub struct Names {
    /// What all of it begins with; also the daemon's instance.
    pub world: String,
}

impl Names {
    /// The namespace of the world's servers.
    pub fn internet(&self) -> String {
        format!("{}-internet", self.world)
    }

    /// The namespace of the daemon.
    pub fn host(&self) -> String {
        format!("{}-host", self.world)
    }

    /// The namespace that the daemon makes for its guests.
    pub fn egress(&self) -> String {
        format!("tapgate-{}", self.world)
    }

    /// Where `ip netns exec` looks for this namespace's own files of `/etc`.
    pub fn etc(&self) -> PathBuf {
        PathBuf::from("/etc/netns").join(self.host())
    }
}

/// The interface of `internet` that leads to the host.
pub const UPLINK: &str = "up0";
/// The host's interface to the internet.
pub const HOST_LINK: &str = "eth0";

/// A program inside a namespace. Not by `ip netns exec`: its mount namespace would hide what the daemon mounts.
pub fn inside(namespace: &str, program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new("nsenter");
    command.arg(format!("--net=/run/netns/{namespace}")).arg("--").arg(program);
    command
}

/// Makes the namespaces and what is in them.
pub fn lay(names: &Names) -> Result<()> {
    let (internet, host) = (names.internet(), names.host());
    for namespace in [&internet, &host] {
        ip(&format!("netns add {namespace}"))?;
        ip(&format!("-n {namespace} link set lo up"))?;
        // No duplicate address detection: an address works from the moment that it is there.
        let sysctl = ["-qw", "net.ipv6.conf.all.accept_dad=0", "net.ipv6.conf.default.accept_dad=0"];
        crate::sh::expect(inside(namespace, "sysctl").args(sysctl), b"")?;
    }
    ip(&format!("-n {internet} link add {UPLINK} type veth peer name {HOST_LINK} netns {host}"))?;
    ip(&format!("-n {internet} link set {UPLINK} up"))?;
    ip(&format!("-n {host} link set {HOST_LINK} up"))?;
    ip(&format!("-n {internet} address add {ROUTER_V4}/24 dev {UPLINK}"))?;
    ip(&format!("-n {internet} address add {ROUTER_V6}/64 dev {UPLINK} nodad"))?;
    ip(&format!("-n {host} address add {HOST_V4}/24 dev {HOST_LINK}"))?;
    ip(&format!("-n {host} address add {HOST_V6}/64 dev {HOST_LINK} nodad"))?;
    ip(&format!("-n {host} route add default via {ROUTER_V4}"))?;
    ip(&format!("-n {host} -6 route add default via {ROUTER_V6}"))?;
    for site in sites::ALL {
        ip(&format!("-n {internet} address add {}/32 dev lo", site.v4))?;
        ip(&format!("-n {internet} address add {}/128 dev lo nodad", site.v6))?;
    }
    fs::create_dir_all(names.etc())?;
    fs::write(names.etc().join("resolv.conf"), format!("nameserver {}\n", sites::DNS.v4))?;
    Ok(())
}

/// The processes inside a namespace.
pub fn processes(namespace: &str) -> Vec<u32> {
    let pids = run("ip", ["netns", "pids", namespace]).unwrap_or_default();
    pids.lines().filter_map(|pid| pid.trim().parse().ok()).collect()
}
