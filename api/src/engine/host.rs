//! The host's own addresses, which no guest may reach by any rule or name: handed to the datapath and the proxy at start and
//! whenever they change. An interface that comes up later must not become a way in, and neither must an address that is not on any
//! interface but translated to the host (a cloud's public address): `public_host` is the host too.

use super::Shared;
use std::{collections::BTreeSet, net::IpAddr, pin::Pin, sync::Arc, time::Duration};
use tapgate_netns::{AddressWatch, Netns, NetnsError};

/// Between two looks of which nothing told: the kernel says what changes, and this is for what it might have left out.
const BACKSTOP: Duration = Duration::from_secs(30);
/// Between two tries to hear from the kernel.
const RETRY: Duration = Duration::from_millis(500);
/// For the name of `public_host`.
const PATIENCE: Duration = Duration::from_secs(3);

/// Why the host's addresses could not be handed over.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HostError {
    /// The system does not list them.
    #[error("the host's interfaces cannot be listed: {0}")]
    List(#[from] nix::errno::Errno),
    /// The datapath does not take them.
    #[error(transparent)]
    Datapath(#[from] tapgate_datapath::DatapathError),
}

/// Reads the addresses and hands them over.
pub(super) async fn hand_over(shared: &Shared) -> Result<Known, HostError> {
    let mut known = Known::default();
    known.found(shared, look_up(shared.config.public_host.clone()).await);
    known.look()?;
    set(shared, &known.all)?;
    Ok(known)
}

/// What was handed over, and which of it `public_host` stands for.
#[derive(Debug, Default)]
pub(super) struct Known {
    all: BTreeSet<IpAddr>,
    public: BTreeSet<IpAddr>,
}

impl Known {
    /// Says whether there is news.
    fn look(&mut self) -> Result<bool, HostError> {
        let mut now = addresses()?;
        now.extend(&self.public);
        let news = now != self.all;
        self.all = now;
        Ok(news)
    }

    /// Takes what the name stands for now.
    fn found(&mut self, shared: &Shared, found: std::io::Result<BTreeSet<IpAddr>>) {
        match found {
            Ok(found) => self.public = found,
            // What it stood for before stays closed.
            Err(error) => {
                let name = shared.config.public_host.as_str();
                tracing::warn!(public_host = name, %error, "host.public_host_not_found");
            }
        }
    }
}

async fn look_up(name: String) -> std::io::Result<BTreeSet<IpAddr>> {
    let found = tokio::time::timeout(PATIENCE, tokio::net::lookup_host((name, 0))).await;
    let found = found.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))?;
    Ok(found.map(|address| address.ip()).collect())
}

/// Looks whenever the kernel says that something changed, until the daemon stops. What an interface has got is closed at once, however
/// long the name server takes to say what `public_host` stands for.
pub(super) async fn watch(shared: Arc<Shared>, mut known: Known) {
    let mut news: Option<AddressWatch> = None;
    let mut name: Option<LookUp> = None;
    loop {
        // What changed before there was anyone to hear it is seen by the look that follows.
        let patience = match news {
            Some(_) => BACKSTOP,
            None => match subscribe() {
                Ok(opened) => {
                    news = Some(opened);
                    Duration::ZERO
                }
                Err(error) => {
                    tracing::warn!(%error, "host.addresses_not_watched");
                    RETRY
                }
            },
        };
        tokio::select! {
            () = shared.stop.cancelled() => return,
            found = answered(&mut name) => {
                name = None;
                known.found(&shared, found);
            }
            heard = hear(&mut news) => {
                if !heard {
                    news = None;
                }
                name.get_or_insert_with(|| Box::pin(look_up(shared.config.public_host.clone())));
            }
            () = tokio::time::sleep(patience) => {
                name.get_or_insert_with(|| Box::pin(look_up(shared.config.public_host.clone())));
            }
        }
        let changed = match known.look() {
            Ok(true) => set(&shared, &known.all).inspect(|()| {
                tracing::info!(addresses = known.all.len(), "host.addresses_changed");
            }),
            other => other.map(drop),
        };
        if let Err(error) = changed {
            // At the next look everything is news.
            known.all.clear();
            tracing::error!(%error, "host.addresses_not_updated");
        }
    }
}

/// A question for what `public_host` stands for.
type LookUp = Pin<Box<dyn Future<Output = std::io::Result<BTreeSet<IpAddr>>> + Send>>;

async fn answered(name: &mut Option<LookUp>) -> std::io::Result<BTreeSet<IpAddr>> {
    match name {
        Some(asked) => asked.await,
        None => std::future::pending().await,
    }
}

fn subscribe() -> Result<AddressWatch, NetnsError> {
    AddressWatch::open(&Netns::current()?)
}

async fn hear(news: &mut Option<AddressWatch>) -> bool {
    match news {
        Some(news) => news.changed().await,
        None => std::future::pending().await,
    }
}

fn set(shared: &Shared, addresses: &BTreeSet<IpAddr>) -> Result<(), HostError> {
    let list: Vec<IpAddr> = addresses.iter().copied().collect();
    // The one that cannot fail first.
    shared.table.set_host_addresses(&list);
    Ok(shared.datapath.set_host_addresses(&list)?)
}

/// Every address of the host, of any interface and family.
fn addresses() -> Result<BTreeSet<IpAddr>, HostError> {
    let interfaces = nix::ifaddrs::getifaddrs()?;
    Ok(interfaces
        .filter_map(|interface| interface.address)
        .filter_map(|address| {
            let v4 = address.as_sockaddr_in().map(|v4| IpAddr::V4(v4.ip()));
            v4.or_else(|| address.as_sockaddr_in6().map(|v6| IpAddr::V6(v6.ip())))
        })
        .collect())
}
