//! Whose upload is next: accounts take turns, and each has one at a time, so that nobody waits for all that another has. Knows of no
//! file and no record.

use std::collections::HashMap;
use tapgate_model::{SnapshotId, UserId};

/// What is being stored, and when each account that waits had its last turn.
#[derive(Debug, Default)]
pub(super) struct Turns {
    running: HashMap<UserId, SnapshotId>,
    served: HashMap<UserId, u64>,
    turn: u64,
}

impl Turns {
    /// The next of those that wait, oldest first; none while each account among them has one that is being stored.
    pub(super) fn next(&mut self, waiting: &[(SnapshotId, UserId)]) -> Option<SnapshotId> {
        self.served.retain(|user, _| waiting.iter().any(|(_, of)| of == user));
        let free = waiting.iter().filter(|(_, user)| !self.running.contains_key(user));
        // Of equals the first is taken.
        let (snapshot, user) = free.min_by_key(|(_, user)| self.served.get(user).copied().unwrap_or(0))?;
        self.turn += 1;
        self.served.insert(user.clone(), self.turn);
        self.running.insert(user.clone(), snapshot.clone());
        Some(snapshot.clone())
    }

    /// It is stored, or it failed.
    pub(super) fn done(&mut self, snapshot: &SnapshotId) {
        self.running.retain(|_, running| running != snapshot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accounts_take_turns_with_one_each_at_a_time() {
        let [a, b, c] = [(); 3].map(|()| UserId::generate());
        let mut waiting: Vec<(SnapshotId, UserId)> =
            [&a, &a, &a, &b, &c].map(|user| (SnapshotId::generate(), user.clone())).into();
        let all = waiting.clone();
        let of = |n: usize| Some(all[n].0.clone());
        let mut turns = Turns::default();
        let mut end = |turns: &mut Turns, n: usize| {
            turns.done(&all[n].0);
            waiting.retain(|(id, _)| *id != all[n].0);
            turns.next(&waiting)
        };
        assert_eq!(turns.next(&all), of(0));
        assert_eq!(turns.next(&all), of(3), "not the first account's second");
        assert_eq!(end(&mut turns, 0), of(4), "who had no turn yet");
        assert_eq!(end(&mut turns, 3), of(1));
        assert_eq!(turns.next(&all[1..3]), None, "its other one is not done");
        assert_eq!(end(&mut turns, 1), of(2));
        assert_eq!(end(&mut turns, 4), None);
        assert_eq!(end(&mut turns, 2), None);
        assert!(turns.running.is_empty() && turns.served.is_empty(), "nobody is remembered for ever");
    }
}
