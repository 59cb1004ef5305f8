//! Where everything is measured: a network namespace with the origin and the proxies, one with the guest, a veth pair
//! between them, and one CA that everybody trusts. All of it goes with this process.

use anyhow::{Context as _, Result, ensure};
use hickory_proto::{
    op::Message,
    rr::{Name, RData, Record, RecordType, rdata},
};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, setns, unshare},
};
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use std::{
    fs,
    net::{Ipv4Addr, SocketAddr, UdpSocket},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

/// The origin's name.
pub const NAME: &str = "origin.example";
/// The origin.
pub const ORIGIN: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// Where the peers listen.
pub const PEERS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 20);
/// What leads into our listeners, whatever was dialled.
pub const OURS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 30);
/// The name server.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
/// A guest without a secret: its connections are spliced.
pub const PLAIN: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 1);
/// A guest with a secret for the origin: its connections are opened.
pub const SECRET: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 2);
/// Octets of the file for bulk.
pub const BULK: usize = 32 << 20;

/// The stage.
pub struct Stage {
    dir: tempfile::TempDir,
    guest: Running,
    origin: Option<Running>,
    pub tls: Arc<ClientConfig>,
}

/// A program of the measurement; ended when dropped, and by the kernel if this process ends before.
pub struct Running(pub Child);

impl Drop for Running {
    fn drop(&mut self) {
        if let Ok(pid) = i32::try_from(self.0.id()) {
            let _ =
                nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGTERM);
        }
        let patience = Instant::now() + Duration::from_secs(3);
        while Instant::now() < patience {
            if !matches!(self.0.try_wait(), Ok(None)) {
                return;
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Starts a program that ends with this one. What it says goes to the log.
pub fn start(program: &Path, args: &[&str], log: &Path) -> Result<Running> {
    let log = fs::File::options().create(true).append(true).open(log)?;
    let child = Command::new("setpriv")
        .args(["--pdeathsig", "TERM"])
        .arg(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn();
    Ok(Running(child.with_context(|| format!("{} could not be started", program.display()))?))
}

pub fn sh(script: &str) -> Result<()> {
    let done =
        Command::new("sh").args(["-ec", script]).stdin(Stdio::null()).stdout(Stdio::null()).status()?;
    ensure!(done.success(), "failed: {script}");
    Ok(())
}

impl Stage {
    /// Sets it up. Must run before any thread is started: it moves this process into namespaces.
    pub fn new() -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).context("namespaces need root")?;
        let none: Option<&str> = None;
        mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)?;
        let dir = tempfile::tempdir()?;
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
        let hosts = dir.path().join("hosts");
        fs::write(&hosts, format!("127.0.0.1 localhost\n{ORIGIN} {NAME}\n"))?;
        mount(Some(&hosts), "/etc/hosts", none, MsFlags::MS_BIND, none)?;
        let guest = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare", "--net", "sleep", "infinity"])
            .spawn()
            .context("the guest's namespace")?;
        let guest = Running(guest);
        // Until it is in a namespace of its own.
        let ours = fs::read_link("/proc/self/ns/net")?;
        let net = format!("/proc/{}/ns/net", guest.0.id());
        while fs::read_link(&net)? == ours {
            std::thread::sleep(Duration::from_millis(5));
        }
        network(guest.0.id())?;
        let tls = certificates(dir.path())?;
        name_server()?;
        let mut stage = Self { dir, guest, origin: None, tls };
        stage.origin = Some(stage.origin()?);
        Ok(stage)
    }

    /// The folder for everything.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A file in it.
    pub fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The namespace of the guest.
    pub fn enter_guest(&self) -> impl Fn() + Send + Sync + 'static + use<> {
        let path = format!("/proc/{}/ns/net", self.guest.0.id());
        move || {
            let entered = fs::File::open(&path).map(|ns| setns(ns, CloneFlags::CLONE_NEWNET));
            assert!(matches!(entered, Ok(Ok(()))), "the guest's namespace cannot be entered");
        }
    }

    fn origin(&self) -> Result<Running> {
        let dir = self.dir().display();
        let www = self.file("www");
        fs::create_dir(&www)?;
        fs::write(www.join("small"), vec![b's'; 1024])?;
        fs::write(www.join("bulk"), vec![b'b'; BULK])?;
        let config = format!(
            "daemon off; user root; worker_processes 2;  error_log {dir}/origin.log; pid {dir}/origin.pid;
             events {{ worker_connections 19000; }}
             http {{
               access_log off; sendfile on; tcp_nodelay on; keepalive_timeout 600; keepalive_requests 100000000;
               client_body_temp_path {dir}/o1; proxy_temp_path {dir}/o2; fastcgi_temp_path {dir}/o3;
               uwsgi_temp_path {dir}/o4; scgi_temp_path {dir}/o5; default_type application/octet-stream;
               server {{
                 listen {ORIGIN}:443 ssl backlog=4096; server_name {NAME}; root {dir}/www;
                 ssl_certificate {dir}/cert.pem; ssl_certificate_key {dir}/key.pem;
                 ssl_session_cache shared:s:10m; ssl_buffer_size 16k;
               }} }}"
        );
        fs::write(self.file("origin.conf"), config)?;
        let file = self.file("origin.conf");
        let running = start("nginx".as_ref(), &["-c", &file.to_string_lossy()], &self.file("origin.out"))?;
        self.answers((ORIGIN, 443))?;
        Ok(running)
    }

    /// Waits until something listens there.
    pub fn answers(&self, at: (Ipv4Addr, u16)) -> Result<()> {
        let patience = Instant::now() + Duration::from_secs(30);
        loop {
            match std::net::TcpStream::connect(at) {
                Ok(_) => return Ok(()),
                Err(error) if Instant::now() > patience => {
                    return Err(error).with_context(|| format!("nothing listens at {}:{}", at.0, at.1));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(50)),
            }
        }
    }
}

fn network(guest: u32) -> Result<()> {
    sh(&format!(
        "for a in {ORIGIN} {PEERS} {RESOLVER}; do ip addr add $a/32 dev lo; done; ip link set lo up
         ip link add eth1 type veth peer name eth0 netns {guest}
         inside() {{ nsenter --net=/proc/{guest}/ns/net \"$@\"; }}
         inside ip link set lo up; inside ip link set eth0 up; ip link set eth1 up; ip addr add 10.214.0.254/32 dev eth1
         for a in {PLAIN} {SECRET}; do inside ip addr add $a/32 dev eth0; ip route add $a/32 dev eth1; done
         inside ip route add default via 10.214.0.254 dev eth0 onlink
         for n in all eth1; do echo 0 > /proc/sys/net/ipv4/conf/$n/rp_filter; done
         echo 1 > /proc/sys/net/ipv4/ip_forward
         for s in 'ip_local_port_range=1024 65535' tcp_tw_reuse=1 tcp_max_syn_backlog=8192; do
           echo \"${{s#*=}}\" > /proc/sys/net/ipv4/${{s%%=*}}
           inside sh -c \"echo '${{s#*=}}' > /proc/sys/net/ipv4/${{s%%=*}}\"
         done
         ip rule add fwmark 1 lookup 100; ip route add local default dev lo table 100
         nft -f - <<'NFT'
         table ip handover {{
           chain in {{
             type filter hook prerouting priority mangle
             iifname eth1 ip daddr {OURS} meta l4proto tcp tproxy to 127.0.0.1:{} meta mark set 1 accept
           }}
         }}
NFT",
        tapgate_ebpf_common::net::port::TCP
    ))
}

/// The CA, the origin's certificate, and what the load trusts: every proxy that opens connections signs by the same CA.
fn certificates(dir: &Path) -> Result<Arc<ClientConfig>> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "bench");
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages =
        vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    let ca = params.self_signed(&key)?;
    fs::write(dir.join("ca.pem"), ca.pem())?;
    fs::write(dir.join("ca.key"), key.serialize_pem())?;
    fs::create_dir(dir.join("mitm"))?;
    fs::write(dir.join("mitm/mitmproxy-ca.pem"), key.serialize_pem() + &ca.pem())?;
    let issuer = Issuer::new(params, key);
    let leaf_key = KeyPair::generate()?;
    let leaf = CertificateParams::new(vec![NAME.to_owned()])?.signed_by(&leaf_key, &issuer)?;
    fs::write(dir.join("cert.pem"), leaf.pem())?;
    fs::write(dir.join("key.pem"), leaf_key.serialize_pem())?;
    fs::write(dir.join("both.pem"), leaf.pem() + &leaf_key.serialize_pem())?;
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca.pem().as_bytes())?)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_root_certificates(roots)
        .with_no_client_auth();
    // Each connection is the first of a new process.
    tls.resumption = rustls::client::Resumption::disabled();
    tls.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(tls))
}

/// Answers for the origin, as a name server does: with a TTL, and with an SOA where there is nothing.
fn name_server() -> Result<()> {
    let socket = UdpSocket::bind(SocketAddr::from((RESOLVER, 5300)))?;
    std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while let Ok((length, from)) = socket.recv_from(&mut buffer) {
            if let Some(answer) = answer(&buffer[..length]) {
                let _ = socket.send_to(&answer, from);
            }
        }
    });
    Ok(())
}

fn answer(question: &[u8]) -> Option<Vec<u8>> {
    let request = Message::from_vec(question).ok()?;
    let query = request.queries.first()?.clone();
    let mut response = Message::response(request.metadata.id, request.metadata.op_code);
    response.metadata.recursion_available = true;
    response.add_query(query.clone());
    let name = query.name().clone();
    if query.query_type() == RecordType::A {
        response.add_answer(Record::from_rdata(name, 3600, RData::A(rdata::A(ORIGIN))));
    } else {
        let root = Name::from_ascii("example.").ok()?;
        let soa = rdata::SOA::new(root.clone(), root.clone(), 1, 3600, 600, 86400, 3600);
        response.add_authority(Record::from_rdata(root, 3600, RData::SOA(soa)));
    }
    response.to_vec().ok()
}
