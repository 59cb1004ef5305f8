//! Who talks in the world: servers, the proxy's listeners as far as the datapath cares, and a tap as a VMM holds it. Knows nothing
//! of how the world is laid.

use super::{Guest, PATIENCE, SILENCE};
use socket2::{Domain, Protocol, Socket, Type};
use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::{AsFd as _, OwnedFd},
    time::Duration,
};
use tapgate_datapath::Datapath;
use tapgate_ebpf_common::net::port;
use tapgate_netns::Netns;

/// Takes a connection and echoes until its end.
pub fn echo(listener: TcpListener) -> std::thread::JoinHandle<SocketAddr> {
    std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().unwrap();
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = stream.read(&mut buffer) {
            if stream.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
        peer
    })
}

pub fn listen(ns: &Netns, at: &str) -> TcpListener {
    ns.run(|| TcpListener::bind(at).unwrap()).unwrap()
}

/// The proxy's listeners, as far as the datapath cares.
pub struct Listeners {
    pub tcp: TcpListener,
    pub dns_udp: UdpSocket,
    pub dns_tcp: TcpListener,
    pub service: TcpListener,
}

pub fn listeners(datapath: &Datapath) -> Listeners {
    listeners_of(datapath, Domain::IPV4)
}

/// With `Domain::IPV6` they serve both families.
pub fn listeners_of(datapath: &Datapath, domain: Domain) -> Listeners {
    let any = move |number: u16| match domain {
        Domain::IPV6 => SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, number)),
        _ => SocketAddr::from((Ipv4Addr::UNSPECIFIED, number)),
    };
    let tcp = |number: u16| {
        datapath
            .egress()
            .run(|| {
                let socket = Socket::new(domain, Type::STREAM, Some(Protocol::TCP)).unwrap();
                socket.set_ip_transparent_v4(true).unwrap();
                socket.bind(&any(number).into()).unwrap();
                socket.listen(64).unwrap();
                TcpListener::from(socket)
            })
            .unwrap()
    };
    let dns_udp = datapath
        .egress()
        .run(|| {
            let socket = Socket::new(domain, Type::DGRAM, Some(Protocol::UDP)).unwrap();
            socket.set_ip_transparent_v4(true).unwrap();
            socket.bind(&any(port::DNS_UDP).into()).unwrap();
            UdpSocket::from(socket)
        })
        .unwrap();
    dns_udp.set_read_timeout(Some(PATIENCE)).unwrap();
    let listeners =
        Listeners { tcp: tcp(port::TCP), dns_udp, dns_tcp: tcp(port::DNS_TCP), service: tcp(port::SERVICE) };
    hand_over(datapath, &listeners);
    listeners
}

pub fn hand_over(datapath: &Datapath, listeners: &Listeners) {
    // Sockets of IPv6 that take IPv4 too: one set for both families.
    for v6 in [false, true] {
        datapath
            .set_listeners(
                v6,
                listeners.tcp.as_fd(),
                listeners.dns_udp.as_fd(),
                listeners.dns_tcp.as_fd(),
                listeners.service.as_fd(),
            )
            .unwrap();
    }
}

/// A tap as a VMM holds it: whole frames in and out.
pub struct Wire(std::fs::File);

impl Wire {
    pub fn new(fd: OwnedFd) -> Self {
        Self(fd.into())
    }

    pub fn send(&mut self, frame: &[u8]) {
        self.send_with(&[0; tapgate_netns::tap::VNET_HEADER], frame);
    }

    /// With the header that says what is left to the host: checksum, segmentation.
    pub fn send_with(&mut self, header: &[u8; tapgate_netns::tap::VNET_HEADER], frame: &[u8]) {
        self.try_send_with(header, frame).unwrap();
    }

    /// The same where the kernel may refuse the header.
    pub fn try_send_with(
        &mut self,
        header: &[u8; tapgate_netns::tap::VNET_HEADER],
        frame: &[u8],
    ) -> io::Result<()> {
        self.0.write_all(&[header, frame].concat())
    }

    /// The next frame that the condition holds for, if one comes in time.
    pub fn wait(&mut self, patience: Duration, wanted: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let until = std::time::Instant::now() + patience;
        let mut buffer = vec![0; 65600];
        loop {
            match self.0.read(&mut buffer) {
                Ok(n) => {
                    let frame = &buffer[tapgate_netns::tap::VNET_HEADER..n];
                    if wanted(frame) {
                        return Some(frame.to_vec());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if std::time::Instant::now() > until {
                        return None;
                    }
                    std::thread::sleep(Duration::from_millis(5));
                }
                Err(error) => panic!("{error}"),
            }
        }
    }
}

/// A word there and back.
pub fn round_trip(stream: &mut TcpStream) -> io::Result<()> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"ping")?;
    let mut got = [0; 4];
    stream.read_exact(&mut got)
}

/// No connection comes about.
pub fn refused_or_silent(guest: &Guest, to: &str) {
    let to: SocketAddr = to.parse().unwrap();
    let result = guest.ns.0.run(|| TcpStream::connect_timeout(&to, SILENCE)).unwrap();
    assert!(result.is_err(), "{to} was reached");
}
