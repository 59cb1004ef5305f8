//! Hosts that speak neither TLS nor HTTP by name: echo by TCP and UDP, and a download that never ends.

use super::{Ends, Shared, http, listen};
use crate::sites::{self, DOWNLOAD_PORT, ECHO_PORT};
use anyhow::{Context as _, Result};
use serde_json::json;
use std::net::SocketAddr;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpStream, UdpSocket},
};

/// Opens the ports.
pub(super) async fn start(shared: &Shared) -> Result<()> {
    for site in [sites::FILES, sites::EVIL] {
        for address in site.addresses() {
            let echoing = shared.clone();
            listen(site, address, ECHO_PORT, move |stream, ends| echo(echoing.clone(), stream, ends)).await?;
            let serving = shared.clone();
            listen(site, address, DOWNLOAD_PORT, move |s, ends| http::clear(serving.clone(), s, ends))
                .await?;
            for port in [ECHO_PORT, 443] {
                let local = SocketAddr::new(address, port);
                let socket =
                    UdpSocket::bind(local).await.with_context(|| format!("{local} cannot be bound"))?;
                tokio::spawn(echo_udp(shared.clone(), socket, site.name, local));
            }
        }
    }
    Ok(())
}

async fn echo(shared: Shared, mut stream: TcpStream, ends: Ends) {
    let Ends { site, local, peer } = ends;
    shared.journal.note(&json!({ "kind": "tcp", "site": site.name, "local": local, "peer": peer }));
    let mut buffer = vec![0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut buffer).await {
        let text = String::from_utf8_lossy(&buffer[..count]);
        shared
            .journal
            .note(&json!({ "kind": "tcp", "site": site.name, "local": local, "peer": peer, "body": text }));
        if stream.write_all(&buffer[..count]).await.is_err() {
            break;
        }
    }
}

async fn echo_udp(shared: Shared, socket: UdpSocket, site: &'static str, local: SocketAddr) {
    let mut buffer = vec![0; 65536];
    loop {
        // An ICMP error of an earlier answer is reported here; it ends nothing.
        let Ok((count, peer)) = socket.recv_from(&mut buffer).await else { continue };
        let text = String::from_utf8_lossy(&buffer[..count.min(4096)]);
        shared
            .journal
            .note(&json!({ "kind": "udp", "site": site, "local": local, "peer": peer, "body": text }));
        let _ = socket.send_to(&buffer[..count], peer).await;
    }
}
