//! The world's name server: answers for the sites, and writes down every question that it is asked. A name that it
//! does not know does not exist.

use super::Shared;
use crate::sites;
use anyhow::{Context as _, Result};
use hickory_proto::{
    op::{Message, MessageType, OpCode, ResponseCode},
    rr::{
        Name, RData, Record, RecordType,
        rdata::{A, AAAA, TXT},
    },
};
use serde_json::json;
use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream, UdpSocket},
};

#[derive(Clone)]
struct Zone {
    shared: Shared,
    rebinds: Arc<AtomicUsize>,
}

/// Opens port 53, UDP and TCP.
pub(super) async fn start(shared: &Shared) -> Result<()> {
    let zone = Zone { shared: shared.clone(), rebinds: Arc::default() };
    for address in sites::DNS.addresses() {
        let local = SocketAddr::new(address, 53);
        let socket = UdpSocket::bind(local).await.with_context(|| format!("{local} cannot be bound"))?;
        tokio::spawn(zone.clone().udp(socket));
        let listener = TcpListener::bind(local).await.with_context(|| format!("{local} cannot be bound"))?;
        tokio::spawn(zone.clone().tcp(listener));
    }
    Ok(())
}

impl Zone {
    async fn udp(self, socket: UdpSocket) {
        let mut buffer = vec![0; 65536];
        loop {
            let Ok((count, peer)) = socket.recv_from(&mut buffer).await else { continue };
            if let Some(answer) = self.answer(&buffer[..count], peer, "udp") {
                let _ = socket.send_to(&answer, peer).await;
            }
        }
    }

    async fn tcp(self, listener: TcpListener) {
        loop {
            let Ok((stream, peer)) = listener.accept().await else { continue };
            let zone = self.clone();
            tokio::spawn(async move { zone.stream(stream, peer).await });
        }
    }

    async fn stream(&self, mut stream: TcpStream, peer: SocketAddr) -> Option<()> {
        loop {
            let length = stream.read_u16().await.ok()?;
            let mut question = vec![0; usize::from(length)];
            stream.read_exact(&mut question).await.ok()?;
            let answer = self.answer(&question, peer, "tcp")?;
            stream.write_u16(u16::try_from(answer.len()).ok()?).await.ok()?;
            stream.write_all(&answer).await.ok()?;
        }
    }

    fn answer(&self, bytes: &[u8], peer: SocketAddr, transport: &str) -> Option<Vec<u8>> {
        let asked = Message::from_vec(bytes).ok()?;
        let query = asked.queries.first()?.clone();
        let name = query.name().to_ascii().to_ascii_lowercase();
        let name = name.trim_end_matches('.');
        let kind = query.query_type();
        // As it was written, and with what came along: letters' case and options could carry something too.
        let options = asked.edns.as_ref().map_or(0, |edns| edns.options().as_ref().len());
        self.shared.journal.note(&json!({
            "kind": "dns", "name": name, "type": kind.to_string(), "peer": peer, "transport": transport,
            "written": query.name().to_ascii(), "options": options, "questions": asked.queries.len(),
        }));
        let mut answer = Message::new(asked.id, MessageType::Response, OpCode::Query);
        answer.metadata.recursion_desired = asked.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.add_query(query.clone());
        match self.data(name, kind) {
            Some(records) => {
                let ttl = if name == sites::REBIND || name.ends_with(sites::INWARD_ZONE) { 0 } else { 60 };
                let record = |data| Record::from_rdata(Name::clone(query.name()), ttl, data);
                answer.add_answers(records.into_iter().map(record));
            }
            None => answer.metadata.response_code = ResponseCode::NXDomain,
        }
        answer.to_vec().ok()
    }

    /// The records of a name; `None` if there is no such name.
    fn data(&self, name: &str, kind: RecordType) -> Option<Vec<RData>> {
        let v4 =
            |address: Ipv4Addr| if kind == RecordType::A { vec![RData::A(A(address))] } else { Vec::new() };
        if name == sites::REBIND {
            // Only what is asked for counts as an answer given, else AAAA questions would use up the first.
            let turn = if kind == RecordType::A { self.rebinds.fetch_add(1, Ordering::SeqCst) } else { 0 };
            let later = sites::REBIND_LATER;
            return Some(v4(if turn == 0 { sites::ECHO.v4 } else { later[(turn - 1) % later.len()] }));
        }
        if let Some((_, address)) = sites::INWARD.iter().find(|(inward, _)| *inward == name) {
            return Some(v4(*address));
        }
        if let Some(address) = sites::of_inward(name) {
            return Some(match address {
                IpAddr::V4(address) => v4(address),
                IpAddr::V6(address) if kind == RecordType::AAAA => vec![RData::AAAA(AAAA(address))],
                IpAddr::V6(_) => Vec::new(),
            });
        }
        // Whatever stands below the attacker's domain exists: data carried out in names would arrive.
        let evil = name == "tunnel.example.net" || name.ends_with(".tunnel.example.net");
        if evil && kind == RecordType::TXT {
            return Some(vec![RData::TXT(TXT::new(vec!["arrived".into()]))]);
        }
        let site = if evil { sites::EVIL } else { *sites::ALL.iter().find(|site| site.name == name)? };
        Some(match kind {
            RecordType::A => vec![RData::A(A(site.v4))],
            RecordType::AAAA => vec![RData::AAAA(AAAA(site.v6))],
            _ => Vec::new(),
        })
    }
}
