//! A closed world on one thread: a network namespace of its own with documentation addresses on its loopback device, a
//! name server, TLS and HTTP servers of a test CA, the proxy, and a guest whose destinations are chosen freely.
#![allow(dead_code, missing_docs, clippy::unwrap_used, reason = "shared by tests that each use a part")]

pub mod clients;
pub mod guest;
pub mod servers;

use bytes::Bytes;
use hickory_proto::{
    op::{Message, ResponseCode},
    rr::{Name, RData, Record, RecordType, rdata},
};
use http::{HeaderMap, Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, pem::PemObject as _};
use std::{
    collections::HashMap,
    convert::Infallible,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
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

/// A request as a server saw it.
#[derive(Clone, Debug)]
pub struct Seen {
    pub server: Ipv4Addr,
    pub line: String,
    pub headers: HeaderMap,
    pub body: Bytes,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.get(name).map(|value| value.to_str().unwrap())
    }
}

/// Everything that servers saw, raw bytes of the attacker's included.
#[derive(Clone, Default)]
pub struct Log(Arc<Mutex<(Vec<Seen>, Vec<u8>)>>);

impl Log {
    pub fn seen(&self) -> Vec<Seen> {
        self.0.lock().unwrap().0.clone()
    }
    pub fn forget(&self) {
        self.0.lock().unwrap().0.clear();
    }
    pub fn attacker_got(&self, needle: &str) -> bool {
        let log = self.0.lock().unwrap();
        log.1.windows(needle.len()).any(|window| window == needle.as_bytes())
    }
}

pub struct TestCa {
    issuer: Issuer<'static, KeyPair>,
    pub der: CertificateDer<'static>,
    pub pem: String,
}

impl TestCa {
    fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Another name than the leaves have, which would look self-signed.
        params.distinguished_name.push(rcgen::DnType::CommonName, "test CA");
        let cert = params.self_signed(&key).unwrap();
        Self { issuer: Issuer::new(params, key), der: cert.der().clone(), pem: cert.pem() }
    }

    /// A certificate for the names, and its key.
    pub fn mint(&self, names: &[&str]) -> (rcgen::Certificate, KeyPair) {
        let key = KeyPair::generate().unwrap();
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let cert = CertificateParams::new(names).unwrap().signed_by(&key, &self.issuer).unwrap();
        (cert, key)
    }

    pub fn server(&self, names: &[&str], alpn: &[&str]) -> Arc<ServerConfig> {
        let (cert, key) = self.mint(names);
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        config.alpn_protocols = alpn.iter().map(|word| word.as_bytes().to_vec()).collect();
        Arc::new(config)
    }
}

pub fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Answers of the name server; addresses may change between questions.
#[derive(Clone, Default)]
pub struct Zone {
    pub records: Arc<Mutex<HashMap<String, Vec<Vec<IpAddr>>>>>,
    /// Names that only stand for others.
    aliases: Arc<Mutex<HashMap<String, String>>>,
    /// How long answers hold; 0 keeps them out of every cache.
    pub ttl: Arc<AtomicU32>,
    pub asked: Arc<Mutex<Vec<String>>>,
}

impl Zone {
    /// The name has these addresses.
    pub fn set(&self, name: &str, addresses: &[Ipv4Addr]) {
        let addresses = addresses.iter().map(|address| IpAddr::V4(*address)).collect();
        self.records.lock().unwrap().insert(name.to_owned(), vec![addresses]);
    }
    /// The name stands for another.
    pub fn alias(&self, name: &str, to: &str) {
        self.aliases.lock().unwrap().insert(name.to_owned(), to.to_owned());
    }

    /// The name has other addresses each time it is asked for; the last stay.
    pub fn turns(&self, name: &str, turns: &[Ipv4Addr]) {
        let turns = turns.iter().map(|address| vec![IpAddr::V4(*address)]).collect();
        self.records.lock().unwrap().insert(name.to_owned(), turns);
    }
    pub fn was_asked(&self, part: &str) -> bool {
        self.asked.lock().unwrap().iter().any(|name| name.contains(part))
    }

    pub fn answer(&self, request: &[u8]) -> Vec<u8> {
        let request = Message::from_vec(request).unwrap();
        let query = request.queries[0].clone();
        let name = query.name().to_ascii().to_lowercase();
        let name = name.trim_end_matches('.');
        self.asked.lock().unwrap().push(name.to_owned());
        let mut response = Message::response(request.metadata.id, request.metadata.op_code);
        response.metadata.recursion_available = true;
        response.add_query(query.clone());
        let ttl = self.ttl.load(Ordering::Relaxed);
        let mut name = name.to_owned();
        // As far as a name server goes along with it.
        for _ in 0..4 {
            let Some(to) = self.aliases.lock().unwrap().get(&name).cloned() else { break };
            let owner = Name::from_ascii(format!("{name}.")).unwrap();
            let alias = rdata::CNAME(Name::from_ascii(format!("{to}.")).unwrap());
            response.add_answer(Record::from_rdata(owner, ttl, RData::CNAME(alias)));
            name = to;
        }
        let name = name.as_str();
        let mut records = self.records.lock().unwrap();
        let Some(turns) = records.get_mut(name) else {
            response.metadata.response_code = ResponseCode::NXDomain;
            if ttl > 0 {
                let zone = Name::from_ascii("example.").unwrap();
                let soa = rdata::SOA::new(zone.clone(), zone.clone(), 1, 3600, 600, 86400, 300);
                response.add_authority(Record::from_rdata(zone, ttl, RData::SOA(soa)));
            }
            return response.to_vec().unwrap();
        };
        if query.query_type() == RecordType::AAAA {
            for address in &turns[0] {
                let IpAddr::V6(v6) = address else { continue };
                let owner = Name::from_ascii(format!("{name}.")).unwrap();
                response.add_answer(Record::from_rdata(owner, ttl, RData::AAAA(rdata::AAAA(*v6))));
            }
        } else if query.query_type() == RecordType::A {
            let addresses = if turns.len() > 1 { turns.remove(0) } else { turns[0].clone() };
            for address in addresses {
                let IpAddr::V4(v4) = address else { continue };
                let owner = Name::from_ascii(format!("{name}.")).unwrap();
                response.add_answer(Record::from_rdata(owner, ttl, RData::A(rdata::A(v4))));
            }
        } else if query.query_type() == RecordType::TXT {
            let text = RData::TXT(rdata::TXT::new(vec!["x".repeat(200); 4]));
            response.add_answer(Record::from_rdata(query.name().clone(), 60, text));
        }
        response.to_vec().unwrap()
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

/// A stream whose input at the attacker's address is kept.
struct Tap<S> {
    inner: S,
    log: Log,
    at: Ipv4Addr,
}

impl<S: AsyncRead + Unpin> AsyncRead for Tap<S> {
    fn poll_read(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut tokio::io::ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        let before = buf.filled().len();
        let polled = std::pin::Pin::new(&mut self.inner).poll_read(cx, buf);
        if self.at == ATTACKER {
            self.log.0.lock().unwrap().1.extend_from_slice(&buf.filled()[before..]);
        }
        polled
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Tap<S> {
    fn poll_write(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &[u8],
    ) -> std::task::Poll<std::io::Result<usize>> {
        std::pin::Pin::new(&mut self.inner).poll_write(cx, buf)
    }
    fn poll_flush(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.inner).poll_flush(cx)
    }
    fn poll_shutdown(
        mut self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        std::pin::Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

async fn http_on<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
    stream: S,
    log: Log,
    at: Ipv4Addr,
    http2: bool,
) {
    let service = hyper::service::service_fn(move |request| answer(request, log.clone(), at));
    let io = TokioIo::new(stream);
    if http2 {
        let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
            .serve_connection(io, service)
            .await;
    } else {
        let _ =
            hyper::server::conn::http1::Builder::new().serve_connection(io, service).with_upgrades().await;
    }
}

/// Echoes the request's headers and body; the path says in what coding.
async fn answer(
    mut request: Request<hyper::body::Incoming>,
    log: Log,
    at: Ipv4Addr,
) -> Result<Response<http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>>, Infallible> {
    if request.headers().contains_key("upgrade") && request.uri().path() != "/no-websocket" {
        return Ok(websocket(request, log, at));
    }
    let path = request.uri().path().to_owned();
    let line = format!("{} {} {:?}", request.method(), request.uri(), request.version());
    let headers = request.headers().clone();
    let collected = request.body_mut().collect().await.map(|all| (all.trailers().cloned(), all.to_bytes()));
    let (trailers, body) = collected.unwrap_or_default();
    let mut echo: String =
        headers.iter().map(|(name, value)| format!("{name}: {}\n", value.to_str().unwrap())).collect();
    for (name, value) in trailers.iter().flatten() {
        echo += &format!("trailer {name}: {}\n", value.to_str().unwrap());
    }
    echo += std::str::from_utf8(&body).unwrap_or("(binary)");
    log.0.lock().unwrap().0.push(Seen { server: at, line, headers: headers.clone(), body });
    if path == "/late" {
        tokio::time::sleep(std::time::Duration::from_secs(2)).await;
    }
    let coding = path.strip_prefix("/coded/");
    let bytes = match coding {
        Some(coding) => encode(coding, echo.as_bytes()).await,
        None => echo.into_bytes(),
    };
    // In small pieces, so that values are split.
    let size = if request.version() == http::Version::HTTP_2 { 64 } else { 7 };
    let pieces: Vec<_> =
        bytes.chunks(size).map(|c| Ok(http_body::Frame::data(Bytes::copy_from_slice(c)))).collect();
    let sum = [("x-sum", headers.get("authorization"))].into_iter();
    let sum: HeaderMap = sum.filter_map(|(k, v)| Some((k.parse().ok()?, v?.clone()))).collect();
    let sum = (path == "/trailers").then(|| Ok(http_body::Frame::trailers(sum)));
    let body = http_body_util::StreamBody::new(futures_util::stream::iter(pieces.into_iter().chain(sum)));
    let mut response = Response::new(body.boxed_unsync());
    if path == "/trailers" {
        response.headers_mut().insert("trailer", "x-sum".parse().unwrap());
    }
    if path == "/length" {
        *response.body_mut() = Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync();
    }
    if let Some(coding) = coding {
        response.headers_mut().insert("content-encoding", coding.parse().unwrap());
    }
    if let Some(authorization) = headers.get("authorization") {
        response.headers_mut().insert("x-echo", authorization.clone());
        let location = format!("https://elsewhere.example/?t={}", authorization.to_str().unwrap());
        response.headers_mut().insert("location", location.parse().unwrap());
    }
    response.headers_mut().insert("alt-svc", "h3=\":443\"".parse().unwrap());
    Ok(response)
}

fn websocket(
    mut request: Request<hyper::body::Incoming>,
    log: Log,
    at: Ipv4Addr,
) -> Response<http_body_util::combinators::UnsyncBoxBody<Bytes, std::io::Error>> {
    let upgrade = hyper::upgrade::on(&mut request);
    let seen = Seen {
        server: at,
        line: format!("{} {}", request.method(), request.uri()),
        headers: request.headers().clone(),
        body: Bytes::new(),
    };
    log.0.lock().unwrap().0.push(seen);
    let key = request.headers().get("sec-websocket-key").map_or(&b""[..], |key| key.as_bytes());
    let key = if request.uri().path() == "/wrong-accept" { b"another" } else { key };
    let accept = [key, b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"].concat();
    let accept = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, &accept);
    let accept = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, accept);
    tokio::spawn(async move {
        let mut stream = TokioIo::new(upgrade.await.unwrap());
        let mut buffer = [0; 64];
        while let Ok(length @ 1..) = stream.read(&mut buffer).await {
            stream.write_all(&buffer[..length]).await.unwrap();
        }
    });
    Response::builder()
        .status(101)
        .header("connection", "upgrade")
        .header("upgrade", "websocket")
        .header("sec-websocket-accept", accept)
        .body(Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync())
        .unwrap()
}

async fn encode(coding: &str, bytes: &[u8]) -> Vec<u8> {
    use async_compression::tokio::bufread as codecs;
    let mut out = Vec::new();
    match coding {
        "gzip" => codecs::GzipEncoder::new(bytes).read_to_end(&mut out).await,
        "deflate" => codecs::ZlibEncoder::new(bytes).read_to_end(&mut out).await,
        "br" => codecs::BrotliEncoder::new(bytes).read_to_end(&mut out).await,
        "zstd" => codecs::ZstdEncoder::new(bytes).read_to_end(&mut out).await,
        _ => return bytes.to_vec(),
    }
    .unwrap();
    out
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
