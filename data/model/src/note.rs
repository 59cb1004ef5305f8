//! A note of what is under way, in a journal that outlives the process: each audit event carries the one that stands for it until it
//! is stored. Dropping a note says that nothing more is to be told of it; so it must never be dropped before the event is stored
//! or counted.

use crate::{AuditEvent, VmId};
use std::{fmt, mem, sync::Arc};

/// How far an attempt is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It began; nothing was decided, and nothing passed.
    Undecided,
    /// It was decided, and is under way.
    UnderWay,
    /// It is over: the event is whole.
    Ended,
}

/// Keeps notes, each in a slot of its own. Never blocks, and none of it fails: what has no slot is counted.
pub trait Journal: Send + Sync {
    /// Writes what is known of an attempt.
    fn write(&self, slot: u32, event: &AuditEvent, stage: Stage);
    /// Writes that so many attempts of a VM are in no event, and that this is not stored yet.
    fn write_lost(&self, slot: u32, vm: &VmId, count: u64);
    /// Writes where the event will be stored, if it will be.
    fn claim(&self, slot: u32, id: &str, seq: i64);
    /// Takes a slot back.
    fn free(&self, slot: u32);
    /// Counts attempts that have no slot.
    fn more_without(&self, count: u64);
    /// Counts attempts off that had no slot.
    fn fewer_without(&self, count: u64);
}

#[derive(Default)]
enum Place {
    /// No journal is kept.
    #[default]
    Nowhere,
    In(Arc<dyn Journal>, u32),
    /// There was no slot for so many.
    Counted(Arc<dyn Journal>, u64),
}

/// A note, or none where no journal is kept. A copy of an event has none.
#[derive(Default)]
pub struct Note(Place);

impl Note {
    /// A note in a slot that nobody else has; without one it is counted.
    pub fn new(journal: Arc<dyn Journal>, slot: Option<u32>) -> Self {
        Self(match slot {
            Some(slot) => Place::In(journal, slot),
            None => {
                journal.more_without(1);
                Place::Counted(journal, 1)
            }
        })
    }

    /// Whether no journal is kept of it.
    pub fn is_none(&self) -> bool {
        matches!(self.0, Place::Nowhere)
    }

    /// Writes what is known.
    pub fn write(&mut self, event: &AuditEvent, stage: Stage) {
        match &mut self.0 {
            Place::Nowhere => {}
            Place::In(journal, slot) => journal.write(*slot, event, stage),
            Place::Counted(journal, count) => {
                let more = u64::from(event.count).saturating_sub(*count);
                journal.more_without(more);
                *count += more;
            }
        }
    }

    /// Writes where the event will be stored.
    pub fn claim(&self, id: &str, seq: i64) {
        if let Place::In(journal, slot) = &self.0 {
            journal.claim(*slot, id, seq);
        }
    }

    /// Makes this the note of `count` attempts that are in no event, another's that `other` stood for among them.
    pub fn lost(&mut self, mut other: Self, vm: &VmId, count: u64) {
        match (&mut self.0, &mut other.0) {
            (Place::Counted(_, mine), Place::Counted(_, theirs)) => *mine += mem::take(theirs),
            (Place::Counted(..) | Place::Nowhere, Place::In(..)) => mem::swap(self, &mut other),
            (Place::Nowhere, Place::Counted(..)) => mem::swap(self, &mut other),
            _ => {}
        }
        if let Place::In(journal, slot) = &self.0 {
            journal.write_lost(*slot, vm, count);
        }
    }
}

impl Drop for Note {
    fn drop(&mut self) {
        match &self.0 {
            Place::Nowhere => {}
            Place::In(journal, slot) => journal.free(*slot),
            Place::Counted(journal, count) => journal.fewer_without(*count),
        }
    }
}

impl Clone for Note {
    fn clone(&self) -> Self {
        Self::default()
    }
}

impl fmt::Debug for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Place::Nowhere => f.write_str("Note(none)"),
            Place::In(_, slot) => write!(f, "Note({slot})"),
            Place::Counted(_, count) => write!(f, "Note({count} counted)"),
        }
    }
}
