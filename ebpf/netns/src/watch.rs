//! Hears from the kernel when the addresses of a namespace change (rtnetlink(7): `RTNLGRP_IPV4_IFADDR`,
//! `RTNLGRP_IPV6_IFADDR`).
//!
//! Says that something changed and not what: whoever hears it reads the addresses anew. So a message that is lost, or
//! many at a time, do no harm as long as one is heard.

use crate::{Netns, NetnsError};
use futures_util::{FutureExt as _, Stream, StreamExt as _};
use rtnetlink::{MulticastGroup, new_multicast_connection};
use std::pin::Pin;

/// A subscription; it ends when it is dropped.
pub struct AddressWatch {
    news: Pin<Box<dyn Stream<Item = ()> + Send>>,
    task: tokio::task::JoinHandle<()>,
}

impl std::fmt::Debug for AddressWatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressWatch").finish_non_exhaustive()
    }
}

impl AddressWatch {
    /// Subscribes to a namespace's changes. Needs a tokio runtime.
    ///
    /// # Errors
    /// The namespace cannot be entered, or has no netlink socket to give.
    pub fn open(netns: &Netns) -> Result<Self, NetnsError> {
        let runtime = tokio::runtime::Handle::current();
        let (connection, _, messages) = netns
            .run(|| {
                let _in_runtime = runtime.enter();
                new_multicast_connection(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
            })?
            .map_err(|source| NetnsError::Socket { name: netns.name().to_owned(), source })?;
        Ok(Self { news: Box::pin(messages.map(|_| ())), task: tokio::spawn(connection) })
    }

    /// Comes back when something changed since the last time; `false` if nothing will be heard any more, because the
    /// kernel dropped messages or the socket ended: then read the addresses, and subscribe anew.
    pub async fn changed(&mut self) -> bool {
        let heard = self.news.next().await.is_some();
        // One look is enough for all that has come.
        while self.news.next().now_or_never().flatten().is_some() {}
        heard
    }
}

impl Drop for AddressWatch {
    fn drop(&mut self) {
        self.task.abort();
    }
}
