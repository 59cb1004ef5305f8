//! One task a VM: brings it from the state in the records to the next, and watches it while it runs.
//!
//! Each state is in the records before it is acted on, so after a crash the task goes on where the records say. What a
//! user asks comes in by the records too; the waker only says that they changed.

use super::{Shared, files, gates::Gated, policy, snapshots, ssh};
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::Arc,
    time::Duration,
};
use tapgate_datapath::Gate;
use tapgate_model::{StatusDetail as S, VmId};
use tapgate_store::{StoreError, VmRecord};
use tapgate_vmm::{Exit, Handle, Running};
use tokio::sync::Notify;

/// From the VMM's start until SSH answers; TCG on a busy host is slow.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// For the guest to shut itself down when asked to.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);
/// After the records could not be read or written.
const RETRY: Duration = Duration::from_secs(1);

/// A VM that runs: the machine, and the port that leads to it.
struct Live {
    machine: Arc<dyn Running>,
    _forward: ssh::Forward,
}

/// Brings the VM through its states until it is destroyed or the daemon stops.
pub(super) async fn drive(shared: Arc<Shared>, vm: VmId, waker: Arc<Notify>) {
    let mut live: Option<Live> = None;
    loop {
        let record = match shared.store.vm_any(&vm).await {
            Ok(record) => record,
            Err(StoreError::NotFound(_)) => return,
            Err(error) => {
                tracing::error!(%vm, %error, "vm.record_unreadable");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        let step = tokio::select! {
            () = shared.stop.cancelled() => return,
            step = step(&shared, &record, &mut live, &waker) => step,
        };
        match step {
            Ok(Next::Again) => {}
            Ok(Next::Enter(state)) => advance(&shared, &vm, state, None).await,
            Ok(Next::End) => return,
            Err(reason) => {
                tracing::error!(%vm, state = record.detail.word(), %reason, "vm.failed");
                release(&shared, &record, live.take()).await;
                advance(&shared, &vm, S::Failed, Some(reason)).await;
            }
        }
    }
}

/// What comes after a step.
enum Next {
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
) -> Result<Next, String> {
    match record.detail {
        S::Queued => Ok(Next::Enter(S::Creating)),
        S::Creating => {
            files::create(shared, record).await?;
            Ok(Next::Enter(S::Starting))
        }
        S::Starting => {
            // A start that a crash cut short may have left a VMM: it goes before its successor comes.
            release(shared, record, live.take()).await;
            *live = Some(boot(shared, record).await?);
            Ok(Next::Enter(S::Running))
        }
        S::Running | S::Ready => match live {
            Some(live) => {
                snapshots::take_up(shared, &record.id, live.machine.clone());
                watch(shared, record, live, waker).await
            }
            None => match adopt(shared, record).await {
                Ok(adopted) => {
                    tracing::info!(vm = %record.id, "vm.adopted");
                    *live = Some(adopted);
                    Ok(Next::Again)
                }
                Err(reason) => {
                    // It died while nobody watched (or the host was rebooted): it is started again, behind a new gate.
                    tracing::warn!(vm = %record.id, %reason, "vm.not_adopted");
                    release(shared, record, None).await;
                    Ok(Next::Enter(S::Starting))
                }
            },
        },
        S::Stopping => {
            if live.is_none() {
                *live = adopt(shared, record).await.ok();
            }
            if let Some(live) = live.as_mut()
                && let Err(error) = live.machine.shutdown(SHUTDOWN_GRACE).await
            {
                tracing::warn!(vm = %record.id, %error, "vm.shutdown_failed");
            }
            release(shared, record, live.take()).await;
            Ok(Next::Enter(S::Stopped))
        }
        S::Stopped | S::Failed => {
            if live.is_some() {
                release(shared, record, live.take()).await;
            }
            waker.notified().await;
            Ok(Next::Again)
        }
        S::Destroying => {
            release(shared, record, live.take()).await;
            files::remove(shared, record).await?;
            Ok(Next::Enter(S::Destroyed))
        }
        S::Destroyed => Ok(Next::End),
    }
}

/// Gate first, then the machine.
async fn boot(shared: &Arc<Shared>, record: &VmRecord) -> Result<Live, String> {
    let spec = files::spec(shared, record).await?;
    let policy =
        shared.policy_of(record).await.map_err(|error| format!("cannot read the egress policy: {error}"))?;
    let net = shared.net(record);
    let gate = match &spec.guest_ns {
        None => shared.datapath.attach_tap(&record.id, net, &policy).await,
        Some(guest) => shared.datapath.attach_netns(&record.id, net, &policy, guest).await,
    }
    .map_err(|error| format!("cannot attach the gate: {error}"))?;
    serve(shared, record, &gate).await?;
    let machine = shared.driver.boot(&spec, gate).await.map_err(|error| error.to_string())?;
    let handle = serde_json::to_string(machine.handle()).map_err(|error| error.to_string())?;
    shared
        .store
        .vm_set_handle(&record.id, Some(handle))
        .await
        .map_err(|error| format!("cannot record the VMM: {error}"))?;
    Ok(Live { machine: machine.into(), _forward: forward(shared, record).await? })
}

/// Takes up a machine that a former daemon started. Its gate is checked before anything is served.
async fn adopt(shared: &Arc<Shared>, record: &VmRecord) -> Result<Live, String> {
    let handle = record.handle.as_deref().ok_or("the records have no VMM for it")?;
    let handle: Handle = serde_json::from_str(handle).map_err(|error| error.to_string())?;
    let spec = files::spec(shared, record).await?;
    let policy = shared.policy_of(record).await.map_err(|error| error.to_string())?;
    let gate = shared
        .datapath
        .adopt(&record.id, shared.net(record), &policy)
        .await
        .map_err(|error| error.to_string())?;
    serve(shared, record, &gate).await?;
    let machine = shared.driver.adopt(&spec, &handle, gate).await.map_err(|error| error.to_string())?;
    Ok(Live { machine: machine.into(), _forward: forward(shared, record).await? })
}

/// Makes the VM known to the proxy, with the policy of this moment.
async fn serve(shared: &Shared, record: &VmRecord, gate: &Gate) -> Result<(), String> {
    let ca = files::ca(shared, record).await?;
    let policy = shared.policy_of(record).await.map_err(|error| error.to_string())?;
    shared.table.insert(gate.net(), ca, Arc::new(policy));
    let gated = Gated { user: record.user.clone(), net: gate.net(), policy: None };
    shared.gates().insert(record.id.clone(), gated);
    // A change that came between reading and inserting would be lost without this.
    policy::install(shared, &record.user, Some(&record.id)).await;
    Ok(())
}

async fn forward(shared: &Shared, record: &VmRecord) -> Result<ssh::Forward, String> {
    // Reachable from outside only where the operator named an address that clients outside use.
    let outside = match shared.config.public_host.parse::<IpAddr>() {
        Ok(address) => !address.is_loopback(),
        Err(_) => shared.config.public_host != "localhost",
    };
    let listen: IpAddr = match (outside, std::path::Path::new("/proc/net/if_inet6").exists()) {
        (false, _) => Ipv4Addr::LOCALHOST.into(),
        (true, true) => Ipv6Addr::UNSPECIFIED.into(),
        (true, false) => Ipv4Addr::UNSPECIFIED.into(),
    };
    let listen = SocketAddr::new(listen, record.ssh_port);
    ssh::Forward::open(record.id.clone(), listen, shared.net(record).v4, shared.datapath.egress().clone())
        .await
        .map_err(|error| format!("cannot open the SSH port {listen}: {error}; free it or change ssh_ports"))
}

/// Waits for SSH to answer, then for the machine to end or the records to change.
async fn watch(shared: &Shared, record: &VmRecord, live: &Live, waker: &Notify) -> Result<Next, String> {
    let starting = record.detail == S::Running;
    let ready = async {
        if !starting {
            return std::future::pending().await;
        }
        tokio::time::timeout(READY_TIMEOUT, live.machine.ready(shared.datapath.egress())).await
    };
    tokio::select! {
        exit = live.machine.wait() => match exit {
            Exit::GuestShutdown | Exit::Stopped => {
                release(shared, record, None).await;
                Ok(Next::Enter(S::Stopped))
            }
            Exit::Crashed(reason) => Err(format!("the VMM ended: {reason}")),
        },
        answer = ready => match answer {
            Ok(()) => Ok(Next::Enter(S::Ready)),
            Err(_) => Err(format!("SSH did not answer within {} s; see the console log of the VM", READY_TIMEOUT.as_secs())),
        },
        () = waker.notified() => Ok(Next::Again),
    }
}

/// Ends a VMM that is known from the records or from the VM's folder, though nobody watches it.
async fn discard(shared: &Shared, record: &VmRecord) {
    let noted = tapgate_vmm::noted_handle(&files::dir(shared, &record.id));
    let recorded = record.handle.as_deref().and_then(|handle| serde_json::from_str::<Handle>(handle).ok());
    let handles: Vec<Handle> = noted.into_iter().chain(recorded).collect();
    if handles.is_empty() {
        return;
    }
    let spec = match files::spec(shared, record).await {
        Ok(spec) => spec,
        Err(error) => return tracing::warn!(vm = %record.id, %error, "vm.discard_failed"),
    };
    for handle in &handles {
        if let Err(error) = shared.driver.discard(&spec, handle).await {
            tracing::warn!(vm = %record.id, %error, "vm.discard_failed");
        }
    }
}

/// Ends the machine, closes its port, takes its place in the proxy and its gate away. What is not there is no error.
async fn release(shared: &Shared, record: &VmRecord, live: Option<Live>) {
    let vm = &record.id;
    if let Some(Live { machine, _forward }) = live
        && let Err(error) = machine.kill().await
    {
        tracing::warn!(%vm, %error, "vm.kill_failed");
    }
    discard(shared, record).await;
    shared.table.remove(vm);
    shared.gates().remove(vm);
    if let Err(error) = shared.datapath.detach(shared.net(record)).await {
        tracing::warn!(%vm, %error, "vm.detach_failed");
    }
    if let Err(error) = shared.store.vm_set_handle(vm, None).await {
        tracing::warn!(%vm, %error, "vm.handle_not_cleared");
    }
}
