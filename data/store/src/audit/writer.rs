//! The one thread that writes events. A batch is one transaction; what cannot be written waits, it is not lost.

use super::chain::{Chain, Hash, Stored};
use super::index::{self, Reach};
use super::queue::{Batch, Dropped, Queue};
use super::shares::{self, Tally};
use crate::error::{Result, StoreError};
use rusqlite::{Connection, OptionalExtension as _, Transaction, TransactionBehavior, params};
use std::collections::HashMap;
use std::time::Duration;
use tapgate_model::{AuditEvent, Note, VmId};

/// Events in one transaction at most.
const BATCH: usize = 8_192;
/// Names remembered; beyond it the memory starts anew.
const NAMES: usize = 50_000;
/// Between two tries while the disk is full or the file locked.
const PAUSE: Duration = Duration::from_secs(1);

/// Users and VMs by name.
type Names = HashMap<String, i64>;

pub(super) struct Writer {
    connection: Connection,
    chain: Chain,
    names: Names,
    seq: i64,
    hash: Hash,
    reach: Reach,
}

impl Writer {
    /// Blocks while it makes what is missing of the index: after a change of its form, that is all.
    pub(super) fn new(mut connection: Connection, chain: Chain) -> Result<Self> {
        // Read where nobody writes: the operator's commands open the log of a daemon that is writing, and what it wrote after
        // the head that they know would be taken for blocks beyond the end.
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let head = chain.get_mark(&tx, "head")?;
        let changed = head.is_none();
        let (seq, hash) = match head {
            Some(head) => head,
            None => {
                // Someone changed the log. Writing goes on from what is there; `audit verify` will tell.
                tracing::error!("the audit log was changed outside of tapgate; run `tapgate audit verify`");
                last(&tx)?
            }
        };
        // Blocks beyond the end are of events that someone removed: new ones take their numbers.
        index::remove(&tx, seq + 1, i64::MAX)?;
        if changed || tx.query_row("SELECT NOT EXISTS (SELECT 1 FROM holdings)", [], |row| row.get(0))? {
            shares::recount(&tx)?;
        }
        tx.commit()?;
        let mut reach = Reach::read(&connection, seq)?;
        while reach.is_behind(seq) {
            let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            reach = reach.extend(&tx, seq, 1)?;
            tx.commit()?;
        }
        Ok(Self { connection, chain, names: Names::default(), seq, hash, reach })
    }

    pub(super) fn run(mut self, queue: &Queue) {
        loop {
            let Batch { events, dropped } = queue.take(BATCH);
            let events: Vec<(Stored, Note)> = events.into_iter().map(noted).collect();
            while let Err(error) = self.write(&events, &dropped) {
                // What was remembered may have been rolled back.
                self.names = Names::default();
                tracing::error!(%error, waiting = events.len(), "audit events cannot be written; trying again");
                std::thread::sleep(PAUSE);
            }
            let count = events.len();
            // With their notes: only now is there nothing more to be told of them.
            drop((events, dropped));
            queue.done(count);
        }
    }

    fn write(&mut self, events: &[(Stored, Note)], dropped: &HashMap<VmId, Dropped>) -> Result<()> {
        if self.names.len() > NAMES {
            self.names = Names::default();
        }
        let Self { connection, chain, names, seq, hash, reach } = self;
        let tx = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
        let (mut next_seq, mut next_hash) = (*seq, *hash);
        let (mut scratch, mut tally) = (Vec::with_capacity(512), Tally::default());
        for (event, note) in events {
            next_hash = chain.next(&next_hash, event, &mut scratch);
            next_seq += 1;
            note.claim(&event.id, next_seq);
            let owner = insert(&tx, names, next_seq, event, &next_hash)?;
            tally.add(owner, shares::octets(event), next_seq);
        }
        tally.came(&tx)?;
        for (vm, Dropped { count, note }) in dropped {
            // By the number it can be seen later whether this transaction was; without events it has none of its own.
            if !events.is_empty() {
                note.claim("", next_seq);
            }
            tx.prepare_cached(
                "INSERT INTO dropped (vm, count) VALUES (?1, ?2)
                 ON CONFLICT (vm) DO UPDATE SET count = count + excluded.count",
            )?
            .execute(params![vm.as_str(), i64::try_from(*count).unwrap_or(i64::MAX)])?;
        }
        if !events.is_empty() {
            chain.set_mark(&tx, "head", next_seq, &next_hash)?;
        }
        let next_reach = reach.extend(&tx, next_seq, usize::MAX)?;
        tapgate_fault::point("audit.claimed");
        tx.commit()?;
        tapgate_fault::point("audit.committed");
        (*seq, *hash, *reach) = (next_seq, next_hash, next_reach);
        Ok(())
    }
}

/// An event as it is stored, and its note.
fn noted(mut event: AuditEvent) -> (Stored, Note) {
    let note = std::mem::take(&mut event.note);
    (Stored::of(event), note)
}

fn last(connection: &Connection) -> Result<(i64, Hash)> {
    let row: Option<(i64, Vec<u8>)> = connection
        .query_row(
            // Numbers that retention took from the end are not given again.
            "SELECT seq, hash FROM (SELECT seq, hash FROM events ORDER BY seq DESC LIMIT 1)
             UNION ALL SELECT last, hash FROM (SELECT last, hash FROM cuts ORDER BY first DESC LIMIT 1)
             ORDER BY 1 DESC LIMIT 1",
            [],
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    let (seq, hash) = row.unwrap_or((0, vec![0; 32]));
    let hash = hash.try_into().map_err(|_| StoreError::Corrupt("an audit hash is not 32 bytes".into()))?;
    Ok((seq, hash))
}

fn insert(
    tx: &Transaction<'_>,
    names: &mut Names,
    seq: i64,
    event: &Stored,
    hash: &Hash,
) -> Result<shares::Owner> {
    let user = id_of(tx, names, &event.user)?;
    let vm = id_of(tx, names, &event.vm)?;
    tx.prepare_cached(
        "INSERT INTO events (seq, id, ts, user, vm, class, host, address, port, rule, reason, method, path, status,
                             secrets, withheld, bytes_out, bytes_in, duration_ms, count, hash)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18, ?19, ?20, ?21)",
    )?
    .execute(params![
        seq,
        event.id,
        event.ts,
        user,
        vm,
        event.class,
        event.host,
        event.address,
        event.port,
        event.rule,
        event.reason,
        event.method,
        event.path,
        event.status,
        event.secrets,
        event.withheld,
        event.bytes_out,
        event.bytes_in,
        event.duration_ms,
        event.count,
        hash
    ])?;
    Ok((user, vm))
}

fn id_of(tx: &Transaction<'_>, names: &mut Names, name: &str) -> Result<i64> {
    if let Some(id) = names.get(name) {
        return Ok(*id);
    }
    tx.prepare_cached("INSERT INTO names (name) VALUES (?1) ON CONFLICT DO NOTHING")?.execute([name])?;
    let id =
        tx.prepare_cached("SELECT id FROM names WHERE name = ?1")?.query_row([name], |row| row.get(0))?;
    names.insert(name.to_owned(), id);
    Ok(id)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Durability, connect};
    use crate::schema;
    use crate::seal::SealKey;
    use std::sync::Barrier;
    use tapgate_model::{Mode, Protocol, Reason, UserId, Verdict, VmPolicy};

    static MET: Barrier = Barrier::new(2);
    static GO: Barrier = Barrier::new(2);

    /// Stays in front of a locked file until the test lets it go on.
    fn waits(times: i32) -> bool {
        if times == 0 {
            MET.wait();
            GO.wait();
        }
        true
    }

    /// The operator's commands open the log of a daemon that writes just then: they take nothing of it for what is beyond the end.
    #[test]
    fn opening_a_log_that_is_written_to_leaves_its_index_whole() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("audit.db");
        schema::prepare_audit(&path).unwrap();
        let chain = Chain::new(&SealKey::load_or_create(&folder.path().join("seal.key")).unwrap());
        let open = || connect(&path, Durability::Normal, true).unwrap();
        let policy = VmPolicy {
            vm: VmId::generate(),
            user: UserId::generate(),
            generation: 1,
            mode: Mode::Enforce,
            rules: Default::default(),
            secrets: [].into(),
            secrets_over_http: Default::default(),
        };
        let verdict = Verdict::Deny { reason: Reason::NoRule };
        let event = |ts| noted(AuditEvent::new(&policy, Protocol::Tcp, verdict.clone(), ts));
        let mut daemon = Writer::new(open(), chain.clone()).unwrap();
        let mut write =
            || daemon.write(&(0..20_000).map(event).collect::<Vec<_>>(), &HashMap::new()).unwrap();

        let lock = open();
        lock.execute_batch("BEGIN IMMEDIATE").unwrap();
        let connection = open();
        connection.busy_handler(Some(waits)).unwrap();
        let theirs = chain.clone();
        let command = std::thread::spawn(move || drop(Writer::new(connection, theirs).unwrap()));
        MET.wait();
        lock.execute_batch("ROLLBACK").unwrap();
        write();
        GO.wait();
        command.join().unwrap();
        write();

        let mut blocks = lock.prepare("SELECT first, last FROM blocks ORDER BY first").unwrap();
        let blocks = blocks.query_map([], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))).unwrap();
        let mut end = 0;
        for (first, last) in blocks.map(Result::unwrap) {
            assert_eq!(first, end + 1, "events before it are in no block: no question finds them");
            end = last;
        }
        assert_eq!(end, 40_000);
    }
}
