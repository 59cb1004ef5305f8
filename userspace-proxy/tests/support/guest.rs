//! A guest in a namespace of its own, its packets handed to the transparent listeners by nftables' tproxy.

use super::{GUEST, World, config, sh};
use std::process::{Child, Command, Stdio};
use tapgate_ebpf_common::net::port;
use tapgate_proxy::{Listeners, Proxy, ProxyConfig};

/// A guest's namespace, removed with this value, or with the test's process.
pub struct Guest {
    name: String,
    /// Removes it once its input ends, however that comes. In a session of its own: a test that hangs is ended with its group.
    remover: Child,
}

impl Guest {
    /// Makes the guest, its veth, and the hand-over to the listeners in this thread's namespace.
    pub fn new(tag: &str) -> Self {
        let name = format!("tgp{}{tag}", std::process::id());
        let remover = Command::new("setsid")
            .args(["sh", "-c", &format!("read -r _; ip netns del {name}; rm -rf /etc/netns/{name}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let guest = Self { name: name.clone(), remover };
        sh(&format!(
            "mkdir -p /etc/netns/{name}
             echo nameserver 169.254.77.1 > /etc/netns/{name}/resolv.conf
             ip netns add {name}
             ip link add {name} type veth peer name eth0 netns {name}
             ip -n {name} link set lo up
             ip -n {name} link set eth0 up
             ip -n {name} addr add {GUEST}/32 dev eth0
             ip -n {name} route add default via 169.254.77.1 dev eth0 onlink
             ip link set {name} up
             ip addr add 169.254.77.1/32 dev lo
             echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter
             echo 0 > /proc/sys/net/ipv4/conf/{name}/rp_filter
             ip route add {GUEST}/32 dev {name}
             ip rule add fwmark 1 lookup 100
             ip route add local default dev lo table 100
             nft -f - <<'NFT'
             table ip handover {{
                 chain in {{
                     type filter hook prerouting priority mangle
                     iifname {name} udp dport 53 tproxy to :{} meta mark set 1 accept
                     iifname {name} tcp dport 53 tproxy to 127.0.0.1:{} meta mark set 1 accept
                     iifname {name} meta l4proto tcp tproxy to 127.0.0.1:{} meta mark set 1 accept
                 }}
             }}
NFT",
            port::DNS_UDP,
            port::DNS_TCP,
            port::TCP
        ));
        guest
    }

    /// Gives the guest an IPv6 address, routed and handed over like the other.
    pub fn with_v6(self, address: std::net::Ipv6Addr) -> Self {
        let name = &self.name;
        sh(&format!(
            "ip -n {name} addr add {address}/128 dev eth0 nodad
             ip addr add fe80::1/64 dev {name} nodad
             ip -n {name} route add default via fe80::1 dev eth0
             ip route add {address}/128 dev {name}
             ip -6 rule add fwmark 1 lookup 100
             ip -6 route add local default dev lo table 100
             nft -f - <<'NFT'
             table ip6 handover {{
                 chain in {{
                     type filter hook prerouting priority mangle
                     iifname {name} udp dport 53 tproxy to :{} meta mark set 1 accept
                     iifname {name} tcp dport 53 tproxy to [::1]:{} meta mark set 1 accept
                     iifname {name} meta l4proto tcp tproxy to [::1]:{} meta mark set 1 accept
                 }}
             }}
NFT",
            port::DNS_UDP,
            port::DNS_TCP,
            port::TCP
        ));
        self
    }

    /// Runs something inside the guest.
    pub async fn run<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> T {
        let path = format!("/run/netns/{}", self.name);
        let thread = std::thread::spawn(move || {
            let namespace = std::fs::File::open(path).unwrap();
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        tokio::task::spawn_blocking(move || thread.join().unwrap()).await.unwrap()
    }

    /// Runs a command inside the guest, which asks the gateway for names; gives what it printed, or what went wrong.
    pub async fn shell(&self, command: &str) -> Result<String, String> {
        let line =
            format!("timeout 90 ip netns exec {} sh -ec '{}'", self.name, command.replace('\'', "'\\''"));
        let done = tokio::process::Command::new("sh").args(["-c", &line]).output().await.unwrap();
        if done.status.code() == Some(124) {
            return Err(format!(
                "it did not end within 90 s; it said {:?}",
                String::from_utf8_lossy(&done.stdout)
            ));
        }
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        match done.status.success() {
            true => Ok(text(&done.stdout)),
            false => Err(format!("{}{}", text(&done.stdout), text(&done.stderr))),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Ends its input, and waits.
        let _ = self.remover.wait();
    }
}

/// Serves the guest by real listeners.
pub fn serve(w: &World) {
    serve_with(w, config(&w.ca));
}

/// Serves the guest by real listeners, with these settings.
pub fn serve_with(w: &World, config: ProxyConfig) {
    let listeners = Listeners::bind().unwrap();
    assert!(listeners.fds().service.is_some());
    let proxy = Proxy::new(config, w.table.clone(), w.sink.clone());
    tokio::spawn(proxy.serve(listeners, w.stop.clone()));
}
