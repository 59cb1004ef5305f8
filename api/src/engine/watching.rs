//! Watches one VM that runs: until SSH answers, and then for whatever ends that — a guest that restarts or shuts down, a VMM
//! that ends or hangs, a user's call. Decides what comes next; changes nothing.

use super::{Shared, life::Next};
use crate::config::DriverKind;
use std::time::Duration;
use tapgate_model::StatusDetail as S;
use tapgate_store::VmRecord;
use tapgate_vmm::{Exit, Observed, Running};
use tokio::sync::{Notify, watch::Receiver};

/// From the VMM's start until SSH answers; TCG on a busy host is slow.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// Between two looks at whether the VMM still answers.
const CHECK: Duration = Duration::from_secs(3);
/// For one answer.
const ANSWER: Duration = Duration::from_secs(15);
/// So many in a row are missing when it hangs; one may be a busy host's.
const MISSING: u32 = 2;

/// Comes back when there is something to do.
pub(super) async fn watch(
    shared: &Shared,
    record: &VmRecord,
    machine: &dyn Running,
    waker: &Notify,
) -> Result<Next, String> {
    let starting = record.detail == S::Running;
    let mut observed = machine.observed();
    let reboots = observed.borrow_and_update().reboots;
    let ready = async {
        if !starting {
            return std::future::pending().await;
        }
        tokio::time::timeout(READY_TIMEOUT, machine.ready(shared.datapath.egress())).await
    };
    tokio::select! {
        exit = machine.wait() => match exit {
            // Their end is complete: what they had is given back when the state is entered.
            Exit::GuestShutdown | Exit::Stopped => Ok(Next::Enter(S::Stopped)),
            Exit::Crashed(reason) => Err(format!("the VMM ended: {reason}")),
        },
        answer = ready => match answer {
            Ok(()) => {
                if shared.config.driver == DriverKind::Netns {
                    let reason = "the namespace driver has no guest agent, so it runs no agents; use driver = \"qemu\"";
                    let _ = shared.store.agent_hindered(&record.id, reason.into()).await;
                }
                Ok(Next::Enter(S::Ready))
            }
            Err(_) => Err(format!("SSH did not answer within {} s; see the console log of the VM", READY_TIMEOUT.as_secs())),
        },
        () = rebooted(&mut observed, reboots), if !starting => {
            tracing::info!(vm = %record.id, "vm.rebooted");
            Ok(Next::Enter(S::Running))
        }
        reason = hangs(machine) => Err(format!("the VMM hangs: {reason}")),
        () = waker.notified() => Ok(Next::Again),
    }
}

/// Comes back when the guest restarted itself.
async fn rebooted(observed: &mut Receiver<Observed>, before: u32) {
    if observed.wait_for(|seen| seen.reboots != before).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Comes back when the VMM no longer answers.
async fn hangs(machine: &dyn Running) -> String {
    let mut missing = 0;
    loop {
        tokio::time::sleep(CHECK).await;
        let reason = match tokio::time::timeout(ANSWER, machine.check()).await {
            Ok(Ok(())) => {
                missing = 0;
                continue;
            }
            Ok(Err(error)) => error.to_string(),
            Err(_) => format!("no answer within {} s", ANSWER.as_secs()),
        };
        missing += 1;
        if missing == MISSING {
            return reason;
        }
    }
}
