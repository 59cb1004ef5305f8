//! The load: connections of a guest that fetch in a closed loop, as fast as whatever is in between lets them.

use crate::stage::NAME;
use anyhow::{Context as _, Result, bail, ensure};
use std::{
    future::Future,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

/// Connections that fetch at one time, by measure. With as few for bulk as there are processors, the figure is a matter of luck: whether two
/// of them meet on one thread of the load, of the proxy or of the origin.
pub const BULK_CONNECTIONS: usize = 8;
const OPENING: usize = 24;
const KEPT_ALIVE: usize = 32;

/// What the load goes through, and where it is.
#[derive(Clone)]
pub struct Target {
    /// The guest's address.
    pub from: Ipv4Addr,
    /// What it connects to.
    pub to: SocketAddr,
    /// Whether the proxy has to be asked for a tunnel first.
    pub connect: bool,
    pub tls: Arc<rustls::ClientConfig>,
}

/// A measure's result.
#[derive(Clone, Debug, Default)]
pub struct Outcome {
    /// Octets or requests or connections a second.
    pub rate: f64,
    /// How many in all.
    pub count: u64,
    /// Latencies, where they were measured: median and 99th percentile.
    pub p50: Duration,
    pub p99: Duration,
}

impl Target {
    async fn open(&self) -> Result<TlsStream<TcpStream>> {
        let socket = TcpSocket::new_v4()?;
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::IpBindAddressNoPort, &true)?;
        socket.bind(SocketAddr::from((self.from, 0)))?;
        let mut stream = socket.connect(self.to).await.context("connect")?;
        stream.set_nodelay(true)?;
        if self.connect {
            let request = format!("CONNECT {NAME}:443 HTTP/1.1\r\nHost: {NAME}:443\r\n\r\n");
            stream.write_all(request.as_bytes()).await?;
            let mut head = Vec::new();
            while !head.ends_with(b"\r\n\r\n") {
                ensure!(stream.read_buf(&mut head).await? > 0, "no answer to CONNECT");
            }
            ensure!(head.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&head));
        }
        let name = NAME.try_into()?;
        TlsConnector::from(self.tls.clone()).connect(name, stream).await.context("handshake")
    }
}

/// Asks, and reads the answer to its end; `seen` is told of every piece. Answers are plain, or chunked.
async fn fetch(
    stream: &mut TlsStream<TcpStream>,
    buffer: &mut Vec<u8>,
    path: &str,
    close: bool,
    seen: &AtomicU64,
) -> Result<()> {
    let close = if close { "Connection: close\r\n" } else { "" };
    let ask = format!(
        "GET {path} HTTP/1.1\r\nHost: {NAME}\r\nAuthorization: Bearer IRONSH_PROXY_token\r\n{close}\r\n"
    );
    stream.write_all(ask.as_bytes()).await?;
    // What TLS has taken is not yet sent: a task that has used up its turn could wait for the answer for ever.
    stream.flush().await?;
    buffer.clear();
    let body = loop {
        ensure!(stream.read_buf(buffer).await? > 0, "the answer broke off");
        if let Some(at) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
            break at + 4;
        }
    };
    let head = String::from_utf8_lossy(&buffer[..body]).to_ascii_lowercase();
    ensure!(head.starts_with("http/1.1 200"), "{head}");
    let mut left = match head.split("content-length: ").nth(1) {
        Some(rest) => Some(rest.split("\r\n").next().unwrap_or_default().trim().parse::<usize>()?),
        None if head.contains("chunked") => None,
        None => bail!("an answer without a length: {head}"),
    };
    let mut got = buffer.len() - body;
    seen.fetch_add(got as u64, Ordering::Relaxed);
    let mut tail: Vec<u8> = buffer[body..].to_vec();
    loop {
        match &mut left {
            Some(length) if got >= *length => return Ok(()),
            // Chunks are counted with their sizes; the last one ends the answer.
            None if tail.ends_with(b"\r\n0\r\n\r\n") => return Ok(()),
            _ => {}
        }
        buffer.clear();
        let length = stream.read_buf(buffer).await?;
        ensure!(length > 0, "the answer broke off");
        got += length;
        seen.fetch_add(length as u64, Ordering::Relaxed);
        if left.is_none() {
            tail.extend_from_slice(&buffer[buffer.len().saturating_sub(8)..]);
            tail.drain(..tail.len().saturating_sub(8));
        }
    }
}

/// Runs workers for the time given, after a moment to warm up, and gives what happened in it for each second.
async fn run<F, W>(workers: usize, time: Duration, work: W) -> Result<Outcome>
where
    W: Fn(Arc<AtomicBool>, Arc<AtomicU64>) -> F,
    F: Future<Output = Result<Vec<u32>>> + Send + 'static,
{
    let (stop, count) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let tasks: Vec<_> = (0..workers).map(|_| tokio::spawn(work(stop.clone(), count.clone()))).collect();
    tokio::time::sleep(Duration::from_millis(500)).await;
    let (before, started) = (count.load(Ordering::Relaxed), Instant::now());
    tokio::time::sleep(time).await;
    let (done, took) = (count.load(Ordering::Relaxed) - before, started.elapsed());
    stop.store(true, Ordering::Relaxed);
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await??);
    }
    latencies.sort_unstable();
    let at = |share: f64| {
        let index = (latencies.len() as f64 * share) as usize;
        Duration::from_micros(
            latencies.get(index.min(latencies.len().saturating_sub(1))).copied().unwrap_or(0).into(),
        )
    };
    Ok(Outcome {
        rate: done as f64 / took.as_secs_f64(),
        count: count.load(Ordering::Relaxed),
        p50: at(0.5),
        p99: at(0.99),
    })
}

/// Downloads without end.
pub async fn bulk(target: &Target, time: Duration) -> Result<Outcome> {
    run(BULK_CONNECTIONS, time, |stop, count| {
        let target = target.clone();
        async move {
            let mut stream = target.open().await?;
            let mut buffer = Vec::with_capacity(256 * 1024);
            while !stop.load(Ordering::Relaxed) {
                fetch(&mut stream, &mut buffer, "/bulk", false, &count).await?;
            }
            Ok(Vec::new())
        }
    })
    .await
}

/// New connections, one small request on each.
pub async fn opening(target: &Target, time: Duration) -> Result<Outcome> {
    run(OPENING, time, |stop, count| {
        let target = target.clone();
        async move {
            let (mut buffer, octets) = (Vec::with_capacity(16 * 1024), AtomicU64::new(0));
            let mut latencies = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                let mut stream = target.open().await?;
                fetch(&mut stream, &mut buffer, "/small", true, &octets).await?;
                count.fetch_add(1, Ordering::Relaxed);
                latencies.push(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX));
            }
            Ok(latencies)
        }
    })
    .await
}

/// Small requests on connections that stay.
pub async fn keep_alive(target: &Target, time: Duration) -> Result<Outcome> {
    run(KEPT_ALIVE, time, |stop, count| {
        let target = target.clone();
        async move {
            let (mut buffer, octets) = (Vec::with_capacity(16 * 1024), AtomicU64::new(0));
            let mut stream = target.open().await?;
            let mut latencies = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let started = Instant::now();
                fetch(&mut stream, &mut buffer, "/small", false, &octets).await?;
                count.fetch_add(1, Ordering::Relaxed);
                latencies.push(u32::try_from(started.elapsed().as_micros()).unwrap_or(u32::MAX));
            }
            Ok(latencies)
        }
    })
    .await
}

/// Opens so many connections, asks once on each, and keeps them until the value is dropped.
pub async fn idle(target: &Target, many: usize) -> Result<Vec<TlsStream<TcpStream>>> {
    let mut open = Vec::with_capacity(many);
    while open.len() < many {
        let batch = (0..64.min(many - open.len())).map(|_| {
            let target = target.clone();
            tokio::spawn(async move {
                let mut stream = target.open().await?;
                let mut buffer = Vec::with_capacity(4 * 1024);
                fetch(&mut stream, &mut buffer, "/small", false, &AtomicU64::new(0)).await?;
                anyhow::Ok(stream)
            })
        });
        for task in batch.collect::<Vec<_>>() {
            open.push(task.await??);
        }
    }
    Ok(open)
}
