//! The transparent sockets that guests' traffic is handed to. Must be bound inside the egress namespace, by whoever
//! calls [`Listeners::bind`]; sockets stay in the namespace that they were made in.

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, SockAddr, Socket, Type};
use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd as _, BorrowedFd},
};
use tapgate_ebpf_common::net::port;

const BACKLOG: i32 = 4096;
/// What the socket for DNS may hold unread, by the kernel's count: all guests share it, and a burst of one's is some 1 KiB a question.
const DNS_BUFFER: usize = 4 * 1024 * 1024;

/// A listener that could not be made.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot bind the {what} listener: {source}; the daemon needs CAP_NET_ADMIN, and no second one in this namespace"
)]
pub struct ListenError {
    what: &'static str,
    source: io::Error,
}

/// The sockets of one address family.
pub(crate) struct Family {
    pub(crate) tcp: TcpListener,
    pub(crate) dns_udp: UdpSocket,
    pub(crate) dns_tcp: TcpListener,
    service: Option<TcpListener>,
}

/// All sockets; those for IPv6 where the namespace has it.
pub struct Listeners {
    pub(crate) v4: Family,
    pub(crate) v6: Option<Family>,
}

/// Descriptors for the datapath's socket map.
#[derive(Clone, Copy, Debug)]
pub struct ListenerFds<'a> {
    /// TCP of guests.
    pub tcp: BorrowedFd<'a>,
    /// DNS over UDP.
    pub dns_udp: BorrowedFd<'a>,
    /// DNS over TCP.
    pub dns_tcp: BorrowedFd<'a>,
    /// The guest service; `None` once it was taken.
    pub service: Option<BorrowedFd<'a>>,
}

/// The listeners of the guest service, which the proxy does not serve.
pub struct ServiceListeners {
    /// IPv4.
    pub v4: TcpListener,
    /// IPv6, where the namespace has it.
    pub v6: Option<TcpListener>,
}

impl Listeners {
    /// Binds all sockets in the calling thread's network namespace.
    pub fn bind() -> Result<Self, ListenError> {
        let v4 = Family::bind(IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V4(Ipv4Addr::UNSPECIFIED))?;
        let v6 = match Family::bind(IpAddr::V6(Ipv6Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::UNSPECIFIED)) {
            Ok(family) => Some(family),
            Err(error) => {
                tracing::info!(%error, "no IPv6 in the egress namespace");
                None
            }
        };
        Ok(Self { v4, v6 })
    }

    /// The IPv4 descriptors.
    pub fn fds(&self) -> ListenerFds<'_> {
        self.v4.fds()
    }

    /// The IPv6 descriptors.
    pub fn fds_v6(&self) -> Option<ListenerFds<'_>> {
        self.v6.as_ref().map(Family::fds)
    }

    /// Hands over the guest service's listeners; once.
    pub fn take_service(&mut self) -> Option<ServiceListeners> {
        let v6 = self.v6.as_mut().and_then(|family| family.service.take());
        self.v4.service.take().map(|v4| ServiceListeners { v4, v6 })
    }
}

impl Family {
    /// TCP on loopback, where only an assigned packet finds it; DNS over UDP on every address, for an answer must
    /// come from the address that was asked.
    fn bind(local: IpAddr, any: IpAddr) -> Result<Self, ListenError> {
        let tcp = |what, port| {
            let bound = socket(local, Type::STREAM, Protocol::TCP, port).and_then(|socket| {
                socket.listen(BACKLOG)?;
                Ok(TcpListener::from(socket))
            });
            bound.map_err(|source| ListenError { what, source })
        };
        Ok(Self {
            tcp: tcp("TCP", port::TCP)?,
            dns_udp: dns_udp(any).map_err(|source| ListenError { what: "DNS (UDP)", source })?,
            dns_tcp: tcp("DNS (TCP)", port::DNS_TCP)?,
            service: Some(tcp("guest service", port::SERVICE)?),
        })
    }

    fn fds(&self) -> ListenerFds<'_> {
        ListenerFds {
            tcp: self.tcp.as_fd(),
            dns_udp: self.dns_udp.as_fd(),
            dns_tcp: self.dns_tcp.as_fd(),
            service: self.service.as_ref().map(|service| service.as_fd()),
        }
    }
}

fn socket(address: IpAddr, kind: Type, protocol: Protocol, port: u16) -> io::Result<Socket> {
    let address = SocketAddr::new(address, port);
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    socket.set_nonblocking(true)?;
    if address.is_ipv4() {
        socket.set_ip_transparent_v4(true)?;
    } else {
        socket.set_only_v6(true)?;
        socket.set_ip_transparent_v6(true)?;
    }
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    socket.bind(&SockAddr::from(address))?;
    Ok(socket)
}

fn dns_udp(any: IpAddr) -> io::Result<UdpSocket> {
    let socket = socket(any, Type::DGRAM, Protocol::UDP, port::DNS_UDP)?;
    if setsockopt(&socket, sockopt::RcvBufForce, &DNS_BUFFER).is_err() {
        socket.set_recv_buffer_size(DNS_BUFFER)?;
    }
    if any.is_ipv4() {
        setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
    } else {
        setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
    }
    Ok(socket.into())
}
