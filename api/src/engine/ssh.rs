//! Forwards a port of the host to port 22 of one guest.
//!
//! Owns the listener and the connections of one VM; all end when the forwarder is dropped. The connection to the guest
//! is made inside the egress namespace from the gateway's address. Must never reach any other port or guest, nor keep a place for
//! a peer that is gone.

use super::{Shared, backoff::Backoff, sources::Sources};
use socket2::{SockRef, TcpKeepalive};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4},
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tapgate_ebpf_common::net::GATEWAY_V4;
use tapgate_model::VmId;
use tapgate_netns::Netns;
use tapgate_store::VmRecord;
use tokio::{
    io::{AsyncWriteExt as _, BufReader},
    net::{
        TcpListener, TcpSocket, TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::Semaphore,
    task::JoinHandle,
};

/// Connections of one VM at a time; one more waits in the listener's backlog.
const MAX_CONNECTIONS: usize = 256;
/// How long the guest's SSH server may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Octets buffered for each direction of a connection.
const BUFFER: usize = 32 * 1024;
/// A peer that says nothing for so long is asked whether it is there,
const IDLE: Duration = Duration::from_secs(60);
/// so often,
const ASK: Duration = Duration::from_secs(15);
/// and so many times.
const ASKED: u32 = 4;
/// For one side to end when the other has.
const LAST: Duration = Duration::from_secs(30);

/// Which port leads to which guest.
pub struct Port {
    vm: VmId,
    listen: SocketAddr,
    guest: Ipv4Addr,
    egress: Netns,
}

impl Port {
    /// The one that the records give to the VM.
    pub(super) fn of(shared: &Shared, record: &VmRecord) -> Self {
        Self {
            vm: record.id.clone(),
            listen: SocketAddr::new(address(&shared.config.public_host), record.ssh_port),
            guest: shared.net(record).v4,
            egress: shared.datapath.egress().clone(),
        }
    }
}

/// Where ports are opened: reachable from outside only where the operator named an address that clients outside use.
fn address(public_host: &str) -> IpAddr {
    let outside = match public_host.parse::<IpAddr>() {
        Ok(address) => !address.is_loopback(),
        Err(_) => public_host != "localhost",
    };
    match (outside, std::path::Path::new("/proc/net/if_inet6").exists()) {
        (false, _) => Ipv4Addr::LOCALHOST.into(),
        (true, true) => Ipv6Addr::UNSPECIFIED.into(),
        (true, false) => Ipv4Addr::UNSPECIFIED.into(),
    }
}

/// Whether nobody listens there now.
pub(crate) fn is_free(public_host: &str, port: u16) -> bool {
    std::net::TcpListener::bind((address(public_host), port)).is_ok()
}

/// A running forward; dropping it closes the port and cuts its connections.
pub struct Forward {
    task: JoinHandle<()>,
}

impl Forward {
    /// Opens the host's port.
    ///
    /// # Errors
    /// The port is taken, or may not be bound.
    pub async fn open(port: Port) -> io::Result<Self> {
        let listener = TcpListener::bind(port.listen).await?;
        Ok(Self { task: tokio::spawn(accept(port, listener)) })
    }

    /// The same for a VM that runs, whatever has its port: that is tried until it can be opened.
    pub async fn insist(port: Port) -> Self {
        let error = match TcpListener::bind(port.listen).await {
            Ok(listener) => return Self { task: tokio::spawn(accept(port, listener)) },
            Err(error) => error,
        };
        let (vm, listen) = (port.vm.clone(), port.listen);
        tracing::error!(%vm, %listen, %error, "ssh.port_taken: the VM runs on, and nobody gets in until the port is free");
        let task = async move {
            let mut backoff = Backoff::new();
            let listener = loop {
                tokio::time::sleep(backoff.pause()).await;
                match TcpListener::bind(listen).await {
                    Ok(listener) => break listener,
                    Err(error) => tracing::debug!(%vm, %listen, %error, "ssh.port_still_taken"),
                }
            };
            tracing::info!(%vm, %listen, "ssh.port_open");
            accept(port, listener).await;
        };
        Self { task: tokio::spawn(task) }
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(port: Port, listener: TcpListener) {
    let Port { vm, guest, egress, .. } = port;
    let (slots, sources) = (Arc::new(Semaphore::new(MAX_CONNECTIONS)), Sources::default());
    // Dropped with this task, and every connection with it.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let (client, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%vm, %error, "ssh.accept_failed");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let place = match sources.take(peer.ip()) {
            Ok(place) => place,
            Err(refused) => {
                // Once until it has fewer: a flood is not to fill the log as well.
                if refused.first {
                    tracing::warn!(%vm, %peer, "ssh.source_refused: it has as many connections as one may have");
                }
                continue;
            }
        };
        let (vm, egress) = (vm.clone(), egress.clone());
        connections.spawn(async move {
            if let Err(error) = forward(client, guest, &egress).await {
                tracing::debug!(%vm, %peer, %error, "ssh.forward_ended");
            }
            drop((slot, place));
        });
    }
}

async fn forward(mut client: TcpStream, guest: Ipv4Addr, egress: &Netns) -> io::Result<()> {
    client.set_nodelay(true)?;
    ask(&client)?;
    let mut server = dial(guest, egress).await?;
    server.set_nodelay(true)?;
    let (from_client, to_client) = client.split();
    let (from_server, to_server) = server.split();
    let (up, down) = (pass(from_client, to_server), pass(from_server, to_client));
    tokio::pin!(up, down);
    let (ended, other): (_, Pin<&mut (dyn Future<Output = io::Result<()>> + Send)>) = tokio::select! {
        ended = &mut up => (ended, down),
        ended = &mut down => (ended, up),
    };
    ended?;
    // SSH knows no half of a connection: whoever keeps the other half keeps a place with it.
    tokio::time::timeout(LAST, other).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

/// All that comes from there until its end, and the end.
async fn pass(from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
    tokio::io::copy_buf(&mut BufReader::with_capacity(BUFFER, from), &mut to).await?;
    to.shutdown().await
}

/// Whoever is gone without a word is found out: two minutes after it was silent, and where it was sent something by the retries of
/// that (tcp_retries2). A client that is stopped answers and is kept, whatever waits for it (TCP_USER_TIMEOUT would end it); so is a
/// guest that is held while its disk is copied, whose end the daemon knows.
fn ask(client: &TcpStream) -> io::Result<()> {
    let socket = SockRef::from(client);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(IDLE).with_interval(ASK).with_retries(ASKED))
}

/// Connects to the guest's SSH port from inside the egress namespace.
///
/// # Errors
/// The guest refuses, or does not answer in ten seconds.
pub async fn dial(guest: Ipv4Addr, egress: &Netns) -> io::Result<TcpStream> {
    let socket = egress.run(TcpSocket::new_v4).map_err(io::Error::other)??;
    socket.bind(SocketAddr::new(IpAddr::from(GATEWAY_V4), 0))?;
    let connect = socket.connect(SocketAddr::V4(SocketAddrV4::new(guest, 22)));
    tokio::time::timeout(CONNECT_TIMEOUT, connect)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_peer_that_is_gone_is_found_out_in_two_minutes() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        ask(&stream).unwrap();
        let socket = SockRef::from(&stream);
        assert!(socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), IDLE);
        assert_eq!(socket.tcp_keepalive_interval().unwrap(), ASK);
        assert_eq!(socket.tcp_keepalive_retries().unwrap(), ASKED);
        assert_eq!(socket.tcp_user_timeout().unwrap(), None);
        assert_eq!(IDLE + ASK * ASKED, Duration::from_secs(120));
    }

    #[test]
    fn a_port_that_somebody_listens_on_is_not_free() {
        let taken = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let port = taken.local_addr().unwrap().port();
        assert!(!is_free("127.0.0.1", port) && !is_free("host.example.com", port));
        drop(taken);
        assert!(is_free("127.0.0.1", port));
    }
}
