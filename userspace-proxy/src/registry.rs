//! The live connections of one VM and what each was let out as, so that a change of the rules cuts those that they no
//! longer allow. Must never keep a connection alive: it holds tokens, not sockets.

use std::{
    collections::HashMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};
use tapgate_model::{HostName, VmPolicy};
use tokio::sync::{OwnedSemaphorePermit, watch};
use tokio_util::sync::CancellationToken;

/// What a connection was let out as.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Subject {
    /// A name, unopened: also cut when a secret could apply from now on, for it would not be put in.
    Spliced(HostName),
    /// A name, opened or in the clear: secrets are looked up for each request.
    Opened(HostName),
    /// An address that no name stands for.
    Address(IpAddr),
    /// An address that is allowed, by TLS that names a host and is not opened: also cut when a secret comes to be for the host.
    Unopened(HostName, IpAddr),
    /// An address that DNS gave for a name.
    Pinned(HostName, IpAddr),
    /// The same by TLS that names no host: also cut when a secret comes to be for the name.
    PinnedTls(HostName, IpAddr),
}

impl Subject {
    /// Whether the policy still lets it out.
    pub(crate) fn stands(&self, policy: &VmPolicy) -> bool {
        match self {
            Self::Spliced(name) => {
                let verdict = policy.decide_host(name);
                verdict.passes() && !(verdict.is_allowed() && policy.could_inject(name))
            }
            Self::Opened(name) => policy.decide_host(name).passes(),
            Self::Address(address) => policy.decide_address(*address).passes(),
            Self::Unopened(name, address) => {
                policy.decide_address(*address).passes() && !policy.could_inject(name)
            }
            Self::Pinned(name, address) => {
                policy.decide_address(*address).passes() || pin_stands(policy, name, *address)
            }
            Self::PinnedTls(name, address) => {
                policy.decide_address(*address).passes()
                    || pin_stands(policy, name, *address) && !policy.could_inject(name)
            }
        }
    }
}

fn pin_stands(policy: &VmPolicy, name: &HostName, address: IpAddr) -> bool {
    policy.decide_host(name).is_allowed() && policy.admits_resolved(address).is_ok()
}

#[derive(Default)]
struct Live {
    next: u64,
    closed: bool,
    open: HashMap<u64, Open>,
}

struct Open {
    subject: Subject,
    /// Where it leads, once that was dialled.
    address: Option<IpAddr>,
    revoked: CancellationToken,
}

impl Open {
    /// Whether the policy still lets it out, to where it leads: a name is no leave for every address.
    fn stands(&self, policy: &VmPolicy) -> bool {
        self.subject.stands(policy)
            && self.address.is_none_or(|address| policy.admits_resolved(address).is_ok())
    }
}

/// The connections of one VM.
#[derive(Default)]
pub(crate) struct Registry {
    live: Mutex<Live>,
    /// Told whenever some were cut.
    cuts: watch::Sender<()>,
}

impl Registry {
    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up a connection; it is forgotten when the ticket is dropped.
    pub(crate) fn enter(self: &Arc<Self>, subject: Subject) -> Ticket {
        let revoked = CancellationToken::new();
        let mut live = self.lock();
        let key = live.next;
        live.next += 1;
        if live.closed {
            revoked.cancel();
        }
        live.open.insert(key, Open { subject, address: None, revoked: revoked.clone() });
        Ticket {
            registry: self.clone(),
            key,
            revoked,
            expired: AtomicBool::new(false),
            held: OnceLock::new(),
        }
    }

    /// Cuts every connection that the policy no longer lets out.
    pub(crate) fn rejudge(&self, policy: &VmPolicy) {
        self.cut(|open| !open.stands(policy));
    }

    /// Cuts every connection that leads to one of these addresses.
    pub(crate) fn leave(&self, which: impl Fn(IpAddr) -> bool) {
        self.cut(|open| open.address.is_some_and(&which));
    }

    /// Cuts all, and whatever comes later.
    pub(crate) fn cut_all(&self) {
        self.lock().closed = true;
        self.cut(|_| true);
    }

    fn cut(&self, which: impl Fn(&Open) -> bool) {
        self.lock().open.values().filter(|open| which(open)).for_each(|open| open.revoked.cancel());
        self.cuts.send_replace(());
    }

    /// Hears of it whenever some may have been cut.
    pub(crate) fn cuts(&self) -> watch::Receiver<()> {
        self.cuts.subscribe()
    }

    /// How many are open.
    pub(crate) fn len(&self) -> usize {
        self.lock().open.len()
    }
}

/// A connection's place in the registry.
pub(crate) struct Ticket {
    registry: Arc<Registry>,
    key: u64,
    /// Cancelled when the rules no longer allow the connection, or when it expired.
    pub revoked: CancellationToken,
    expired: AtomicBool,
    /// What goes back to its VM with it.
    held: OnceLock<OwnedSemaphorePermit>,
}

impl Ticket {
    /// Keeps what its request takes of its VM's share, until it has ended.
    pub(crate) fn hold(&self, permit: OwnedSemaphorePermit) {
        // There is one request to a ticket.
        let _ = self.held.set(permit);
    }

    /// Ends it as the rules would: nothing moves on it any more.
    pub(crate) fn expire(&self) {
        self.expired.store(true, Ordering::Release);
        self.revoked.cancel();
    }

    /// Whether that was its end, and not the rules.
    pub(crate) fn is_expired(&self) -> bool {
        self.expired.load(Ordering::Acquire)
    }

    /// Notes where the connection leads: from here on it is cut, too, when that may not be reached any more.
    pub(crate) fn leads_to(&self, address: IpAddr) {
        if let Some(open) = self.registry.lock().open.get_mut(&self.key) {
            open.address = Some(address);
        }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.registry.lock().open.remove(&self.key);
    }
}
