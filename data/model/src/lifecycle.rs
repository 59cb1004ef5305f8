//! The life of a VM as a pure state machine: which calls are legal in which state, and which step may follow which.
//!
//! ```text
//!             ┌──────────────────────── start ───────────────────────┐
//! queued → creating → starting → running ⇄ ready                     │
//!    └─────────┴─────────┴──────────┴────────┴── stop → stopping → stopped
//!          any of these → failed ── start → starting             destroy │ (also from stopping and failed)
//!                                                                 destroying → destroyed
//! ```
//!
//! A suspension is a stop that keeps the memory: it enters `stopping` too. Only where it fails does the guest run on, and the
//! store takes that call back.
//!
//! It decides; it never acts, waits or stores. The store asks it inside the transaction that writes the new state,
//! so a caller and the engine can never both win.

use crate::StatusDetail as S;

/// What a user asks of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Call {
    /// Remove it for good.
    Destroy,
    /// Copy its disk.
    Snapshot,
    /// Boot it.
    Start,
    /// Shut it down.
    Stop,
    /// Keep its memory and end it; the next start goes on from there.
    Suspend,
}

/// What a legal call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// The VM goes into this state and the engine is woken.
    Enter(S),
    /// The state stays; there is nothing to do, or what there is happens beside it.
    Stay,
}

/// Why a call is refused: all are conflicts with what the VM is doing now.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// Start, but it runs or is about to.
    #[error("VM is already running")]
    AlreadyRunning,
    /// Anything, but it has been destroyed.
    #[error("VM has been destroyed")]
    Destroyed,
    /// Stop, suspend or snapshot, but it does not run.
    #[error("VM is not running")]
    NotRunning,
    /// Destroy, but it runs.
    #[error("VM must be stopped before it can be destroyed")]
    NotStopped,
    /// Start, but it is still shutting down.
    #[error("VM is still stopping; start it when its status_detail is stopped")]
    Stopping,
}

/// Decides about a call on a VM in this state.
pub const fn decide(call: Call, now: S) -> Result<Answer, Refusal> {
    match (call, now) {
        // A repeated DELETE is answered as the first was.
        (Call::Destroy, S::Destroying | S::Destroyed) => Ok(Answer::Stay),
        (_, S::Destroying | S::Destroyed) => Err(Refusal::Destroyed),

        (Call::Destroy, S::Stopping | S::Stopped | S::Failed) => Ok(Answer::Enter(S::Destroying)),
        (Call::Destroy, _) => Err(Refusal::NotStopped),

        (Call::Start, S::Stopped | S::Failed) => Ok(Answer::Enter(S::Starting)),
        (Call::Start, S::Stopping) => Err(Refusal::Stopping),
        (Call::Start, _) => Err(Refusal::AlreadyRunning),

        // What is only being made may be stopped too: nobody should have to wait for a boot to end it.
        (Call::Stop, S::Queued | S::Creating | S::Starting | S::Running | S::Ready) => {
            Ok(Answer::Enter(S::Stopping))
        }
        (Call::Stop, _) => Err(Refusal::NotRunning),

        (Call::Suspend, S::Running | S::Ready) => Ok(Answer::Enter(S::Stopping)),
        (Call::Suspend, _) => Err(Refusal::NotRunning),

        (Call::Snapshot, S::Running | S::Ready) => Ok(Answer::Stay),
        (Call::Snapshot, _) => Err(Refusal::NotRunning),
    }
}

/// Whether the engine may report `to` of a VM that the records have in `from`. Repeating a state is always fine.
pub fn may_follow(from: S, to: S) -> bool {
    if from == to {
        return true;
    }
    match to {
        S::Queued => false,
        S::Creating => from == S::Queued,
        // From running and ready: the guest's VMM died and is started again.
        S::Starting => matches!(from, S::Queued | S::Creating | S::Running | S::Ready),
        S::Running => matches!(from, S::Creating | S::Starting | S::Ready),
        S::Ready => matches!(from, S::Starting | S::Running),
        S::Stopping => false,
        // From running and ready: the guest shut itself down.
        S::Stopped => matches!(from, S::Stopping | S::Running | S::Ready),
        S::Destroying => false,
        S::Destroyed => from == S::Destroying,
        S::Failed => !matches!(from, S::Destroying | S::Destroyed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_running_vm_is_never_destroyed() {
        for state in [S::Queued, S::Creating, S::Starting, S::Running, S::Ready] {
            assert_eq!(decide(Call::Destroy, state), Err(Refusal::NotStopped), "{state:?}");
        }
    }

    #[test]
    fn nothing_comes_back_from_destruction() {
        for state in S::ALL {
            assert!(!may_follow(S::Destroyed, state) || state == S::Destroyed, "{state:?}");
            assert!(
                !may_follow(S::Destroying, state) || matches!(state, S::Destroying | S::Destroyed),
                "{state:?}"
            );
        }
        for call in [Call::Start, Call::Stop, Call::Snapshot, Call::Suspend] {
            assert_eq!(decide(call, S::Destroyed), Err(Refusal::Destroyed));
        }
    }

    #[test]
    fn the_engine_never_overrules_a_stop() {
        for state in [S::Starting, S::Running, S::Ready] {
            assert!(!may_follow(S::Stopping, state), "{state:?}");
        }
    }

    #[test]
    fn a_call_enters_states_that_only_calls_enter() {
        for call in [Call::Destroy, Call::Start, Call::Stop, Call::Snapshot, Call::Suspend] {
            for state in S::ALL {
                if let Ok(Answer::Enter(next)) = decide(call, state) {
                    assert!(matches!(next, S::Destroying | S::Starting | S::Stopping), "{call:?} {state:?}");
                }
            }
        }
    }
}
