//! Tamper evidence: each event's hash covers the event and the hash before it, under a key that is not in the file.
//!
//! The two ends are authenticated too: the head, so that events cannot be cut off the new end, and the anchor, which
//! moves when retention removes events from the old end. What it took from the middle is in `cuts`.

use super::record;
use crate::error::Result;
use crate::seal::SealKey;
use aws_lc_rs::hmac;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};
use tapgate_model::{AuditEvent, EventId};

pub(super) type Hash = [u8; 32];

/// An event as the table has it, names as text.
pub(super) struct Stored {
    pub(super) id: String,
    pub(super) ts: i64,
    pub(super) user: String,
    pub(super) vm: String,
    pub(super) class: i64,
    pub(super) host: Option<String>,
    pub(super) address: Option<Vec<u8>>,
    pub(super) port: Option<u16>,
    pub(super) rule: Option<String>,
    pub(super) reason: u8,
    pub(super) method: Option<String>,
    pub(super) path: Option<String>,
    pub(super) status: Option<u16>,
    pub(super) secrets: Option<String>,
    pub(super) withheld: Option<String>,
    pub(super) bytes_out: i64,
    pub(super) bytes_in: i64,
    pub(super) duration_ms: i64,
    pub(super) count: u32,
}

impl Stored {
    pub(super) fn of(event: AuditEvent) -> Self {
        let names = |list: &Vec<String>| {
            (!list.is_empty()).then(|| serde_json::Value::from(list.clone()).to_string())
        };
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        Self {
            id: event.id.unwrap_or_else(|| EventId::at(event.timestamp_us)).into(),
            ts: event.timestamp_us,
            class: record::class(&event.verdict, event.mode, event.protocol),
            rule: event.verdict.rule().map(|rule| rule.as_str().to_owned()),
            reason: event.verdict.reason() as u8,
            user: event.user.into(),
            vm: event.vm.into(),
            host: event.host.map(|host| host.as_str().to_owned()),
            address: event.address.map(|address| record::address_key(address).to_vec()),
            port: event.port,
            secrets: names(&event.secrets),
            withheld: names(&event.secrets_withheld),
            method: event.method,
            path: event.path,
            status: event.status,
            bytes_out: number(event.bytes_out),
            bytes_in: number(event.bytes_in),
            duration_ms: number(event.duration_ms),
            count: event.count,
        }
    }

    fn read(row: &Row<'_>) -> rusqlite::Result<Self> {
        Ok(Self {
            id: row.get("id")?,
            ts: row.get("ts")?,
            user: row.get("user_name")?,
            vm: row.get("vm_name")?,
            class: row.get("class")?,
            host: row.get("host")?,
            address: row.get("address")?,
            port: row.get("port")?,
            rule: row.get("rule")?,
            reason: row.get("reason")?,
            method: row.get("method")?,
            path: row.get("path")?,
            status: row.get("status")?,
            secrets: row.get("secrets")?,
            withheld: row.get("withheld")?,
            bytes_out: row.get("bytes_out")?,
            bytes_in: row.get("bytes_in")?,
            duration_ms: row.get("duration_ms")?,
            count: row.get("count")?,
        })
    }

    /// Every field with its length before it, absent ones apart from empty ones.
    fn bytes(&self, out: &mut Vec<u8>) {
        let Self { id, ts, user, vm, class, host, address, port, rule, reason, .. } = self;
        let Self { method, path, status, secrets, withheld, bytes_out, bytes_in, duration_ms, count, .. } =
            self;
        let mut put = |bytes: Option<&[u8]>| match bytes {
            None => out.push(0),
            Some(bytes) => {
                out.push(1);
                out.extend_from_slice(&u32::try_from(bytes.len()).unwrap_or(u32::MAX).to_be_bytes());
                out.extend_from_slice(bytes);
            }
        };
        for text in
            [Some(id), Some(user), Some(vm), host.as_ref(), rule.as_ref(), method.as_ref(), path.as_ref()]
                .into_iter()
                .chain([secrets.as_ref(), withheld.as_ref()])
        {
            put(text.map(String::as_bytes));
        }
        put(address.as_deref());
        for number in [port, status] {
            put(number.map(u16::to_be_bytes).as_ref().map(<[u8; 2]>::as_slice));
        }
        for number in [ts, class, bytes_out, bytes_in, duration_ms] {
            put(Some(&number.to_be_bytes()));
        }
        put(Some(&count.to_be_bytes()));
        put(Some(&[*reason]));
    }
}

/// The key of the chain.
#[derive(Clone)]
pub(super) struct Chain(hmac::Key);

fn hash_of(tag: &hmac::Tag) -> Hash {
    let mut hash = [0; 32];
    hash.copy_from_slice(tag.as_ref());
    hash
}

impl Chain {
    pub(super) fn new(key: &SealKey) -> Self {
        Self(key.derive("audit chain"))
    }

    /// The hash of an event that comes after one with this hash.
    pub(super) fn next(&self, before: &Hash, event: &Stored, scratch: &mut Vec<u8>) -> Hash {
        scratch.clear();
        scratch.extend_from_slice(before);
        event.bytes(scratch);
        self.sign(scratch)
    }

    pub(super) fn sign(&self, body: &[u8]) -> Hash {
        hash_of(&hmac::sign(&self.0, body))
    }

    pub(super) fn mark(&self, name: &str, seq: i64, hash: &Hash) -> Vec<u8> {
        let body = [&seq.to_be_bytes()[..], hash].concat();
        [&body[..], &self.sign(&[name.as_bytes(), &body].concat())].concat()
    }

    /// Keeps an end of the chain.
    pub(super) fn set_mark(&self, tx: &Transaction<'_>, name: &str, seq: i64, hash: &Hash) -> Result<()> {
        tx.prepare_cached(
            "INSERT INTO meta (key, value) VALUES (?1, ?2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        )?
        .execute(params![name, self.mark(name, seq, hash)])?;
        Ok(())
    }

    /// An end of the chain; `(0, zeros)` before the first event, `None` if it was changed.
    pub(super) fn get_mark(&self, db: &Connection, name: &str) -> Result<Option<(i64, Hash)>> {
        let found: Option<Vec<u8>> =
            db.query_row("SELECT value FROM meta WHERE key = ?1", [name], |row| row.get(0)).optional()?;
        let Some(found) = found else {
            let any: bool = db.query_row("SELECT EXISTS (SELECT 1 FROM events)", [], |row| row.get(0))?;
            return Ok((!any || name == "anchor").then_some((0, [0; 32])));
        };
        Ok(self.read_mark(name, &found))
    }

    /// What a mark says, if it is of this name and ours.
    pub(super) fn read_mark(&self, name: &str, mark: &[u8]) -> Option<(i64, Hash)> {
        let (seq, rest) = mark.split_first_chunk::<8>()?;
        let (hash, _) = rest.split_first_chunk::<32>()?;
        let seq = i64::from_be_bytes(*seq);
        (self.mark(name, seq, hash) == mark).then_some((seq, *hash))
    }

    /// Walks the whole log.
    pub(super) fn verify(&self, db: &Connection) -> Result<Result<u64, String>> {
        let Some((mut last, mut hash)) = self.get_mark(db, "anchor")? else {
            return Ok(Err("the record of where the log begins was changed".into()));
        };
        let Some((head, head_hash)) = self.get_mark(db, "head")? else {
            return Ok(Err("the record of where the log ends was changed".into()));
        };
        let mut statement = db.prepare(
            "SELECT e.*, u.name AS user_name, v.name AS vm_name FROM events e
             LEFT JOIN names u ON u.id = e.user LEFT JOIN names v ON v.id = e.vm
             ORDER BY e.seq",
        )?;
        let mut rows = statement.query([])?;
        let (mut count, mut cuts, mut scratch) = (0, 0, Vec::new());
        while let Some(row) = rows.next()? {
            let seq: i64 = row.get("seq")?;
            let id: String = row.get("id").unwrap_or_default();
            if seq != last + 1
                && let Some(cut) = self.cut_at(db, last + 1)?
            {
                (last, hash, cuts) = (cut.last, cut.hash, cuts + 1);
            }
            if seq != last + 1 {
                return Ok(Err(format!(
                    "events are missing before {id} (number {seq}, expected {})",
                    last + 1
                )));
            }
            let Ok(event) = Stored::read(row) else { return Ok(Err(format!("{id} was changed"))) };
            hash = self.next(&hash, &event, &mut scratch);
            if row.get::<_, Vec<u8>>("hash")? != hash {
                return Ok(Err(format!("{id} (number {seq}) was changed")));
            }
            (last, count) = (seq, count + 1);
        }
        if last != head
            && let Some(cut) = self.cut_at(db, last + 1)?
        {
            (last, hash, cuts) = (cut.last, cut.hash, cuts + 1);
        }
        if (last, hash) != (head, head_hash) {
            return Ok(Err(format!(
                "events are missing at the end: the last is number {last}, expected {head}"
            )));
        }
        if cuts != db.query_row("SELECT count(*) FROM cuts", [], |row| row.get::<_, i64>(0))? {
            return Ok(Err("the records of what retention removed were changed".into()));
        }
        Ok(Ok(count))
    }
}
