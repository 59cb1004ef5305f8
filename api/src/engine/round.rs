//! What the engine was told since it looked last, each thing once. Must never drop a command: what is put together is the same work,
//! not less.

use super::{Command, Scope};
use std::collections::HashSet;
use tapgate_model::VmId;

/// Commands that are taken in at a time.
pub(super) const MOST: usize = 65_536;

/// The work of a round.
#[derive(Debug, Default)]
pub(super) struct Round {
    pub vms: Vec<VmId>,
    /// Whose policies are to be read, each once.
    pub scopes: HashSet<Scope>,
    /// How many changes of policies that answers.
    pub policies: u64,
    /// Whether guests have something new to ask for, whatever becomes of policies.
    pub news: bool,
    pub snapshots: bool,
}

impl Round {
    pub(super) fn of(commands: impl Iterator<Item = Command>) -> Self {
        let mut round = Self::default();
        for command in commands {
            match command {
                Command::Vm(vm) => round.vms.push(vm),
                Command::Policy(scope) => {
                    round.policies += 1;
                    round.scopes.insert(scope);
                }
                Command::Snapshots => round.snapshots = true,
                // Guests that wait for it ask again, each for its own.
                Command::Env(_) => round.news = true,
            }
        }
        round
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tapgate_model::UserId;

    #[test]
    fn ten_thousand_changes_of_one_account_are_one_reading_of_it() {
        let (busy, other, vm) = (UserId::generate(), UserId::generate(), VmId::generate());
        let mut commands = vec![Command::Policy(Scope::User(busy.clone())); 10_000];
        commands.push(Command::Policy(Scope::User(other.clone())));
        commands.push(Command::Vm(vm.clone()));
        let round = Round::of(commands.into_iter());
        assert_eq!(round.scopes, HashSet::from([Scope::User(busy), Scope::User(other)]));
        assert_eq!((round.policies, round.vms), (10_001, vec![vm]));
        assert!(!round.news && !round.snapshots);
    }
}
