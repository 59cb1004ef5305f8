//! Forwards a port of the host to port 22 of one guest.
//!
//! Owns the listener and the connections of one VM; all end when the forwarder is dropped. The connection to the guest
//! is made inside the egress namespace from the gateway's address. Must never reach any other port or guest.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, SocketAddr, SocketAddrV4},
    sync::Arc,
    time::Duration,
};
use tapgate_ebpf_common::net::GATEWAY_V4;
use tapgate_model::VmId;
use tapgate_netns::Netns;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpSocket, TcpStream},
    sync::Semaphore,
    task::JoinHandle,
};

/// Connections of one VM at a time; one more waits in the listener's backlog.
const MAX_CONNECTIONS: usize = 256;
/// How long the guest's SSH server may take to accept.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Octets buffered for each direction of a connection.
const BUFFER: usize = 32 * 1024;

/// A running forward; dropping it closes the port and cuts its connections.
pub struct Forward {
    task: JoinHandle<()>,
}

impl Forward {
    /// Opens the host's port.
    ///
    /// # Errors
    /// The port is taken, or may not be bound.
    pub async fn open(vm: VmId, listen: SocketAddr, guest: Ipv4Addr, egress: Netns) -> io::Result<Self> {
        let listener = TcpListener::bind(listen).await?;
        Ok(Self { task: tokio::spawn(accept(vm, listener, guest, egress)) })
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn accept(vm: VmId, listener: TcpListener, guest: Ipv4Addr, egress: Netns) {
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
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
        let (vm, egress) = (vm.clone(), egress.clone());
        connections.spawn(async move {
            if let Err(error) = forward(client, guest, &egress).await {
                tracing::debug!(%vm, %peer, %error, "ssh.forward_ended");
            }
            drop(slot);
        });
    }
}

async fn forward(mut client: TcpStream, guest: Ipv4Addr, egress: &Netns) -> io::Result<()> {
    let mut server = dial(guest, egress).await?;
    client.set_nodelay(true)?;
    server.set_nodelay(true)?;
    copy_bidirectional_with_sizes(&mut client, &mut server, BUFFER, BUFFER).await.map(drop)
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
