//! The host's own addresses, which no guest may reach by any rule or name: handed to the datapath and the proxy at start and
//! whenever they change. An interface that comes up later must not become a way in.

use super::Shared;
use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};
use tapgate_netns::{AddressWatch, Netns, NetnsError};

/// Between two looks of which nothing told: the kernel says what changes, and this is for what it might have left out.
const BACKSTOP: Duration = Duration::from_secs(30);
/// Between two tries to hear from the kernel.
const RETRY: Duration = Duration::from_millis(500);

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
pub(super) fn hand_over(shared: &Shared) -> Result<BTreeSet<IpAddr>, HostError> {
    let addresses = addresses()?;
    set(shared, &addresses)?;
    Ok(addresses)
}

/// Looks whenever the kernel says that something changed, until the daemon stops.
pub(super) async fn watch(shared: Arc<Shared>, mut known: BTreeSet<IpAddr>) {
    let mut news: Option<AddressWatch> = None;
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
            heard = hear(&mut news) => if !heard { news = None },
            () = tokio::time::sleep(patience) => {}
        }
        let changed = addresses().and_then(|now| {
            if now != known {
                set(&shared, &now)?;
                tracing::info!(addresses = now.len(), "host.addresses_changed");
                known = now;
            }
            Ok(())
        });
        if let Err(error) = changed {
            tracing::error!(%error, "host.addresses_not_updated");
        }
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
