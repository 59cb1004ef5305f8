//! The VMs that the proxy serves, found by guest address without a lock, each with its policy, CA, pins and live
//! connections. Owns the host's and the guests' own addresses too, which no name may lead to.

use crate::{
    config::Limits,
    dns::{flood::Questions, pins::Pins},
    http::burden::Burden,
    intercept::{
        ca::{CaError, VmCa},
        leaf::Leaves,
    },
    place::{Place, Places},
    rate::Rate,
    registry::{Registry, Subject, Ticket},
    secret::{
        known::{Known, Made, Scope, Shelf},
        room::Decoders,
    },
    throttle::Throttle,
    unread::Unread,
    window::Windows,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use std::{
    collections::{HashMap, HashSet},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Instant,
};
use tapgate_model::{Cidr, GuestNet, HostName, Reason, VmId, VmPolicy};
use tokio::sync::Semaphore;

/// A range of addresses that guests have.
pub type HostPrefix = Cidr;

/// One VM as the proxy sees it.
pub(crate) struct VmEntry {
    /// Its addresses.
    pub net: GuestNet,
    /// Its CA, once that is known.
    ca: ArcSwapOption<VmCa>,
    /// What that minted.
    pub leaves: Leaves,
    /// Its policy of the moment.
    pub policy: ArcSwap<VmPolicy>,
    /// What DNS gave it.
    pub pins: Pins,
    /// Its live connections.
    pub live: Arc<Registry>,
    /// What to look for in answers.
    known: ArcSwapOption<Known>,
    /// Where it is shared with the account's other VMs.
    shelf: Arc<Shelf>,
    /// Names being looked up: questions, which are refused when there are too many, and dials, which wait.
    pub dns: Semaphore,
    /// Its questions.
    pub questions: Questions,
    limits: ArcSwap<Limits>,
    /// What it moves.
    pub throttle: Throttle,
    /// Sockets accepted from it and not yet closed.
    open: Places,
    /// Sockets towards upstreams, at rest or not.
    upstreams: Places,
    /// What its HTTP connections may hold unread: towards upstreams, and of its own.
    pub upstream_windows: Windows,
    pub guest_windows: Windows,
    /// Answers that it has not taken, and uploads that no upstream has.
    pub answers: Unread,
    pub uploads: Unread,
    /// Heads and trailers over HTTP/2, either way.
    pub heads: Unread,
    /// Its requests under way.
    pub burden: Burden,
    /// Its answers that have to be decoded.
    pub decoders: Decoders,
    /// New connections.
    arrivals: Rate,
}

impl VmEntry {
    /// What opens its TLS. While there is none, what would have to be opened is refused.
    pub(crate) fn ca(&self) -> Result<Arc<VmCa>, CaError> {
        self.ca.load_full().ok_or(CaError::Unknown)
    }

    /// Takes up a connection that was let out as `subject`. Judged again afterwards, so that a change of the rules
    /// between the decision and this is not missed; the ticket is cancelled already if it no longer stands.
    pub(crate) fn enter(&self, subject: Subject) -> Ticket {
        let ticket = self.live.enter(subject.clone());
        if !subject.stands(&self.policy.load()) {
            ticket.revoked.cancel();
        }
        ticket
    }

    /// What to look for under this policy in an answer of this host, if it is one that can have been sent a value.
    pub(crate) async fn patterns(&self, policy: &VmPolicy, sought: Option<(&HostName, Scope)>) -> Made {
        let Some((host, scope)) = sought.filter(|_| !policy.secrets.is_empty()) else { return Ok(None) };
        let known = self.known.load_full().filter(|known| known.is_of(&policy.secrets));
        let known = known.unwrap_or_else(|| {
            let known = self.shelf.of(&policy.user, &policy.secrets);
            self.known.store(Some(known.clone()));
            known
        });
        known.patterns(host, scope).await
    }

    /// A place for a new connection, unless the VM has too many or opens them too fast.
    pub(crate) fn admit(&self) -> Option<Place> {
        let limits = self.limits.load();
        let slot = self.open.take(limits.connections)?;
        self.arrivals.take(limits.new_per_second, Instant::now()).then_some(slot)
    }

    /// How many questions it may ask in a second.
    pub(crate) fn dns_per_second(&self) -> u32 {
        self.limits.load().dns_per_second
    }

    /// A place for a new socket towards an upstream. One connection can ask for many at a time.
    pub(crate) fn reach(&self) -> Option<Place> {
        self.upstreams.take(self.limits.load().upstreams())
    }

    /// Whether an upstream may be kept at rest: those that are leave half of the places to those in use.
    pub(crate) fn may_rest(&self) -> bool {
        self.upstreams.taken() <= self.limits.load().upstreams() / 2
    }
}

#[derive(Clone, Default)]
struct State {
    by_address: HashMap<IpAddr, Arc<VmEntry>>,
    by_vm: HashMap<VmId, Arc<VmEntry>>,
    host_addresses: HashSet<IpAddr>,
    guest_ranges: Vec<HostPrefix>,
}

/// The table of VMs. Readers never wait; a change is seen whole or not at all.
pub struct PolicyTable {
    state: ArcSwap<State>,
    writing: Mutex<()>,
    limits: Limits,
    shelf: Arc<Shelf>,
}

impl Default for PolicyTable {
    fn default() -> Self {
        Self::new(Limits::default())
    }
}

impl PolicyTable {
    /// An empty table: nobody is served.
    pub fn new(limits: Limits) -> Self {
        Self { state: ArcSwap::default(), writing: Mutex::default(), limits, shelf: Arc::default() }
    }

    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let mut state = State::clone(&self.state.load());
        let result = change(&mut state);
        self.state.store(Arc::new(state));
        result
    }

    /// Serves a VM from now on. Whoever had its addresses or its id before is gone, connections included. Without a CA nothing of
    /// it is opened, nor let past unopened, until [`Self::set_ca`].
    pub fn insert(&self, net: GuestNet, ca: impl Into<Option<Arc<VmCa>>>, policy: Arc<VmPolicy>) {
        let vm = policy.vm.clone();
        let limits = &self.limits;
        let entry = Arc::new(VmEntry {
            net,
            ca: ArcSwapOption::new(ca.into()),
            leaves: Leaves::default(),
            policy: ArcSwap::new(policy),
            pins: Pins::new(limits.pins),
            live: Arc::default(),
            known: ArcSwapOption::empty(),
            shelf: self.shelf.clone(),
            dns: Semaphore::new(limits.dns_in_flight),
            questions: Questions::new(limits.dns_per_second),
            limits: ArcSwap::from_pointee(*limits),
            throttle: Throttle::new(limits.octets_per_second),
            open: Places::default(),
            upstreams: Places::default(),
            upstream_windows: Windows::default(),
            guest_windows: Windows::default(),
            answers: Unread::default(),
            uploads: Unread::default(),
            heads: Unread::default(),
            burden: Burden::default(),
            decoders: Decoders::default(),
            arrivals: Rate::new(limits.new_per_second),
        });
        let gone = self.change(|state| {
            let gone = take(state, |old| old.policy.load().vm == vm || overlaps(&old.net, &net));
            state.by_address.insert(net.v4.into(), entry.clone());
            if let Some(v6) = net.v6 {
                state.by_address.insert(v6.into(), entry.clone());
            }
            state.by_vm.insert(vm.clone(), entry);
            gone
        });
        gone.iter().for_each(|old| old.live.cut_all());
    }

    /// Gives a VM its CA that could not be read when it was inserted. Returns whether the VM is known.
    pub fn set_ca(&self, vm: &VmId, ca: Arc<VmCa>) -> bool {
        let state = self.state.load();
        let Some(entry) = state.by_vm.get(vm) else { return false };
        entry.ca.store(Some(ca));
        true
    }

    /// Puts a newer policy of a VM in force, and cuts what it no longer allows. An older generation is ignored.
    /// Returns whether the VM is known.
    pub fn update(&self, policy: Arc<VmPolicy>) -> bool {
        // Under the writers' lock, so that of two updates the newer generation stays.
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let state = self.state.load();
        let Some(entry) = state.by_vm.get(&policy.vm) else { return false };
        if entry.policy.load().generation <= policy.generation {
            entry.policy.store(policy.clone());
            // Values that were taken away are not kept for a request that may never come. Answers under way have their own hold.
            if entry.known.load().as_ref().is_some_and(|known| !known.is_of(&policy.secrets)) {
                entry.known.store(None);
            }
            entry.live.rejudge(&policy);
        }
        true
    }

    /// Gives one VM other bounds than the table's: connections and rates from now on, for live connections too; what was
    /// made for the VM when it was inserted (questions in flight, pins) stays. Returns whether the VM is known.
    pub fn limit(&self, vm: &VmId, limits: Limits) -> bool {
        let state = self.state.load();
        let Some(entry) = state.by_vm.get(vm) else { return false };
        entry.limits.store(Arc::new(limits));
        entry.throttle.set(limits.octets_per_second);
        true
    }

    /// Stops serving a VM and cuts its connections.
    pub fn remove(&self, vm: &VmId) {
        let gone = self.change(|state| take(state, |old| old.policy.load().vm == *vm));
        gone.iter().for_each(|old| old.live.cut_all());
    }

    /// The host's own addresses: no name or rule leads a guest there.
    pub fn set_host_addresses(&self, addresses: &[IpAddr]) {
        self.change(|state| {
            state.host_addresses = addresses.iter().map(IpAddr::to_canonical).collect();
        });
        self.leave_local();
    }

    /// The ranges that guests' addresses come from: no name or rule leads a guest to another.
    pub fn set_guest_range(&self, ranges: &[HostPrefix]) {
        self.change(|state| state.guest_ranges = ranges.to_vec());
        self.leave_local();
    }

    /// Cuts what leads to an address that has become the host's or a guest's.
    fn leave_local(&self) {
        for entry in self.state.load().by_vm.values() {
            entry.live.leave(|address| self.refuse_local(address).is_err());
        }
    }

    /// The VM with this address.
    pub(crate) fn by_address(&self, guest: IpAddr) -> Option<Arc<VmEntry>> {
        self.state.load().by_address.get(&guest.to_canonical()).cloned()
    }

    /// Whether the address is the host's or a guest's: facts of this host that no policy knows.
    pub(crate) fn refuse_local(&self, address: IpAddr) -> Result<(), Reason> {
        let address = address.to_canonical();
        let state = self.state.load();
        if state.host_addresses.contains(&address) {
            return Err(Reason::HostAddress);
        }
        let guest = state.by_address.contains_key(&address)
            || state.guest_ranges.iter().any(|range| range.contains(address));
        if guest { Err(Reason::OtherVm) } else { Ok(()) }
    }

    /// The policy that is in force for the VM, if it is served.
    pub fn policy(&self, vm: &VmId) -> Option<Arc<VmPolicy>> {
        let state = self.state.load();
        state.by_vm.get(vm).map(|entry| entry.policy.load_full())
    }

    /// How many connections of the VM are open.
    pub fn open_connections(&self, vm: &VmId) -> usize {
        let state = self.state.load();
        state.by_vm.get(vm).map_or(0, |entry| entry.live.len())
    }
}

fn overlaps(a: &GuestNet, b: &GuestNet) -> bool {
    a.v4 == b.v4 || a.v6.is_some() && a.v6 == b.v6
}

fn take(state: &mut State, fits: impl Fn(&VmEntry) -> bool) -> Vec<Arc<VmEntry>> {
    let mut gone = Vec::new();
    state.by_vm.retain(|_, entry| {
        let stays = !fits(entry);
        if !stays {
            gone.push(entry.clone());
        }
        stays
    });
    state.by_address.retain(|_, entry| !fits(entry));
    gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::substitute::tests::policy;
    use std::net::Ipv4Addr;

    #[tokio::test]
    async fn values_that_were_taken_away_are_not_kept() {
        let table = PolicyTable::default();
        let first = Arc::new(policy(&[("s", "a-real-value", &["*"])]));
        let net = GuestNet::new(0, Ipv4Addr::new(10, 214, 0, 0), None);
        table.insert(net, Arc::new(VmCa::generate(&first.vm).unwrap()), first.clone());
        let entry = table.by_address(net.v4.into()).unwrap();
        let patterns =
            entry.patterns(&first, Some((&"a.example".parse().unwrap(), Scope::Applying))).await.unwrap();
        let known = Arc::downgrade(&entry.known.load_full().unwrap());
        let rules = VmPolicy { generation: first.generation + 1, ..VmPolicy::clone(&first) };
        table.update(Arc::new(rules));
        assert!(known.upgrade().is_some(), "the secrets are the same");
        let none = VmPolicy { secrets: [].into(), generation: 9, ..VmPolicy::clone(&first) };
        table.update(Arc::new(none));
        assert!(known.upgrade().is_none(), "values of a secret that is gone");
        // An answer under way is cleaned of them all the same.
        assert!(patterns.unwrap().clean_whole(b"a-real-value").is_some());
    }
}
