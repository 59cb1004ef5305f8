//! The engine: the only place that knows all parts. It brings every VM to the state that the records ask for, carries
//! policy to where it is enforced, and the datapath's events to the audit log.
//!
//! It acts on what the store says and on nothing else: whoever wants something writes it there first and wakes the
//! engine. Must never boot a VM without its gate, nor hold a policy of its own.

mod adopting;
pub(crate) mod agents;
mod backoff;
mod called;
mod enforcer;
mod events;
mod files;
mod gates;
mod guests;
pub mod handle;
mod held;
mod host;
mod life;
mod meters;
mod policy;
mod round;
mod snapshots;
mod sources;
pub(crate) mod ssh;
mod staged;
pub(crate) mod strays;
mod suspend;
mod takeover;
mod taking;
mod turns;
mod uploads;
mod watching;

pub(crate) use guests::Guests;
pub use handle::{Command, Handle, NotInForce, Notifier, Scope};
pub use meters::VmCounters;

use crate::{
    capacity::Room,
    config::Config,
    parts::{self, RunningParts},
    storage::Storage,
};
use adopting::Adopting;
use gates::Gates;
pub use held::Held;
use round::Round;
use staged::Staged;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use taking::Taking;
use tapgate_datapath::Datapath;
use tapgate_model::{GuestNet, StatusDetail, VmId, VmPolicy};
use tapgate_proxy::PolicyTable;
use tapgate_store::{Store, StoreError, VmRecord};
use tapgate_vmm::{Running, Vmm, image::Image};
use tokio::{
    runtime::Handle as Runtime,
    sync::{Notify, Semaphore, mpsc, watch},
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// For the engine's parts, once the VMs' tasks have ended.
const DRAIN: Duration = Duration::from_secs(5);

/// Everything that a VM's task needs.
pub(crate) struct Shared {
    pub config: Config,
    pub store: Store,
    pub datapath: Datapath,
    pub table: Arc<PolicyTable>,
    pub driver: Arc<dyn Vmm>,
    /// The base image; the namespace driver has none.
    pub image: Option<Image>,
    pub notifier: Notifier,
    pub stop: CancellationToken,
    /// The VMs that have a gate now.
    gates: Mutex<Gates>,
    /// Those that a former daemon left and that have none yet.
    adopting: Adopting,
    /// Where it is asked that all that VMs tried be told.
    settle: mpsc::Sender<events::Settle>,
    /// Held while policies are read and installed: of two changes the newer one stays.
    installing: tokio::sync::Mutex<()>,
    /// Policies that are not in force yet.
    changes: enforcer::Changes,
    /// The VMs whose snapshots are being taken.
    taking: Taking<Arc<dyn Running>>,
    /// The guests that are held meanwhile.
    held: Held,
    /// Rises with every change of an environment.
    news: watch::Sender<u64>,
    /// Where snapshots are stored.
    pub storage: Storage,
    /// What is free on the host's disk and promised to nobody.
    pub room: Room,
    /// What is promised to snapshots until they are stored.
    staged: Staged,
    /// How many VMs may be started at once.
    boots: Semaphore,
    /// Something is to be stored.
    uploads: Notify,
    /// Something is to be removed from where it was stored.
    collects: Notify,
    /// When guests sent their agents' logs last.
    logs: Mutex<HashMap<VmId, Instant>>,
}

impl Shared {
    /// The VM's place in the network.
    pub fn net(&self, record: &VmRecord) -> GuestNet {
        GuestNet::new(record.slot, self.config.v4_base(), self.config.v6_base())
    }

    /// The policy that the records put in force for the VM.
    pub async fn policy_of(&self, record: &VmRecord) -> Result<VmPolicy, StoreError> {
        policy::read(self, &record.user, &record.id).await
    }

    fn gates(&self) -> MutexGuard<'_, Gates> {
        self.gates.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the engine joins.
pub struct Parts {
    /// The checked configuration.
    pub config: Config,
    /// The records.
    pub store: Store,
    /// Taps, programs, maps.
    pub datapath: Datapath,
    /// What the proxy decides by.
    pub table: Arc<PolicyTable>,
    /// What runs the guests.
    pub driver: Arc<dyn Vmm>,
    /// The base image; the namespace driver has none.
    pub image: Option<Image>,
    /// Where snapshots are stored.
    pub storage: Storage,
    /// How much of the host's disk may be taken; the API looks at the same.
    pub room: Room,
    /// How waiting requests hear of changes.
    pub notifier: Notifier,
    /// Ends the engine; VMs run on.
    pub stop: CancellationToken,
}

/// Why the engine ended that was not told to.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum EngineError {
    /// The records cannot be read at start.
    #[error(transparent)]
    Records(#[from] StoreError),
    /// What it does beside the VMs has stopped.
    #[error("{0}")]
    Ended(String),
}

/// The running engine.
pub struct Engine {
    shared: Arc<Shared>,
    /// What runs as long as the engine.
    parts: RunningParts,
    /// The VMs'.
    tasks: TaskTracker,
    wakers: HashMap<VmId, Arc<Notify>>,
    /// Until the events are read.
    settle: Option<mpsc::Receiver<events::Settle>>,
    /// Held by whoever has not yet looked at a VM that ran under a former daemon.
    looking: Option<Looking>,
}

/// What the first look at each VM holds; once all are dropped, the records say what is.
type Looking = mpsc::Sender<std::convert::Infallible>;

impl Engine {
    /// Takes the opened parts.
    pub fn new(parts: Parts) -> Self {
        let Parts { config, store, datapath, table, driver, image, storage, room, notifier, stop } = parts;
        let (settle, settled) = mpsc::channel(64);
        let shared = Shared {
            settle,
            config,
            store,
            datapath,
            table,
            driver,
            image,
            notifier,
            stop,
            gates: Mutex::default(),
            adopting: Adopting::default(),
            installing: tokio::sync::Mutex::default(),
            changes: enforcer::Changes::default(),
            taking: Taking::default(),
            held: Held::default(),
            news: watch::Sender::new(0),
            storage,
            boots: Semaphore::new(std::thread::available_parallelism().map_or(2, usize::from).max(2)),
            room,
            staged: Staged::default(),
            uploads: Notify::new(),
            collects: Notify::new(),
            logs: Mutex::default(),
        };
        let shared = Arc::new(shared);
        shared.notifier.meters.connect(&shared);
        Self {
            parts: RunningParts::new(shared.stop.clone()),
            shared,
            tasks: TaskTracker::new(),
            wakers: HashMap::new(),
            settle: Some(settled),
            looking: None,
        }
    }

    /// Adopts what a former daemon left, then serves commands until told to stop. VMs keep running afterwards.
    ///
    /// # Errors
    /// The records cannot be read at start; or a part of the engine ended, without which it would only look alive.
    pub async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) -> Result<(), EngineError> {
        let living = self.shared.store.vms_living().await?;
        strays::end(&self.shared, &living).await;
        let keep: Vec<GuestNet> = living.iter().map(|record| self.shared.net(record)).collect();
        match self.shared.datapath.detach_others(&keep).await {
            Ok(gone) if gone.is_empty() => {}
            Ok(gone) => tracing::warn!(slots = ?gone, "engine.leftovers_removed"),
            Err(error) => tracing::error!(%error, "engine.leftovers_not_removed"),
        }
        let ran = |detail| matches!(detail, StatusDetail::Running | StatusDetail::Ready);
        // In the middle of a start it may have run as well.
        let half = |detail| matches!(detail, StatusDetail::Starting | StatusDetail::Stopping);
        let left = living.iter().filter(|one| ran(one.detail) || half(one.detail));
        self.shared.adopting.begin(left.map(|one| one.id.clone()));
        if let Some(settle) = self.settle.take() {
            let (pump, runtime) = (events::pump(self.shared.clone(), settle), Runtime::current());
            self.parts.spawn("pump of events", tokio::task::spawn_blocking(move || runtime.block_on(pump)));
        }
        self.parts.spawn("keeper of snapshots", parts::never_fails(uploads::keep_store(self.shared.clone())));
        self.parts.spawn("enforcer of policies", parts::never_fails(enforcer::enforce(self.shared.clone())));
        self.parts.spawn("opener of closed VMs", parts::never_fails(enforcer::reopen(self.shared.clone())));
        let looking = self.looking.take();
        for record in living {
            self.wake(record.id, looking.clone().filter(|_| ran(record.detail)));
        }
        drop(looking);
        let stop = self.shared.stop.clone();
        let mut told_of = Vec::new();
        loop {
            let told = tokio::select! {
                () = stop.cancelled() => break,
                why = self.parts.ended() => match stop.is_cancelled() {
                    true => break,
                    false => return Err(EngineError::Ended(why)),
                },
                told = commands.recv_many(&mut told_of, round::MOST) => told,
            };
            if told == 0 {
                break;
            }
            let round = Round::of(told_of.drain(..));
            for vm in round.vms {
                self.wake(vm, None);
            }
            if round.snapshots {
                self.shared.collects.notify_one();
            }
            if round.policies > 0 {
                self.shared.changes.tell(round.scopes, round.policies);
            }
            if round.news {
                self.shared.news.send_modify(|news| *news = news.wrapping_add(1));
            }
        }
        self.tasks.close();
        self.tasks.wait().await;
        self.parts.end(DRAIN, || self.shared.held.any()).await;
        Ok(())
    }

    /// What the guest service may ask.
    pub(crate) fn guests(&self) -> Guests {
        Guests::new(self.shared.clone())
    }

    /// Hands the host's addresses to those who keep guests from them, now and whenever they change.
    ///
    /// # Errors
    /// The addresses cannot be read or handed over.
    pub async fn watch_host_addresses(&mut self) -> Result<(), host::HostError> {
        let known = host::hand_over(&self.shared).await?;
        let watch = host::watch(self.shared.clone(), known);
        self.parts.spawn("watch over the host's addresses", parts::never_fails(watch));
        Ok(())
    }

    /// The guests that are held at any time.
    pub fn held(&self) -> Held {
        self.shared.held.clone()
    }

    /// Ends when each VM that ran under a former daemon was looked at: adopted, or its record says that it is started anew.
    /// To be asked for before the engine runs.
    pub fn looked(&mut self) -> impl Future<Output = ()> + use<> {
        let (looking, mut done) = mpsc::channel(1);
        self.looking = Some(looking);
        async move {
            let _ = done.recv().await;
        }
    }

    fn wake(&mut self, vm: VmId, looking: Option<Looking>) {
        // A waker that only this map still holds belonged to a task that has ended.
        self.wakers.retain(|_, waker| Arc::strong_count(waker) > 1);
        let waker = self.wakers.entry(vm.clone()).or_insert_with(|| {
            let waker = Arc::new(Notify::new());
            self.tasks.spawn(life::drive(self.shared.clone(), vm, waker.clone(), looking));
            waker
        });
        waker.notify_one();
    }
}

/// The wall clock as audit events carry it: microseconds since the Unix epoch, 0 for a clock before it.
fn now_us() -> i64 {
    std::time::SystemTime::now()
        .duration_since(std::time::UNIX_EPOCH)
        .map_or(0, |since| i64::try_from(since.as_micros()).unwrap_or(i64::MAX))
}
