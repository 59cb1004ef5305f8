//! Takes up a VM that a former daemon started. Its gate and its place in the proxy come first and need nothing that could be missing;
//! what is this daemon's own trouble (records that do not answer, a CA that does not open, a port that is taken) is tried again while
//! the VM runs on behind them. Must never give a VM up for less than its end, or a VMM that left several looks unanswered.

use super::{
    Shared,
    backoff::Backoff,
    files,
    life::{Live, serve},
    policy, ssh,
};
use std::{sync::Arc, time::Duration};
use tapgate_datapath::DatapathError;
use tapgate_store::VmRecord;
use tapgate_vmm::{Handle, Running, VmmError};

/// For one look at the VMM.
const LOOK: Duration = Duration::from_secs(15);
/// Between two.
const PAUSE: Duration = Duration::from_secs(2);
/// So many in a row are unanswered when it is given up; fewer may be a busy host's.
const MISSING: u32 = 3;

/// Why it is not taken up.
enum Trouble {
    /// It has ended, or is not what the records say.
    Ended(String),
    /// Its VMM did not answer.
    Unanswered(String),
    /// It is ours: the VM is as good as before.
    Ours(String),
}

/// Takes it up, however long that takes; or says what it ended of, and then it is to be released, with what is there of it in `live`.
/// Dropped, the VM runs on, and another call goes on where this one was.
pub(super) async fn take_up(
    shared: &Arc<Shared>,
    record: &VmRecord,
    live: &mut Option<Live>,
) -> Result<(), String> {
    let vm = &record.id;
    let handle = record.handle.as_deref().ok_or("the records have no VMM for it")?;
    let handle: Handle = serde_json::from_str(handle).map_err(|error| error.to_string())?;
    let (mut backoff, mut missing) = (Backoff::new(), 0);
    loop {
        let pause = match attempt(shared, record, &handle, live).await {
            Ok(()) => break,
            Err(Trouble::Ended(reason)) => return Err(reason),
            Err(Trouble::Unanswered(reason)) => {
                missing += 1;
                if missing == MISSING {
                    return Err(reason);
                }
                tracing::warn!(%vm, %reason, "vm.look_unanswered");
                PAUSE
            }
            Err(Trouble::Ours(reason)) => {
                let pause = backoff.pause();
                tracing::error!(%vm, %reason, again_in_s = pause.as_secs(), "vm.adoption_tried_again");
                pause
            }
        };
        tokio::time::sleep(pause).await;
    }
    tracing::info!(%vm, "vm.adopted");
    Ok(())
}

async fn attempt(
    shared: &Arc<Shared>,
    record: &VmRecord,
    handle: &Handle,
    live: &mut Option<Live>,
) -> Result<(), Trouble> {
    // Once it is held it stays so: whoever follows a VMM does that until its end, and there is one of them.
    let live = match live {
        Some(live) => live,
        None => {
            let machine = hold(shared, record, handle).await?;
            live.insert(Live::new(machine, ssh::Forward::insist(ssh::Port::of(shared, record)).await))
        }
    };
    match tokio::time::timeout(LOOK, live.machine.check()).await {
        Ok(answer) => answer.map_err(|error| Trouble::Unanswered(error.to_string())),
        Err(_) => Err(late()),
    }
}

fn late() -> Trouble {
    Trouble::Unanswered(format!("no answer within {} s", LOOK.as_secs()))
}

async fn hold(shared: &Arc<Shared>, record: &VmRecord, handle: &Handle) -> Result<Box<dyn Running>, Trouble> {
    let policy = policy::read_or_closed(shared, &record.user, &record.id).await;
    let gate = shared.datapath.adopt(&record.id, shared.net(record), &policy).await;
    let gate = gate.map_err(|error| match error {
        DatapathError::NotAdoptable { .. } => Trouble::Ended(error.to_string()),
        _ => Trouble::Ours(error.to_string()),
    })?;
    let served = shared.gates().get(&record.id).is_some();
    if !served {
        let ca = files::ca(shared, record).await.inspect_err(|error| {
            tracing::error!(vm = %record.id, %error, "vm.ca_not_read");
        });
        let missing = ca.is_err();
        // Its slot was its own all the while.
        serve(shared, record, gate.net(), ca.ok(), 0).await;
        if missing {
            tokio::spawn(read_ca(shared.clone(), record.clone()));
        }
    }
    // What it tried meanwhile can be told.
    shared.adopting.done(&record.id);
    // It runs: what cannot be read of its account now is no reason to end it. It has the less until it can be.
    let spec = files::spec_of_running(shared, record).await.map_err(Trouble::Ours)?;
    let adopted = tokio::time::timeout(LOOK, shared.driver.adopt(&spec, handle, gate)).await;
    adopted.map_err(|_| late())?.map_err(|error| match error {
        VmmError::Gone | VmmError::Gate(_) | VmmError::Start(_) => Trouble::Ended(error.to_string()),
        _ => Trouble::Unanswered(error.to_string()),
    })
}

/// Tries until the CA is there, or the VM is not.
async fn read_ca(shared: Arc<Shared>, record: VmRecord) {
    let mut backoff = Backoff::new();
    loop {
        tokio::select! {
            () = shared.stop.cancelled() => return,
            () = tokio::time::sleep(backoff.pause()) => {}
        }
        let known = shared.gates().get(&record.id).is_some();
        if !known {
            return;
        }
        match files::ca(&shared, &record).await {
            Ok(ca) => {
                shared.table.set_ca(&record.id, ca);
                tracing::info!(vm = %record.id, "vm.ca_read");
                return;
            }
            Err(error) => tracing::error!(vm = %record.id, %error, "vm.ca_not_read"),
        }
    }
}
