//! The datapath: the egress namespace, the BPF programs on each guest's tap, and what fills and reads their maps.
//!
//! Everything that lets a frame out lives in the kernel, pinned: the daemon's death changes nothing, and the next daemon
//! adopts it. Must never set a tap up before its programs are attached, and knows nothing of names, HTTP or SQL.
#![deny(unsafe_code)]

mod attempts;
mod bpffs;
mod config;
mod counters;
mod cut;
mod error;
mod events;
mod gate;
mod groups;
mod hook;
mod layout;
#[cfg(feature = "bpf-log")]
mod logs;
mod objects;
mod requirements;
mod rules;
mod slots;
mod spare;
mod sweep;
mod taps;
mod world;

pub use config::{DatapathConfig, MAX_FLOW_RATE, Range};
pub use counters::Counters;
pub use error::DatapathError;
pub use events::{Event, Events, monotonic};
pub use gate::Gate;
pub use hook::Attachment;
pub use requirements::{Requirement, requirements};

use aya::Ebpf;
use objects::Tables;
use slots::Slots;
use std::{
    net::IpAddr,
    os::fd::BorrowedFd,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tapgate_ebpf_common::maps::Listener;
use tapgate_model::{GuestNet, VmPolicy};
use tapgate_netns::Netns;
use tokio::{sync::Notify, task::JoinHandle};

/// The datapath of one daemon instance. Dropping it changes nothing in the kernel; [`Datapath::teardown`] does.
#[derive(Debug)]
pub struct Datapath {
    shared: Arc<Shared>,
    sweeper: JoinHandle<()>,
    spares: JoinHandle<()>,
    logs: Option<JoinHandle<()>>,
}

/// What the methods and the sweeper share.
#[derive(Debug)]
struct Shared {
    config: DatapathConfig,
    egress: Netns,
    host: Netns,
    attachment: Attachment,
    pins: PathBuf,
    state: Mutex<State>,
    /// None once they are to be removed. Locked after `state` by whoever needs both: attaching waits for the kernel, and no
    /// change of a policy waits for that.
    programs: Mutex<Option<Programs>>,
    spare: Mutex<Option<spare::Spare>>,
    spare_taken: Notify,
    changed: Notify,
}

/// The handles of the programs.
pub(crate) struct Programs(Ebpf);

impl std::fmt::Debug for Programs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Programs").finish_non_exhaustive()
    }
}

/// The handles of the maps, and what this daemon knows of its slots.
struct State {
    tables: Tables,
    slots: Slots,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("slots", &self.slots).finish_non_exhaustive()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic in the middle of a change leaves maps that the next change writes anew.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn programs(&self) -> MutexGuard<'_, Option<Programs>> {
        self.programs.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Datapath {
    /// Makes the egress namespace, the uplink, the tables and the programs, or adopts what an earlier daemon left.
    pub async fn open(config: DatapathConfig) -> Result<Self, DatapathError> {
        Self::open_attaching(config, Attachment::best()).await
    }

    /// The same, attaching programs in a way of the caller's choice: for trying out what older kernels do.
    pub async fn open_attaching(
        config: DatapathConfig,
        attachment: Attachment,
    ) -> Result<Self, DatapathError> {
        config.check()?;
        let host = Netns::current()?;
        let egress = world::open(&config, &host).await?;
        let pins = bpffs::prepare(&config.pin_root, &config.instance)?;
        #[cfg_attr(not(feature = "bpf-log"), expect(unused_mut, reason = "only logs are taken out of it"))]
        let (mut programs, mut tables) = objects::load(&pins)?;
        #[cfg(feature = "bpf-log")]
        let logs = logs::forward(&mut programs);
        #[cfg(not(feature = "bpf-log"))]
        let logs = None;
        world::describe(&config, &egress, &mut tables).await?;
        let slots = Slots::adopt(&mut tables)?;
        hook::forget_spares(&pins)?;
        let shared = Arc::new(Shared {
            config,
            egress,
            host,
            attachment,
            pins,
            state: Mutex::new(State { tables, slots }),
            programs: Mutex::new(Some(Programs(programs))),
            spare: Mutex::new(None),
            spare_taken: Notify::new(),
            changed: Notify::new(),
        });
        let sweeper = tokio::spawn(sweep::run(Arc::clone(&shared)));
        let spares = tokio::spawn(spare::run(Arc::clone(&shared)));
        Ok(Self { shared, sweeper, spares, logs })
    }

    /// The egress namespace: where the proxy's listeners are bound and guests are dialled from.
    pub fn egress(&self) -> &Netns {
        &self.shared.egress
    }

    /// How programs are attached by this daemon.
    pub fn attachment(&self) -> Attachment {
        self.shared.attachment
    }

    /// Hands the proxy's listeners of one family to the programs. They must be bound inside the egress namespace,
    /// transparent.
    pub fn set_listeners(
        &self,
        v6: bool,
        tcp: BorrowedFd<'_>,
        dns_udp: BorrowedFd<'_>,
        dns_tcp: BorrowedFd<'_>,
        service: BorrowedFd<'_>,
    ) -> Result<(), DatapathError> {
        let mut state = self.shared.state();
        for (listener, fd) in [
            (Listener::Tcp, tcp),
            (Listener::DnsUdp, dns_udp),
            (Listener::DnsTcp, dns_tcp),
            (Listener::Service, service),
        ] {
            state.tables.set_listener(listener, v6, fd)?;
        }
        Ok(())
    }

    /// Says which addresses are the host's own, so that no guest reaches them. Replaces what was said before.
    pub fn set_host_addresses(&self, addresses: &[IpAddr]) -> Result<(), DatapathError> {
        self.shared.state().tables.set_host_addresses(addresses)
    }

    /// Puts a VM's policy in force with one write; live flows are judged anew and cut if they lost their rule.
    pub fn set_policy(&self, net: GuestNet, policy: &VmPolicy) -> Result<(), DatapathError> {
        self.set_policies(&[(net, policy)]).pop().unwrap_or(Err(DatapathError::NotAttached(net.slot)))
    }

    /// The same for many VMs, each for itself: an answer for each, in their order.
    pub fn set_policies(&self, policies: &[(GuestNet, &VmPolicy)]) -> Vec<Result<(), DatapathError>> {
        let mut state = self.shared.state();
        let State { tables, slots, .. } = &mut *state;
        let done = policies.iter().map(|(net, policy)| slots.set_policy(tables, net, policy)).collect();
        drop(state);
        self.shared.changed.notify_one();
        done
    }

    /// Drops everything of the VM's until it has a policy again: for when one cannot be put in force.
    pub fn shut(&self, net: GuestNet) -> Result<(), DatapathError> {
        let mut state = self.shared.state();
        let State { tables, slots, .. } = &mut *state;
        slots.shut(tables, net.slot)
    }

    /// What a VM sent and was sent, by reason.
    pub fn counters(&self, slot: u32) -> Result<Counters, DatapathError> {
        self.shared.state().tables.counters(slot)
    }

    /// What came from taps that no VM has.
    pub fn stray_counters(&self) -> Result<Counters, DatapathError> {
        self.counters(tapgate_ebpf_common::maps::NO_SLOT)
    }

    /// How many flows of the VM the kernel forwards just now, as far as it has been counted.
    pub fn flows(&self, slot: u32) -> Result<u64, DatapathError> {
        self.shared.state().tables.flows_held(slot)
    }

    /// What VMs tried and the proxy does not see. There is one reader: a second call takes over from the first.
    pub fn events(&self) -> Result<Events, DatapathError> {
        Events::open(Arc::clone(&self.shared))
    }

    /// The slots that the kernel has a VM for, those that no daemon of this life adopted included.
    pub fn slots(&self) -> Result<Vec<u32>, DatapathError> {
        self.shared.state().tables.slots()
    }

    /// Removes every VM, the programs, the uplink, the tables and the namespace.
    pub async fn teardown(self) -> Result<(), DatapathError> {
        self.sweeper.abort();
        self.spares.abort();
        // Whoever is attaching has finished after this, and nobody begins.
        *self.shared.programs() = None;
        *self.shared.spare() = None;
        for slot in self.slots()? {
            self.detach_slot(slot).await?;
        }
        world::close(&self.shared.config, &self.shared.host).await?;
        bpffs::remove(&self.shared.config.pin_root, &self.shared.config.instance)?;
        Ok(())
    }
}

impl Drop for Datapath {
    fn drop(&mut self) {
        self.sweeper.abort();
        self.spares.abort();
        if let Some(logs) = &self.logs {
            logs.abort();
        }
    }
}
