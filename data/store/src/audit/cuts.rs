//! Gaps that retention made in the middle of the log: each is written down with the chain's hash at its end, under the chain's key.
//!
//! Numbers are missing rightly only if one cut covers exactly them. Must never join a cut that does not prove its origin: what
//! someone else wrote there would become ours.

use super::chain::{Chain, Hash};
use crate::error::Result;
use rusqlite::{Connection, OptionalExtension as _, Row, Transaction, params};

/// Numbers that follow one another and are gone, and the hash of the last of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    pub(super) first: i64,
    pub(super) last: i64,
    pub(super) hash: Hash,
}

/// Octets of a cut's code.
const PROOF: usize = 16;
const FIRST_IS: &str = "SELECT first, last, hash, mac FROM cuts WHERE first = ?1";
const BEFORE: &str = "SELECT first, last, hash, mac FROM cuts WHERE first < ?1 ORDER BY first DESC LIMIT 1";

impl Chain {
    /// Half of the full code, no less (RFC 2104, section 5): there may be one for each event that is kept.
    fn prove(&self, cut: &Cut) -> [u8; PROOF] {
        let Cut { first, last, hash } = cut;
        let code = self.sign(&[b"cut", &first.to_be_bytes()[..], &last.to_be_bytes(), hash].concat());
        std::array::from_fn(|at| code[at])
    }

    /// A cut, if it proves to be ours.
    fn read(&self, row: &Row<'_>) -> rusqlite::Result<Option<Cut>> {
        let (hash, mac): (Vec<u8>, Vec<u8>) = (row.get("hash")?, row.get("mac")?);
        let Ok(hash) = hash.try_into() else { return Ok(None) };
        let cut = Cut { first: row.get("first")?, last: row.get("last")?, hash };
        Ok((self.prove(&cut)[..] == mac[..]).then_some(cut))
    }

    /// The cut that begins at a number.
    pub(super) fn cut_at(&self, db: &Connection, first: i64) -> Result<Option<Cut>> {
        let mut statement = db.prepare_cached(FIRST_IS)?;
        Ok(statement.query_row([first], |row| self.read(row)).optional()?.flatten())
    }

    /// Whether a cut covers a number.
    pub(super) fn cut_over(&self, db: &Connection, seq: i64) -> Result<bool> {
        let mut statement = db.prepare_cached(BEFORE)?;
        let cut = statement.query_row([seq + 1], |row| self.read(row)).optional()?.flatten();
        Ok(cut.is_some_and(|cut| cut.last >= seq))
    }

    fn cut_before(&self, db: &Connection, first: i64) -> Result<Option<Cut>> {
        let mut statement = db.prepare_cached(BEFORE)?;
        let cut = statement.query_row([first], |row| self.read(row)).optional()?.flatten();
        Ok(cut.filter(|cut| cut.last + 1 == first))
    }

    /// Writes down that these events are gone: the anchor moves if they stood at the old end, else each run is a cut.
    pub(super) fn cut(&self, tx: &Transaction<'_>, runs: &[Cut]) -> Result<()> {
        // One that was changed stays as it is, for `verify` to find.
        let mut anchor = self.get_mark(tx, "anchor")?;
        let mut moved = false;
        let forget = |first: i64| tx.prepare_cached("DELETE FROM cuts WHERE first = ?1")?.execute([first]);
        for run in runs {
            let mut cut = *run;
            if let Some(next) = self.cut_at(tx, cut.last + 1)? {
                forget(next.first)?;
                (cut.last, cut.hash) = (next.last, next.hash);
            }
            if let Some((last, hash)) = &mut anchor
                && *last + 1 == cut.first
            {
                (*last, *hash, moved) = (cut.last, cut.hash, true);
                continue;
            }
            if let Some(before) = self.cut_before(tx, cut.first)? {
                cut.first = before.first;
            }
            tx.prepare_cached(
                "INSERT OR REPLACE INTO cuts (first, last, hash, mac) VALUES (?1, ?2, ?3, ?4)",
            )?
            .execute(params![cut.first, cut.last, cut.hash, self.prove(&cut)])?;
        }
        if let Some((last, hash)) = anchor.filter(|_| moved) {
            self.set_mark(tx, "anchor", last, &hash)?;
        }
        Ok(())
    }

    /// Moves the old end of the log to behind an event that is gone; what is written down of numbers before it is of no more use.
    pub(super) fn begin_after(&self, tx: &Transaction<'_>, last: i64, hash: &Hash) -> Result<()> {
        tx.prepare_cached("DELETE FROM cuts WHERE first <= ?1")?.execute([last])?;
        self.set_mark(tx, "anchor", last, hash)
    }
}
