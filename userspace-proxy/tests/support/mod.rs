//! A closed world on one thread: a network namespace of its own with documentation addresses on its loopback device, a
//! name server, TLS and HTTP servers of a test CA, the proxy, and a guest whose destinations are chosen freely.
#![allow(
    dead_code,
    missing_docs,
    unused_imports,
    clippy::unwrap_used,
    reason = "shared by tests that each use a part"
)]

pub mod ca;
pub mod clients;
pub mod guest;
pub mod servers;
mod site;
mod zone;

pub use ca::{TestCa, provider};
pub use site::{Log, Seen};
pub use zone::Zone;

use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, pem::PemObject as _};
use site::{Tap, http_on};
use std::{
    net::{Ipv4Addr, SocketAddr},
    process::Command,
    sync::{Arc, Mutex},
};
use tapgate_model::{
    AuditEvent, AuditSink, Cidr, GuestNet, Mode, Rule, RuleId, RuleSet, RuleTarget, SecretBinding,
    SecretValue, UserId, VmId, VmPolicy, policy::SecretsOverHttp,
};
use tapgate_proxy::{Accepted, Limits, PolicyTable, Proxy, ProxyConfig, Timeouts, VmCa};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
    sync::{Notify, mpsc},
};
use tokio_util::sync::CancellationToken;

/// The honest server.
pub const SERVER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 10);
/// Another honest server.
pub const OTHER: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 11);
/// The attacker's.
pub const ATTACKER: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 66);
/// The name server.
pub const RESOLVER: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 53);
/// A private address that a cidr rule may open.
pub const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 9, 8, 7);
/// The guest's.
pub const GUEST: Ipv4Addr = Ipv4Addr::new(10, 214, 0, 1);

/// How many connections a VM may have here.
pub const CONNECTIONS: usize = 100;

pub fn sh(command: &str) {
    let done = Command::new("sh").args(["-ec", command]).status().unwrap();
    assert!(done.success(), "{command}");
}

/// Runs the test on a thread in a network namespace of its own, which goes with the thread.
pub fn world<F: Future<Output = ()>>(test: impl FnOnce(World) -> F + Send + 'static) {
    world_of(&[SERVER, OTHER, ATTACKER, RESOLVER, PRIVATE, GUEST], test);
}

/// As [`world`], with only these addresses in it.
pub fn world_of<F: Future<Output = ()>>(
    addresses: &'static [Ipv4Addr],
    test: impl FnOnce(World) -> F + Send + 'static,
) {
    let thread = std::thread::spawn(move || {
        nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests run as root");
        let add: Vec<_> =
            addresses.iter().map(|address| format!("ip addr add {address}/32 dev lo;")).collect();
        sh(&format!("ip link set lo up; {}", add.concat()));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(tokio::task::LocalSet::new().run_until(async { test(World::start().await).await }));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Events in the order in which they came.
#[derive(Default)]
pub struct Sink {
    events: Mutex<Vec<AuditEvent>>,
    came: Notify,
}

impl Sink {
    pub fn forget(&self) {
        self.events.lock().unwrap().clear();
    }
}

impl AuditSink for Sink {
    fn record(&self, event: AuditEvent) {
        self.events.lock().unwrap().push(event);
        self.came.notify_waiters();
    }
}

pub struct World {
    pub ca: TestCa,
    pub zone: Zone,
    pub log: Log,
    pub sink: Arc<Sink>,
    pub table: Arc<PolicyTable>,
    pub net: GuestNet,
    pub vm_ca: Arc<VmCa>,
    pub policy: Arc<VmPolicy>,
    pub stop: CancellationToken,
    accepted: mpsc::Sender<Accepted>,
    front: TcpListener,
}

impl World {
    async fn start() -> Self {
        let (zone, sink) = (Zone::default(), Arc::<Sink>::default());
        let table = Arc::new(PolicyTable::new(Limits { connections: CONNECTIONS, ..Limits::default() }));
        let ca = TestCa::new();
        let name_server = UdpSocket::bind((RESOLVER, 5300)).await.unwrap();
        let answering = zone.clone();
        tokio::task::spawn_local(async move {
            let mut buffer = [0; 4096];
            loop {
                let (length, from) = name_server.recv_from(&mut buffer).await.unwrap();
                name_server.send_to(&answering.answer(&buffer[..length]), from).await.unwrap();
            }
        });
        let config = config(&ca);
        let (accepted, queue) = mpsc::channel(64);
        let stop = CancellationToken::new();
        let proxy = Proxy::new(config, table.clone(), sink.clone());
        tokio::spawn(proxy.handle_all(queue, stop.clone()));
        let net = GuestNet::new(0, Ipv4Addr::new(10, 214, 0, 0), None);
        assert_eq!(net.v4, GUEST);
        let vm = VmId::generate();
        let vm_ca = Arc::new(VmCa::generate(&vm).unwrap());
        let policy = Arc::new(VmPolicy {
            vm,
            user: UserId::generate(),
            generation: 0,
            mode: Mode::Enforce,
            rules: RuleSet::default(),
            secrets: Arc::new([]),
            secrets_over_http: SecretsOverHttp::default(),
        });
        table.insert(net, vm_ca.clone(), policy.clone());
        table.set_guest_range(&["10.214.0.0/16".parse().unwrap()]);
        let front = TcpListener::bind("127.0.0.1:0").await.unwrap();
        Self { ca, zone, log: Log::default(), sink, table, net, vm_ca, policy, stop, accepted, front }
    }

    /// Another proxy, with these settings, takes the connections from here on.
    pub fn restart(&mut self, config: ProxyConfig) {
        let (accepted, queue) = mpsc::channel(64);
        tokio::spawn(
            Proxy::new(config, self.table.clone(), self.sink.clone()).handle_all(queue, self.stop.clone()),
        );
        self.accepted = accepted;
    }

    /// Puts rules in force; secrets are name, value, hosts.
    pub fn rules(&mut self, mode: Mode, targets: &[&str], secrets: &[(&str, &str, &[&str])]) {
        let rules = targets.iter().map(|text| Rule {
            id: RuleId::generate(),
            target: match text.parse::<Cidr>() {
                Ok(cidr) => RuleTarget::Cidr(cidr),
                Err(_) => RuleTarget::Host(text.parse().unwrap()),
            },
        });
        let secrets = secrets.iter().map(|(name, value, hosts)| SecretBinding {
            name: (*name).to_owned(),
            env_var: "X".into(),
            hosts: hosts.iter().map(|host| host.parse().unwrap()).collect(),
            value: SecretValue::new(value.as_bytes().to_vec()).unwrap(),
        });
        self.policy = Arc::new(VmPolicy {
            generation: self.policy.generation + 1,
            mode,
            rules: RuleSet::new(rules),
            secrets: secrets.collect::<Vec<_>>().into(),
            ..VmPolicy::clone(&self.policy)
        });
        assert!(self.table.update(self.policy.clone()));
    }

    /// A connection of the guest to anywhere.
    pub async fn connect(&self, to: (Ipv4Addr, u16)) -> TcpStream {
        self.connect_as(GUEST, to).await
    }

    /// A connection of any guest.
    pub async fn connect_as(&self, guest: Ipv4Addr, to: (Ipv4Addr, u16)) -> TcpStream {
        let (client, accepted) =
            tokio::join!(TcpStream::connect(self.front.local_addr().unwrap()), self.front.accept());
        let guest = SocketAddr::from((guest, 40000));
        let stream = accepted.unwrap().0;
        self.accepted.send(Accepted { stream, guest, destination: to.into() }).await.ok().unwrap();
        client.unwrap()
    }

    /// What a guest trusts: its own CA, and the servers' (for what is not opened).
    pub fn client(&self, alpn: &[&str]) -> Arc<ClientConfig> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.vm_ca.cert_pem().as_bytes()).unwrap()).unwrap();
        roots.add(self.ca.der.clone()).unwrap();
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        config.alpn_protocols = alpn.iter().map(|word| word.as_bytes().to_vec()).collect();
        Arc::new(config)
    }

    pub async fn tls(
        &self,
        to: (Ipv4Addr, u16),
        name: &str,
        alpn: &[&str],
    ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
        let stream = self.connect(to).await;
        let name = name.to_owned().try_into().unwrap();
        tokio_rustls::TlsConnector::from(self.client(alpn)).connect(name, stream).await
    }

    /// Whether the certificate that the guest sees was minted by its VM's CA.
    pub fn is_opened(&self, stream: &tokio_rustls::client::TlsStream<TcpStream>) -> bool {
        let chain = stream.get_ref().1.peer_certificates().unwrap();
        let ca = CertificateDer::from_pem_slice(self.vm_ca.cert_pem().as_bytes()).unwrap();
        chain.last() == Some(&ca)
    }

    /// Sends bytes over TLS and gives all that comes back.
    pub async fn https(&self, to: (Ipv4Addr, u16), name: &str, request: &str) -> String {
        let stream = self.tls(to, name, &["http/1.1"]).await.unwrap();
        talk(stream, request).await
    }

    /// Sends bytes in clear text and gives all that comes back.
    pub async fn http(&self, to: (Ipv4Addr, u16), request: &str) -> String {
        talk(self.connect(to).await, request).await
    }

    /// Waits until so many events were recorded.
    pub async fn events(&self, count: usize) -> Vec<AuditEvent> {
        loop {
            let came = self.sink.came.notified();
            let events = self.sink.events.lock().unwrap().clone();
            if events.len() >= count {
                return events;
            }
            tokio::time::timeout(std::time::Duration::from_secs(10), came)
                .await
                .unwrap_or_else(|_| panic!("{count} events expected, have {events:#?}"));
        }
    }

    /// The only event so far.
    pub async fn event(&self) -> AuditEvent {
        let mut events = self.events(1).await;
        assert_eq!(events.len(), 1, "{events:#?}");
        self.sink.events.lock().unwrap().clear();
        events.remove(0)
    }

    /// Serves HTTP, over TLS if a configuration is given.
    pub async fn serve(&self, at: (Ipv4Addr, u16), tls: Option<Arc<ServerConfig>>) {
        let listener = TcpListener::bind(at).await.unwrap();
        let log = self.log.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (log, tls) = (log.clone(), tls.clone());
                tokio::spawn(async move {
                    let mut first = [0; 3];
                    let prior =
                        tls.is_none() && matches!(stream.peek(&mut first).await, Ok(3)) && first == *b"PRI";
                    let stream = Tap { inner: stream, log: log.clone(), at: at.0 };
                    match tls {
                        None => http_on(stream, log, at.0, prior).await,
                        Some(config) => {
                            let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(stream).await
                            else {
                                return;
                            };
                            let http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                            http_on(stream, log, at.0, http2).await;
                        }
                    }
                });
            }
        });
    }
}

/// The proxy's settings in this world.
pub fn config(ca: &TestCa) -> ProxyConfig {
    ProxyConfig {
        resolvers: vec![SocketAddr::from((RESOLVER, 5300)).into()],
        extra_roots: vec![ca.der.clone()],
        timeouts: Timeouts { server_first: std::time::Duration::from_millis(50), ..Timeouts::default() },
    }
}

/// Writes, then reads until the end; an error after the last byte is the end too.
pub async fn talk<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, request: &str) -> String {
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut all = Vec::new();
    let mut buffer = [0; 4096];
    while let Ok(length @ 1..) = stream.read(&mut buffer).await {
        all.extend_from_slice(&buffer[..length]);
    }
    unchunk(&all)
}

/// A response as text, its body put together if it came in chunks.
pub fn unchunk(response: &[u8]) -> String {
    let text = String::from_utf8_lossy(response);
    let Some((head, mut body)) = text.split_once("\r\n\r\n") else { return text.into_owned() };
    if !head.to_ascii_lowercase().contains("transfer-encoding: chunked") {
        return text.into_owned();
    }
    let mut whole = format!("{head}\r\n\r\n");
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        if size == 0 {
            let next = rest.split_once("\r\n").map_or("", |(_, next)| next);
            return whole + &unchunk(next.as_bytes());
        }
        whole += &rest[..size];
        body = &rest[size + 2..];
    }
    whole
}
