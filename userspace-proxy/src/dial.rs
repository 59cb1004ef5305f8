//! The only place that opens upstream sockets: resolves the decided name itself, and checks every address right
//! before connecting to it, so that there is no window for rebinding.

use crate::{
    decide::Route,
    registry::Ticket,
    resolve::Resolve,
    socket::Socket,
    table::{PolicyTable, VmEntry},
};
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use std::{
    io,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tapgate_model::{HostName, Reason, VmPolicy};
use tokio::{
    net::TcpStream,
    time::{sleep, timeout},
};

/// How long one address is waited for before the next is tried beside it (RFC 8305 §5).
const STAGGER: Duration = Duration::from_millis(250);
/// Most addresses of one name that are tried.
const MOST: usize = 8;

/// Why nothing was reached.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DialError {
    /// The address is one that may not be dialled.
    #[error("the address is one that no VM may reach")]
    Refused(Reason),
    /// The name does not resolve.
    #[error("the name does not resolve; check its spelling and the daemon's resolvers")]
    Unresolved,
    /// The VM has as many sockets towards upstreams, or lookups under way, as it may.
    #[error("this VM has too many connections to upstreams, or looks up too many names at a time")]
    Limit,
    /// Nothing answered.
    #[error("the upstream could not be reached: {0}")]
    Unreachable(io::Error),
}

impl DialError {
    /// The word for the audit.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            Self::Refused(reason) => *reason,
            Self::Unresolved => Reason::Unresolved,
            Self::Limit => Reason::Limit,
            Self::Unreachable(_) => Reason::Unreachable,
        }
    }
}

/// Opens upstream connections.
#[derive(Clone)]
pub(crate) struct Dialer {
    pub(crate) resolve: Resolve,
    pub(crate) table: Arc<PolicyTable>,
    pub(crate) patience: Duration,
}

impl Dialer {
    /// Whether this address may be dialled for a name, now.
    pub(crate) fn admits(&self, policy: &VmPolicy, address: IpAddr) -> Result<(), Reason> {
        policy.admits_resolved(address)?;
        self.table.refuse_local(address)
    }

    /// Notes on the ticket where its connection leads, and judges that once more by what holds now: a change between the
    /// dial and this is not missed, nor one after it.
    pub(crate) fn enter(&self, entry: &VmEntry, ticket: &Ticket, address: IpAddr) -> Result<(), DialError> {
        ticket.leads_to(address);
        self.admits(&entry.policy.load(), address).map_err(DialError::Refused)
    }

    /// Connects to where the decision leads, by the policy of the moment. `to` is what the guest chose: its port, and its address only for
    /// [`Route::Address`].
    pub(crate) async fn dial(
        &self,
        entry: &VmEntry,
        route: &Route,
        to: SocketAddr,
    ) -> Result<(Socket, SocketAddr), DialError> {
        let attempt = async {
            let candidates = match route {
                Route::Name(name) => self.candidates(entry, name).await?,
                Route::Address => {
                    self.admits(&entry.policy.load(), to.ip()).map_err(DialError::Refused)?;
                    vec![to.ip()]
                }
            };
            self.race(entry, candidates, to.port()).await
        };
        let late = || DialError::Unreachable(io::ErrorKind::TimedOut.into());
        timeout(self.patience, attempt).await.unwrap_or_else(|_| Err(late()))
    }

    /// The name's addresses that may be dialled.
    async fn candidates(&self, entry: &VmEntry, name: &HostName) -> Result<Vec<IpAddr>, DialError> {
        let all = self.addresses(entry, name).await?;
        let policy = entry.policy.load();
        let admitted: Vec<_> =
            all.iter().copied().filter(|a| self.admits(&policy, *a).is_ok()).take(MOST).collect();
        match (admitted.is_empty(), all.is_empty()) {
            (true, true) => Err(DialError::Unresolved),
            (true, false) => Err(DialError::Refused(Reason::Rebinding)),
            (false, _) => Ok(admitted),
        }
    }

    /// The name's addresses, once it is the VM's turn: one VM's lookups never keep others' from being sent.
    async fn addresses(&self, entry: &VmEntry, name: &HostName) -> Result<Vec<IpAddr>, DialError> {
        // Half of the patience, so that it is told apart from an upstream that does not answer.
        let Ok(Ok(_turn)) = timeout(self.patience / 2, entry.dns.acquire()).await else {
            return Err(DialError::Limit);
        };
        self.resolve.addresses(name).await.map_err(|_| DialError::Unresolved)
    }

    /// Whether the name resolves to this very address: what binds a name to an address that a `cidr` rule allows.
    pub(crate) async fn leads_to(&self, entry: &VmEntry, name: &HostName, address: IpAddr) -> bool {
        let resolved = timeout(self.patience, self.addresses(entry, name)).await;
        matches!(resolved, Ok(Ok(all)) if all.contains(&address.to_canonical()))
    }

    async fn race(
        &self,
        entry: &VmEntry,
        candidates: Vec<IpAddr>,
        port: u16,
    ) -> Result<(Socket, SocketAddr), DialError> {
        let mut last = DialError::Unreachable(io::ErrorKind::AddrNotAvailable.into());
        let mut candidates = candidates.into_iter();
        let mut attempts = FuturesUnordered::new();
        loop {
            if let Some(address) = candidates.next() {
                attempts.push(self.connect(entry, SocketAddr::new(address, port)));
            } else if attempts.is_empty() {
                return Err(last);
            }
            let more = candidates.len() > 0;
            tokio::select! {
                Some(result) = attempts.next() => match result {
                    Ok(connected) => return Ok(connected),
                    Err(error) => last = error,
                },
                () = sleep(STAGGER), if more => {}
            }
        }
    }

    async fn connect(&self, entry: &VmEntry, to: SocketAddr) -> Result<(Socket, SocketAddr), DialError> {
        self.admits(&entry.policy.load(), to.ip()).map_err(DialError::Refused)?;
        let place = entry.reach().ok_or(DialError::Limit)?;
        let stream = TcpStream::connect(to).await.map_err(DialError::Unreachable)?;
        crate::io::tune(&stream);
        Ok((Socket::new(stream, place), to))
    }
}
