//! One task a VM: brings it from the state in the records to the next, and watches it while it runs.
//!
//! Each state is in the records before it is acted on, so after a crash the task goes on where the records say. What a
//! user asks comes in by the records too; the waker only says that they changed.

use super::{
    Shared, backoff::Backoff, called::unless_called, events, files, gates::Gated, policy, snapshots, ssh,
    suspend, takeover, watching,
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tapgate_fault::point;
use tapgate_model::{GuestNet, StatusDetail as S, VmId};
use tapgate_proxy::VmCa;
use tapgate_store::{StoreError, VmRecord};
use tapgate_vmm::{Handle, Running};
use tokio::sync::{Notify, SemaphorePermit};

/// For gate and VMM to be there; the guest's own boot comes after.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);
/// The same where a memory is read as well: five minutes for that, one for a clone to become someone else.
const RESUME_TIMEOUT: Duration = Duration::from_secs(480);
/// For a snapshot to come from its store, and for a disk to be made of it.
const DISK_TIMEOUT: Duration = Duration::from_secs(3600);
/// For a VM that is to be stopped to be taken up first, so that its guest can be asked to shut down.
const STOP_PATIENCE: Duration = Duration::from_secs(30);
/// How often a start is tried: what kept the first from it (a port, a process that was just ending) may be gone.
const BOOTS: u32 = 2;
/// For the guest to shut itself down when asked to.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);
/// After the records could not be read or written.
const RETRY: Duration = Duration::from_secs(1);

/// A VM that runs: the machine, and the port that leads to it.
pub(super) struct Live {
    pub(super) machine: Arc<dyn Running>,
    _forward: ssh::Forward,
}

impl Live {
    pub(super) fn new(machine: Box<dyn Running>, forward: ssh::Forward) -> Self {
        Self { machine: machine.into(), _forward: forward }
    }
}

/// Brings the VM through its states until it is destroyed or the daemon stops. Lets go of `looking` once the records say
/// what has become of it.
pub(super) async fn drive(
    shared: Arc<Shared>,
    vm: VmId,
    waker: Arc<Notify>,
    mut looking: Option<super::Looking>,
) {
    let mut live: Option<Live> = None;
    // Why it failed, until what is left of it has ended.
    let mut failed: Option<String> = None;
    let mut backoff = Backoff::new();
    loop {
        let record = match shared.store.vm_any(&vm).await {
            Ok(record) => record,
            Err(StoreError::NotFound(_)) => return shared.adopting.done(&vm),
            Err(error) => {
                tracing::error!(%vm, %error, "vm.record_unreadable");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let step = if let Some(reason) = failed.take() {
            Err(Halt::Failed(reason))
        } else if suspend::wanted(&record) && live.is_some() {
            // Cut off in the middle it would leave the guest held until there is a daemon again.
            step(&shared, &record, &mut live, &waker).await
        } else {
            tokio::select! {
                () = shared.stop.cancelled() => return snapshots::let_go(&shared, &vm).await,
                step = step(&shared, &record, &mut live, &waker) => step,
            }
        };
        let left = match step {
            Ok(Next::Again) => None,
            Ok(Next::Enter(state)) => {
                advance(&shared, &vm, state, None).await;
                None
            }
            Ok(Next::End) => return shared.adopting.done(&vm),
            Err(Halt::Left(what)) => Some(what),
            Err(Halt::Failed(reason)) => {
                tracing::error!(%vm, state = record.detail.word(), %reason, "vm.failed");
                match release(&shared, &record, live.take()).await {
                    Ok(()) => {
                        advance(&shared, &vm, S::Failed, Some(reason)).await;
                        None
                    }
                    Err(Left(what)) => {
                        failed = Some(reason);
                        Some(what)
                    }
                }
            }
        };
        drop(looking.take());
        shared.adopting.done(&vm);
        let Some(reason) = left else {
            backoff = Backoff::new();
            continue;
        };
        let pause = backoff.pause();
        tracing::error!(%vm, state = record.detail.word(), %reason, again_in_s = pause.as_secs(), "vm.left");
        tokio::select! {
            () = shared.stop.cancelled() => return snapshots::let_go(&shared, &vm).await,
            () = tokio::time::sleep(pause) => {}
        }
    }
}

/// Why a step came to no end.
pub(super) enum Halt {
    /// The VM has failed.
    Failed(String),
    /// Something of it is still there: the state stays what it is until that is gone.
    Left(String),
}

impl From<String> for Halt {
    fn from(reason: String) -> Self {
        Self::Failed(reason)
    }
}

/// What may still run of a VM that was to be ended, or why that is not known.
pub(super) struct Left(String);

impl From<Left> for Halt {
    fn from(Left(what): Left) -> Self {
        Self::Left(what)
    }
}

/// What comes after a step.
pub(super) enum Next {
    /// Look at the records again.
    Again,
    /// The step is done; the VM is in this state now.
    Enter(S),
    /// There is nothing left to do for this VM.
    End,
}

/// Writes the state down. If a user's call came in between, the records stand and the next round sees them.
async fn advance(shared: &Shared, vm: &VmId, to: S, failure: Option<String>) {
    loop {
        match shared.store.vm_advance(vm, to, failure.clone()).await {
            Ok(_) => {
                point(&format!("state.{}", to.word()));
                tracing::info!(%vm, state = to.word(), "vm.state");
                break;
            }
            Err(StoreError::Illegal { from, .. }) => {
                tracing::debug!(%vm, from, to = to.word(), "vm.state_overtaken");
                break;
            }
            Err(StoreError::NotFound(_)) => break,
            Err(error) => {
                tracing::error!(%vm, %error, "vm.record_unwritable");
                tokio::time::sleep(RETRY).await;
            }
        }
    }
    shared.notifier.changed(vm.clone());
}

async fn step(
    shared: &Arc<Shared>,
    record: &VmRecord,
    live: &mut Option<Live>,
    waker: &Notify,
) -> Result<Next, Halt> {
    match record.detail {
        S::Queued => Ok(Next::Enter(S::Creating)),
        S::Creating => match unless_called(shared, record, waker, provide(shared, record)).await {
            Some(provided) => provided.map(|()| Next::Enter(S::Starting)).map_err(Halt::Failed),
            None => Ok(Next::Again),
        },
        S::Starting => {
            // A start that a crash cut short may have left a VMM: it goes before its successor comes.
            release(shared, record, live.take()).await?;
            let prepared = async {
                // One that failed before it had a disk has to get the one that it was to have, and no other.
                provide(shared, record).await?;
                turn(shared, record).await
            };
            let Some(turn) = unless_called(shared, record, waker, prepared).await else {
                return Ok(Next::Again);
            };
            let _turn = turn?;
            *live = Some(start(shared, record).await?);
            Ok(Next::Enter(S::Running))
        }
        S::Running | S::Ready => match live {
            Some(current) => {
                snapshots::take_up(shared, &record.id, current.machine.clone());
                let next = watching::watch(shared, record, current.machine.as_ref(), waker).await?;
                // Whoever reads that it is stopped finds nothing of it running.
                if matches!(next, Next::Enter(S::Stopped)) {
                    release(shared, record, live.take()).await?;
                }
                Ok(next)
            }
            None => match unless_called(shared, record, waker, takeover::take_up(shared, record, live)).await
            {
                None | Some(Ok(())) => Ok(Next::Again),
                Some(Err(reason)) => {
                    // It died while nobody watched (or the host was rebooted): it is started again, behind a new gate.
                    tracing::warn!(vm = %record.id, %reason, "vm.not_adopted");
                    release(shared, record, live.take()).await?;
                    Ok(Next::Enter(S::Starting))
                }
            },
        },
        S::Stopping => {
            if live.is_none() {
                // Whoever suspends it wants its memory, however long that takes.
                let patience = if suspend::wanted(record) { Duration::MAX } else { STOP_PATIENCE };
                let adopted = tokio::time::timeout(patience, takeover::take_up(shared, record, live));
                match unless_called(shared, record, waker, adopted).await {
                    None | Some(Ok(Ok(()))) => return Ok(Next::Again),
                    Some(Ok(Err(reason))) => {
                        tracing::info!(vm = %record.id, %reason, "vm.not_adopted");
                        release(shared, record, live.take()).await?;
                    }
                    Some(Err(_)) => tracing::warn!(vm = %record.id, "vm.stopped_without_adoption"),
                }
            }
            if suspend::wanted(record) {
                return suspend::suspend(shared, record, live).await;
            }
            if let Some(live) = live.as_mut()
                && let Err(error) = live.machine.shutdown(SHUTDOWN_GRACE).await
            {
                tracing::warn!(vm = %record.id, %error, "vm.shutdown_failed");
            }
            release(shared, record, live.take()).await?;
            Ok(Next::Enter(S::Stopped))
        }
        S::Stopped | S::Failed => {
            if live.is_some() {
                release(shared, record, live.take()).await?;
            }
            waker.notified().await;
            Ok(Next::Again)
        }
        S::Destroying => {
            release(shared, record, live.take()).await?;
            files::remove(shared, record).await.map_err(Halt::Left)?;
            point("remove.folder");
            Ok(Next::Enter(S::Destroyed))
        }
        S::Destroyed => Ok(Next::End),
    }
}

/// Folder and disk, and what the disk is made from. This takes as long as copying does, so that booting need not.
async fn provide(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    files::create(shared, record).await?;
    point("create.folder");
    if files::has_disk(shared, &record.id) {
        return Ok(());
    }
    let provided = async {
        let _room = snapshots::room_for_disk(shared, record).await?;
        snapshots::fetch(shared, record).await?;
        let spec = files::spec(shared, record).await?;
        shared.driver.prepare(&spec).await.map_err(|error| error.to_string())
    };
    match tokio::time::timeout(DISK_TIMEOUT, provided).await {
        Ok(provided) => provided,
        Err(_) => Err(format!("its disk was not there within {} s", DISK_TIMEOUT.as_secs())),
    }
}

/// For booting in bounded company. How long a start from a memory takes is the guest's choice, whose agent may be mute: it takes no turn
/// from the others. What there may be of these at a time is bounded by the host's memory and the account's VMs.
async fn turn<'a>(shared: &'a Shared, record: &VmRecord) -> Result<Option<SemaphorePermit<'a>>, String> {
    match suspend::keeps(shared, record) {
        true => Ok(None),
        false => shared.boots.acquire().await.map(Some).map_err(|error| error.to_string()),
    }
}

/// Boots, in bounded time; once more if that fails.
async fn start(shared: &Arc<Shared>, record: &VmRecord) -> Result<Live, Halt> {
    let mut attempt = 1;
    loop {
        let limit = if suspend::keeps(shared, record) { RESUME_TIMEOUT } else { BOOT_TIMEOUT };
        let reason = match tokio::time::timeout(limit, boot(shared, record)).await {
            Ok(Ok(live)) => return Ok(live),
            Ok(Err(reason)) => reason,
            Err(_) => format!("it was not started within {} s", limit.as_secs()),
        };
        // What half was done goes before the next attempt.
        release(shared, record, None).await?;
        // Whoever starts a suspended VM is not to find it booted without a word.
        if attempt == BOOTS || suspend::lost(shared, record).await {
            return Err(Halt::Failed(reason));
        }
        tracing::warn!(vm = %record.id, %reason, "vm.start_tried_again");
        attempt += 1;
        tokio::time::sleep(RETRY).await;
    }
}

/// Gate first, then the machine.
async fn boot(shared: &Arc<Shared>, record: &VmRecord) -> Result<Live, String> {
    let began = Instant::now();
    let spec = files::spec(shared, record).await?;
    let policy =
        shared.policy_of(record).await.map_err(|error| format!("cannot read the egress policy: {error}"))?;
    let read = began.elapsed();
    let net = shared.net(record);
    let since = tapgate_datapath::monotonic();
    let gate = match &spec.guest_ns {
        None => shared.datapath.attach_tap(&record.id, net, &policy).await,
        Some(guest) => shared.datapath.attach_netns(&record.id, net, &policy, guest).await,
    }
    .map_err(|error| format!("cannot attach the gate: {error}"))?;
    serve(shared, record, gate.net(), Some(files::ca(shared, record).await?), since).await;
    // Before the guest: what cannot be opened is not to cost a suspended VM its memory.
    let port = ssh::Port::of(shared, record);
    let forward = ssh::Forward::open(port).await.map_err(|error| {
        format!("cannot open the SSH port {}: {error}; free it or change ssh_ports", record.ssh_port)
    })?;
    let resumes = suspend::keeps(shared, record);
    point("boot.gated");
    let gated = began.elapsed();
    let machine = shared.driver.boot(&spec, gate).await.map_err(|error| error.to_string())?;
    point("boot.vmm");
    let started = began.elapsed();
    let handle = serde_json::to_string(machine.handle()).map_err(|error| error.to_string())?;
    shared
        .store
        .vm_set_handle(&record.id, Some(handle))
        .await
        .map_err(|error| format!("cannot record the VMM: {error}"))?;
    point("boot.recorded");
    snapshots::drop_fetched(shared, record);
    suspend::used(shared, record, resumes).await?;
    let live = Live::new(machine, forward);
    tracing::info!(
        vm = %record.id,
        records_us = micros(read),
        gate_us = micros(gated - read),
        vmm_us = micros(started - gated),
        rest_us = micros(began.elapsed() - started),
        "vm.started"
    );
    Ok(live)
}

fn micros(duration: Duration) -> u64 {
    u64::try_from(duration.as_micros()).unwrap_or(u64::MAX)
}

/// Makes the VM known to the proxy, with the policy of this moment. Without its CA nothing of it is opened.
pub(super) async fn serve(
    shared: &Shared,
    record: &VmRecord,
    net: GuestNet,
    ca: Option<Arc<VmCa>>,
    since: u64,
) {
    let policy = policy::read_or_closed(shared, &record.user, &record.id).await;
    shared.table.insert(net, ca, Arc::new(policy));
    let gated = Gated { user: record.user.clone(), net, since, policy: None };
    shared.gates().insert(record.id.clone(), gated);
    // A change that came between reading and inserting would be lost without this.
    policy::install(shared, &record.user, Some(&record.id)).await;
}

/// Ends a VMM that is known from the records or from the VM's folder, or not at all, though nobody watches it.
pub(super) async fn discard(shared: &Shared, record: &VmRecord) -> Result<(), String> {
    let noted = tapgate_vmm::noted_handle(&files::dir(shared, &record.id));
    let recorded = record.handle.as_deref().and_then(|handle| serde_json::from_str::<Handle>(handle).ok());
    let handles: Vec<Handle> = noted.into_iter().chain(recorded).collect();
    let place = files::place(shared, record)?;
    for handle in &handles {
        shared.driver.discard(&place, handle).await.map_err(|error| error.to_string())?;
    }
    shared.driver.sweep(&place).await.map_err(|error| error.to_string())
}

/// Ends the machine, closes its port, takes its place in the proxy and its gate away. What is not there is no error. While the
/// machine may still run it keeps its gate and its handle.
pub(super) async fn release(shared: &Shared, record: &VmRecord, live: Option<Live>) -> Result<(), Left> {
    let vm = &record.id;
    if shared.adopting.awaits(vm) {
        let policy = policy::read_or_closed(shared, &record.user, vm).await;
        shared.adopting.give_up(record.slot, Arc::new(policy));
    }
    if let Some(Live { machine, _forward }) = live
        && let Err(error) = machine.kill().await
    {
        tracing::warn!(%vm, %error, "vm.kill_failed");
    }
    point("release.ended");
    discard(shared, record).await.map_err(Left)?;
    events::settle(shared, record.slot).await;
    shared.table.remove(vm);
    shared.gates().remove(vm);
    shared.adopting.forget(record.slot);
    if let Err(error) = shared.datapath.detach(shared.net(record)).await {
        tracing::warn!(%vm, %error, "vm.detach_failed");
    }
    point("release.detached");
    if let Err(error) = shared.store.vm_set_handle(vm, None).await {
        tracing::warn!(%vm, %error, "vm.handle_not_cleared");
    }
    Ok(())
}
