//! DNS over UDP: datagrams with the address that each was sent to, and replies from that address and port 53.

use super::{
    answer::{Asker, Transport, answer_within_bounds},
    flood,
};
use crate::{proxy::Shared, table::VmEntry};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrIn, SockaddrIn6, SockaddrStorage, recvmsg, sendmsg,
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::AsRawFd as _,
    sync::Arc,
    time::Duration,
};
use tapgate_ebpf_common::net::DNS_PORT;
use tokio::{io::Interest, net::UdpSocket};

/// Longer datagrams are cut, and then do not parse.
const MAX_QUESTION: usize = 4096;

struct Datagram {
    bytes: Vec<u8>,
    guest: SocketAddr,
    /// The address that the guest asked.
    asked: IpAddr,
}

/// Answers until the daemon stops.
pub(crate) async fn serve(shared: Arc<Shared>, socket: UdpSocket) {
    let socket = Arc::new(socket);
    let mut buffer = vec![0; MAX_QUESTION];
    loop {
        let received = tokio::select! {
            received = socket.async_io(Interest::READABLE, || receive(&socket, &mut buffer)) => received,
            () = shared.stop.cancelled() => return,
        };
        match received {
            Ok(Some((guest, asked, length))) => {
                let Some(entry) = shared.table.by_address(guest.ip()) else { continue };
                // A guest that floods costs the others of this socket as little as may be.
                if flood::admit(&asker(&shared, &entry, asked)) {
                    let datagram = Datagram { bytes: buffer[..length].to_vec(), guest, asked };
                    drop(shared.tasks.spawn(one(shared.clone(), entry, socket.clone(), datagram)));
                }
            }
            Ok(None) => {}
            Err(error) => {
                tracing::warn!(%error, "a DNS datagram could not be read");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    }
}

fn asker<'a>(shared: &'a Arc<Shared>, entry: &'a Arc<VmEntry>, asked: IpAddr) -> Asker<'a> {
    Asker { shared, entry, to: SocketAddr::new(asked, DNS_PORT) }
}

async fn one(shared: Arc<Shared>, entry: Arc<VmEntry>, socket: Arc<UdpSocket>, datagram: Datagram) {
    let asker = asker(&shared, &entry, datagram.asked);
    if let Some(reply) = answer_within_bounds(asker, &datagram.bytes, Transport::Udp).await {
        let sent = socket.async_io(Interest::WRITABLE, || send(&socket, &reply, &datagram)).await;
        if let Err(error) = sent {
            tracing::debug!(%error, guest = %datagram.guest, "a DNS answer could not be sent");
        }
    }
}

/// Who asked which address, and the length of what was asked.
fn receive(socket: &UdpSocket, buffer: &mut [u8]) -> io::Result<Option<(SocketAddr, IpAddr, usize)>> {
    let mut control = nix::cmsg_space!(libc::in_pktinfo, libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(buffer)];
    let message =
        recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut parts, Some(&mut control), MsgFlags::empty())?;
    let asked = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::Ipv4PacketInfo(info) => {
            Some(IpAddr::V4(Ipv4Addr::from(info.ipi_addr.s_addr.to_ne_bytes())))
        }
        ControlMessageOwned::Ipv6PacketInfo(info) => Some(IpAddr::V6(Ipv6Addr::from(info.ipi6_addr.s6_addr))),
        _ => None,
    });
    let guest = message.address.and_then(|address| {
        let v4 = address.as_sockaddr_in().map(|v4| SocketAddr::from(SocketAddrV4::from(*v4)));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| SocketAddr::from(SocketAddrV6::from(*v6))))
    });
    let length = message.bytes;
    Ok(asked.zip(guest).map(|(asked, guest)| (guest, asked, length)))
}

fn send(socket: &UdpSocket, reply: &[u8], to: &Datagram) -> io::Result<()> {
    let parts = [IoSlice::new(reply)];
    let socket = socket.as_raw_fd();
    match (to.guest, to.asked) {
        (SocketAddr::V4(guest), IpAddr::V4(asked)) => {
            let info = libc::in_pktinfo {
                ipi_ifindex: 0,
                ipi_spec_dst: libc::in_addr { s_addr: u32::from_ne_bytes(asked.octets()) },
                ipi_addr: libc::in_addr { s_addr: 0 },
            };
            let control = [ControlMessage::Ipv4PacketInfo(&info)];
            sendmsg(socket, &parts, &control, MsgFlags::empty(), Some(&SockaddrIn::from(guest)))?;
        }
        (SocketAddr::V6(guest), IpAddr::V6(asked)) => {
            let address = libc::in6_addr { s6_addr: asked.octets() };
            let info = libc::in6_pktinfo { ipi6_addr: address, ipi6_ifindex: 0 };
            let control = [ControlMessage::Ipv6PacketInfo(&info)];
            sendmsg(socket, &parts, &control, MsgFlags::empty(), Some(&SockaddrIn6::from(guest)))?;
        }
        _ => {}
    }
    Ok(())
}
