//! The host's own addresses, which no guest may reach by any rule or name: handed to the datapath and the proxy at start and
//! whenever they change. An interface that comes up later must not become a way in.

use super::Shared;
use std::{collections::BTreeSet, net::IpAddr, sync::Arc, time::Duration};

/// Between two looks. A new address is one that the host has just got; nothing can have used it for long.
const INTERVAL: Duration = Duration::from_millis(500);

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

/// Looks for changes until the daemon stops.
pub(super) async fn watch(shared: Arc<Shared>, mut known: BTreeSet<IpAddr>) {
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(INTERVAL) => {}
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

fn set(shared: &Shared, addresses: &BTreeSet<IpAddr>) -> Result<(), HostError> {
    let list: Vec<IpAddr> = addresses.iter().copied().collect();
    shared.datapath.set_host_addresses(&list)?;
    shared.table.set_host_addresses(&list);
    Ok(())
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
