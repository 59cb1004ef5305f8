//! What a daemon that was killed left in the journal: it becomes events, each once, and counts, before anything new is recorded.
//!
//! What the last transaction before the death had stored may still stand in the journal; it is known by the number and the id that were
//! noted just before. Must never fail for what the file says.

use super::AuditLog;
use super::chain::Chain;
use crate::error::Result;
use rusqlite::{Connection, OptionalExtension as _};
use std::path::Path;
use tapgate_journal::{FileJournal, Left, LeftEvent, Lost};
use tapgate_model::{AuditEvent, EventId, Note, Stage};

/// Where attempts are counted of which it is not known whose they were.
const UNKNOWN: &str = "vm_unknown";

/// What came of a journal.
#[derive(Debug, Default)]
pub struct Recovered {
    /// Events that were not stored, and are now.
    pub events: u64,
    /// Attempts that are in no event, and are counted now.
    pub lost: u64,
    /// Why the journal, or a part of it, could not be read.
    pub fault: Option<String>,
    /// Why there is no journal from now on: the next daemon will not know what was under way.
    pub without: Option<String>,
}

impl AuditLog {
    /// Stores what the last daemon noted in this file and did not store, then begins a journal of its own there. Only for the one
    /// process that makes events, and before it makes any; comes back when all is stored.
    pub async fn keep_journal(&self, path: &Path) -> Result<Recovered> {
        let Left { events, lost, fault } = Left::read(path);
        let chain = self.chain.clone();
        let (events, lost) = self.db.read(move |db| not_stored(db, &chain, events, lost)).await?;
        let mut recovered = Recovered {
            events: events.len() as u64,
            lost: lost.iter().map(|lost| lost.count).sum(),
            fault,
            without: None,
        };
        let journal = FileJournal::beside(path);
        let take = || journal.as_ref().map(FileJournal::note).unwrap_or_default();
        let events = events.into_iter().map(|event| {
            let mut event = AuditEvent { note: take(), ..event };
            event.note_down(Stage::Ended);
            event
        });
        let events: Vec<AuditEvent> = events.collect();
        let lost = lost.into_iter().filter_map(|lost| {
            let vm = lost.vm.or_else(|| UNKNOWN.parse().ok())?;
            let mut note = Note::default();
            note.lost(take(), &vm, lost.count);
            Some((vm, lost.count, note))
        });
        let lost: Vec<_> = lost.collect();
        match journal.and_then(|journal| journal.put_in_place().map(|()| journal)) {
            Ok(journal) => drop(self.journal.set(journal)),
            Err(error) => recovered.without = Some(error.to_string()),
        }
        lost.into_iter().for_each(|(vm, count, note)| self.queue.lose(vm, count, note));
        self.queue.restore(events);
        self.flush().await;
        Ok(recovered)
    }
}

/// What of it the log does not hold.
fn not_stored(
    db: &Connection,
    chain: &Chain,
    events: Vec<LeftEvent>,
    lost: Vec<Lost>,
) -> Result<(Vec<AuditEvent>, Vec<Lost>)> {
    let head = chain.get_mark(db, "head")?.map_or(0, |(seq, _)| seq);
    let mut id_of = db.prepare_cached("SELECT id FROM events WHERE seq = ?1")?;
    let mut is_stored = |(id, seq): &(EventId, i64)| -> Result<bool> {
        let found: Option<String> = id_of.query_row([seq], |row| row.get(0)).optional()?;
        // One that is gone again was taken by retention.
        Ok(found.map_or(*seq <= head, |found| found == id.as_str()))
    };
    let mut rest = Vec::new();
    for LeftEvent { event, claim } in events {
        if !claim.as_ref().map_or(Ok(false), &mut is_stored)? {
            rest.push(event);
        }
    }
    let counted = |lost: &Lost| lost.claim.is_some_and(|seq| seq <= head);
    Ok((rest, lost.into_iter().filter(|lost| !counted(lost)).collect()))
}
