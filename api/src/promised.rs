//! Room on the host's disk that is promised: to copies for snapshots, kept memories, disks that are brought here. What is promised and
//! not written yet counts as taken, so that of many who look at once each sees what is left by the others.
//!
//! ```text
//! asked ── it fits ──▶ promised ── dropped ──▶ free again, or taken by what was written
//!   └── it does not: waits while others may give back what they have; refused where that would not do
//! ```
//!
//! Of those who wait the account that holds least is next, and of one account who came first. Never writes a file, and never knows a
//! snapshot from a disk.

use std::{
    collections::BTreeMap,
    fmt,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tapgate_model::UserId;
use tokio::sync::Notify;

/// Between two looks at the disk of one who waits, if nothing is given back: others use it too.
const LOOK: Duration = Duration::from_secs(5);

/// What is asked for.
#[derive(Clone, Debug)]
pub struct Need {
    /// Whose it is.
    pub user: UserId,
    /// How much it may be while it is made, with what is there already.
    pub octets: u64,
    /// Where it is written: files, or folders of files.
    pub places: Vec<PathBuf>,
    /// Whether what is written there goes again.
    pub passes: bool,
}

impl Need {
    fn written(&self) -> u64 {
        self.places.iter().map(|place| allocated(place)).sum()
    }

    /// What is still to be written.
    fn open(&self) -> u64 {
        self.octets.saturating_sub(self.written())
    }
}

/// There is no room for it, and nobody would give enough back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lack {
    /// Octets that it needs.
    pub needs: u64,
    /// Octets above the reserve that nobody has.
    pub free: u64,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (needs, free) = (self.needs.div_ceil(1 << 20), self.free >> 20);
        write!(f, "the host has no room for it: needs {needs} MiB, {free} MiB free above the reserve")
    }
}

/// What is promised, and who waits.
#[derive(Debug, Default)]
pub struct Promised {
    ledger: Mutex<Ledger>,
    changed: Notify,
}

#[derive(Debug, Default)]
struct Ledger {
    next: u64,
    given: BTreeMap<u64, Need>,
    waiting: BTreeMap<u64, (UserId, u64)>,
}

/// What all of it comes to at a moment.
struct Sums {
    /// Promised and not written.
    taken: u64,
    /// Written, and to go again.
    passing: u64,
}

impl Ledger {
    /// To be looked at before the disk is: what is written in between is then counted twice, and not left out.
    fn sums(&self) -> Sums {
        self.given.values().fold(Sums { taken: 0, passing: 0 }, |sums, need| {
            let written = need.written();
            Sums {
                taken: sums.taken.saturating_add(need.octets.saturating_sub(written)),
                passing: sums.passing.saturating_add(if need.passes { written } else { 0 }),
            }
        })
    }

    fn held_by(&self, user: &UserId) -> u64 {
        self.given
            .values()
            .filter(|need| need.user == *user)
            .fold(0, |sum, need| sum.saturating_add(need.octets))
    }

    /// Whether another who waits, and would fit too, is to have it first.
    fn yields(&self, ticket: u64, user: &UserId, room: u64) -> bool {
        let rank = |ticket: u64, user: &UserId| (self.held_by(user), ticket);
        let mine = rank(ticket, user);
        self.waiting
            .iter()
            .any(|(other, (of, octets))| *other != ticket && *octets <= room && rank(*other, of) < mine)
    }

    fn give(&mut self, need: Need) -> u64 {
        self.next += 1;
        self.given.insert(self.next, need);
        self.next
    }
}

impl Promised {
    /// What is free, less what is promised of it.
    pub fn left(&self, free: impl Fn() -> u64) -> u64 {
        let taken = self.ledger().sums().taken;
        free().saturating_sub(taken)
    }

    /// Whether so much might be had now or when others gave back what they have; `free` is what is free above the reserve.
    ///
    /// # Errors
    /// Not even then.
    pub fn could_have(&self, octets: u64, free: impl Fn() -> u64) -> Result<(), Lack> {
        let sums = self.ledger().sums();
        let free = free();
        match octets <= free.saturating_add(sums.passing) {
            true => Ok(()),
            false => Err(Lack { needs: octets, free: free.saturating_sub(sums.taken) }),
        }
    }

    /// A promise, or the answer that there is no room for it at this moment.
    ///
    /// # Errors
    /// There is not.
    pub fn now(self: &Arc<Self>, need: Need, free: impl Fn() -> u64) -> Result<Promise, Lack> {
        let mut ledger = self.ledger();
        let (taken, needs) = (ledger.sums().taken, need.open());
        let room = free().saturating_sub(taken);
        match needs <= room {
            true => Ok(self.promise(ledger.give(need))),
            false => Err(Lack { needs, free: room }),
        }
    }

    /// A promise of room for what is there already, in part or whole.
    pub fn again(self: &Arc<Self>, need: Need) -> Promise {
        self.promise(self.ledger().give(need))
    }

    /// A promise, once there is room.
    ///
    /// # Errors
    /// There would be none if all others gave back what they have.
    pub async fn wait(self: &Arc<Self>, need: Need, free: impl Fn() -> u64) -> Result<Promise, Lack> {
        let queued = self.queue(&need);
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            if let Some(answer) = self.decide(&queued, &need, &free) {
                return answer;
            }
            tokio::select! {
                () = changed => {}
                () = tokio::time::sleep(LOOK) => {}
            }
        }
    }

    fn decide(
        self: &Arc<Self>,
        queued: &Queued<'_>,
        need: &Need,
        free: &impl Fn() -> u64,
    ) -> Option<Result<Promise, Lack>> {
        let mut ledger = self.ledger();
        let (sums, needs) = (ledger.sums(), need.open());
        let free = free();
        let room = free.saturating_sub(sums.taken);
        if needs <= room {
            let gives = !ledger.yields(queued.ticket, &need.user, room);
            return gives.then(|| Ok(self.promise(ledger.give(need.clone()))));
        }
        // Said is what there would be: what the others have for a while is no news to whoever is refused.
        let best = free.saturating_add(sums.passing);
        let never = needs > best || ledger.given.is_empty();
        never.then_some(Err(Lack { needs, free: best }))
    }

    fn queue(&self, need: &Need) -> Queued<'_> {
        let mut ledger = self.ledger();
        ledger.next += 1;
        let ticket = ledger.next;
        ledger.waiting.insert(ticket, (need.user.clone(), need.open()));
        Queued { of: self, ticket }
    }

    fn promise(self: &Arc<Self>, id: u64) -> Promise {
        Promise { of: self.clone(), id }
    }

    fn ledger(&self) -> MutexGuard<'_, Ledger> {
        self.ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who waits, for as long as he does.
struct Queued<'a> {
    of: &'a Promised,
    ticket: u64,
}

impl Drop for Queued<'_> {
    fn drop(&mut self) {
        self.of.ledger().waiting.remove(&self.ticket);
        self.of.changed.notify_waiters();
    }
}

/// Room that is promised until this is dropped.
#[derive(Debug)]
#[must_use = "what is dropped is not promised any more"]
pub struct Promise {
    of: Arc<Promised>,
    id: u64,
}

impl Promise {
    /// From now on it is so much, all in all.
    pub fn is(&self, octets: u64) {
        if let Some(need) = self.of.ledger().given.get_mut(&self.id) {
            need.octets = octets;
        }
        self.of.changed.notify_waiters();
    }

    /// How much it is, all in all.
    pub fn octets(&self) -> u64 {
        self.of.ledger().given.get(&self.id).map_or(0, |need| need.octets)
    }

    /// Whether what is not written of it is still free: others than those who ask here write too.
    ///
    /// # Errors
    /// It is not.
    pub fn holds(&self, free: impl Fn() -> u64) -> Result<(), Lack> {
        let ledger = self.of.ledger();
        let needs = ledger.given.get(&self.id).map_or(0, Need::open);
        let free = free();
        if needs <= free { Ok(()) } else { Err(Lack { needs, free }) }
    }
}

impl Drop for Promise {
    fn drop(&mut self) {
        self.of.ledger().given.remove(&self.id);
        self.of.changed.notify_waiters();
    }
}

/// Octets that a file takes of the disk, or the files of a folder; none where there is nothing.
pub(crate) fn allocated(place: &Path) -> u64 {
    let of =
        |path: &Path| std::fs::symlink_metadata(path).map_or(0, |meta| meta.blocks().saturating_mul(512));
    match std::fs::read_dir(place) {
        Ok(files) => files.flatten().map(|file| of(&file.path())).sum(),
        Err(_) => of(place),
    }
}

#[cfg(test)]
mod tests;
