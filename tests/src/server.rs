//! The world's servers, all in one process inside the namespace `internet`. Says `ready` when every port is open and
//! ends when its standard input does, so that it never outlives who started it.

mod dns;
mod git;
mod hand_back;
mod http;
mod plain;
mod tap;
mod tls;

pub use hand_back::WAYS as HAND_BACK_WAYS;
pub use tls::{CA_FILE, certificate_file};

use crate::{
    journal::Writer,
    sites::{self, Site},
};
use anyhow::{Context as _, Result};
use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{
    io::AsyncReadExt as _,
    net::{TcpListener, TcpStream},
};

/// The file of the journal in the world's folder.
pub const JOURNAL_FILE: &str = "journal.jsonl";
/// The file that holds the token which the git server wants.
pub const GIT_TOKEN_FILE: &str = "git-token";
/// The folder of the git server's repositories.
pub const GIT_FOLDER: &str = "git";

/// What every server needs.
#[derive(Clone)]
struct Shared {
    folder: Arc<PathBuf>,
    journal: Writer,
    git_token: Arc<str>,
}

/// One accepted connection, or rather who is at its ends.
#[derive(Clone, Copy)]
struct Ends {
    site: Site,
    local: SocketAddr,
    peer: SocketAddr,
}

/// Serves until standard input ends.
pub fn serve(folder: &Path) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let done = runtime.block_on(start_all(folder.to_path_buf()));
    // Endless downloads would keep an orderly shutdown waiting.
    runtime.shutdown_background();
    done
}

async fn start_all(folder: PathBuf) -> Result<()> {
    let git_token =
        std::fs::read_to_string(folder.join(GIT_TOKEN_FILE)).context("the git token is not there")?;
    let journal = Writer::open(&folder.join(JOURNAL_FILE))?;
    let acceptor = tls::acceptor(&folder)?;
    let shared = Shared { folder: Arc::new(folder), journal, git_token: git_token.trim().into() };
    dns::start(&shared).await?;
    plain::start(&shared).await?;
    for site in sites::WEB {
        for address in site.addresses() {
            let (plain, opened) = (shared.clone(), shared.clone());
            listen(site, address, 80, move |stream, ends| http::clear(plain.clone(), stream, ends)).await?;
            let acceptor = acceptor.clone();
            let serve = move |stream, ends| http::secure(opened.clone(), acceptor.clone(), stream, ends);
            listen(site, address, 443, serve).await?;
        }
    }
    for (port, address) in
        sites::EVIL_PORTS.into_iter().flat_map(|port| sites::EVIL.addresses().map(|a| (port, a)))
    {
        let (shared, acceptor) = (shared.clone(), acceptor.clone());
        let serve = move |stream, ends| http::either(shared.clone(), acceptor.clone(), stream, ends);
        listen(sites::EVIL, address, port, serve).await?;
    }
    println!("ready");
    tokio::io::stdin().read_to_end(&mut Vec::new()).await?;
    Ok(())
}

/// Accepts on an address and gives each connection a task of its own.
async fn listen<F, T>(site: Site, address: IpAddr, port: u16, serve: F) -> Result<()>
where
    F: Fn(TcpStream, Ends) -> T + Send + 'static,
    T: Future<Output = ()> + Send + 'static,
{
    let local = SocketAddr::new(address, port);
    let listener = TcpListener::bind(local).await.with_context(|| format!("{local} cannot be bound"))?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => drop(tokio::spawn(serve(stream, Ends { site, local, peer }))),
                Err(error) => eprintln!("{local}: {error}"),
            }
        }
    });
    Ok(())
}
