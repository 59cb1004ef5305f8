//! Room for answers kept for retries: what an account may hold, and all of them together. Must never push out a request that
//! still runs, whose retry would then run beside it, nor the answer that the room is made for.

use crate::error::Result;
use rusqlite::{Connection, OptionalExtension as _, params};

/// What may be kept. Octets are a key's, its answer's, and 128 for the rest.
pub(super) struct Bounds {
    /// Answers of one account.
    pub(super) answers: i64,
    /// Octets of one account.
    pub(super) octets: i64,
    /// Octets of all accounts.
    pub(super) all: i64,
    /// Requests of one account that run at a time.
    pub(super) running: i64,
}

/// What holds for everybody.
pub(super) const BOUNDS: Bounds = Bounds { answers: 10_000, octets: 8 << 20, all: 256 << 20, running: 1000 };

/// Answers that one request pushes out at most: nobody waits long for room that an older tapgate did not make.
const AT_ONCE: usize = 1000;

pub(super) const TOO_OLD: &str = "DELETE FROM idempotency WHERE created_at < ?1";
/// Of those whose request never ended: what stored nothing is forgotten, and the rest has no answer.
pub(super) const GIVEN_UP: [&str; 2] = [
    "UPDATE idempotency SET status = 0 WHERE user = ?1 AND status IS NULL AND created_at < ?2 AND stored = 1",
    "DELETE FROM idempotency WHERE user = ?1 AND status IS NULL AND created_at < ?2",
];
/// The same of one, when it ended without an answer to keep.
pub(super) const ENDED_WITHOUT: [&str; 2] = [
    "UPDATE idempotency SET status = 0 WHERE user = ?1 AND key = ?2 AND status IS NULL AND stored = 1",
    "DELETE FROM idempotency WHERE user = ?1 AND key = ?2 AND status IS NULL",
];
/// The same of everybody's.
pub(super) const CUT_OFF: [&str; 2] = [
    "UPDATE idempotency SET status = 0 WHERE status IS NULL AND stored = 1 AND created_at < ?1",
    "DELETE FROM idempotency WHERE status IS NULL AND created_at < ?1",
];
const RUNNING: &str = "SELECT count(*) FROM idempotency WHERE user = ?1 AND status IS NULL";
const SHARE: &str = "SELECT answers, octets FROM idempotency_shares WHERE user = ?1";
const ALL: &str = "SELECT value FROM meta WHERE key = 'idempotency_octets'";
const HOLDS_MOST: &str = "SELECT user FROM idempotency_shares ORDER BY octets DESC LIMIT 1 OFFSET ?1";
const OLDEST: &str = "DELETE FROM idempotency WHERE user = ?1 AND key = (
         SELECT key FROM idempotency WHERE user = ?1 AND status IS NOT NULL AND (?1 <> ?2 OR key <> ?3)
         ORDER BY created_at LIMIT 1)";

/// Whether as many requests of the account run as may.
pub(super) fn is_full(db: &Connection, bounds: &Bounds, user: &str) -> Result<bool> {
    let running: i64 = db.prepare_cached(RUNNING)?.query_row([user], |row| row.get(0))?;
    Ok(running >= bounds.running)
}

/// Pushes out what is too much, oldest first: of the account, then of whoever holds most. `key` stays.
pub(super) fn make(db: &Connection, bounds: &Bounds, user: &str, key: &str) -> Result<()> {
    let mut oldest = db.prepare_cached(OLDEST)?;
    for _ in 0..AT_ONCE {
        let share = db.prepare_cached(SHARE)?.query_row([user], |row| Ok((row.get(0)?, row.get(1)?)));
        let (answers, octets): (i64, i64) = share.optional()?.unwrap_or_default();
        let fits = answers <= bounds.answers && octets <= bounds.octets;
        if fits || oldest.execute(params![user, user, key])? == 0 {
            break;
        }
    }
    let mut passed = 0_i64;
    for _ in 0..AT_ONCE {
        let all: i64 = db.prepare_cached(ALL)?.query_row([], |row| row.get(0))?;
        if all <= bounds.all {
            break;
        }
        let most = db.prepare_cached(HOLDS_MOST)?.query_row([passed], |row| row.get::<_, String>(0));
        let Some(most) = most.optional()? else { break };
        if oldest.execute(params![most, user, key])? == 0 {
            passed += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Durability, connect};

    const FEW: Bounds = Bounds { answers: 4, octets: 4000, all: 8000, running: 3 };

    fn database(folder: &tempfile::TempDir) -> Connection {
        let path = folder.path().join("tapgate.db");
        crate::schema::prepare_main(&path).unwrap();
        let db = connect(&path, Durability::Normal, true).unwrap();
        for user in ["a", "b", "c"] {
            let new = "INSERT INTO users (id, first_name, last_name, email, email_key, password, generation, created_at)
                       VALUES (?1, '', '', ?1, ?1, '', 1, 1)";
            db.execute(new, [user]).unwrap();
        }
        db
    }

    /// A request that ended with a body of so many octets, or still runs.
    fn put(db: &Connection, user: &str, key: &str, at: i64, body: Option<i64>) {
        db.execute(
            "INSERT INTO idempotency (user, key, fingerprint, created_at) VALUES (?1, ?2, x'00', ?3)",
            params![user, key, at],
        )
        .unwrap();
        if let Some(octets) = body {
            let answer =
                "UPDATE idempotency SET status = 201, body = zeroblob(?3) WHERE user = ?1 AND key = ?2";
            db.execute(answer, params![user, key, octets]).unwrap();
        }
        make(db, &FEW, user, key).unwrap();
    }

    /// What is kept of an account, oldest first; the counts are those of the rows.
    fn kept(db: &Connection, user: &str) -> String {
        let rows = "SELECT ifnull(sum(128 + length(key) + ifnull(length(body), 0)), 0) FROM idempotency";
        let counts = [
            (rows.to_owned(), ALL.to_owned()),
            (
                format!("{rows} WHERE user = '{user}'"),
                format!("SELECT ifnull(sum(octets), 0) FROM idempotency_shares WHERE user = '{user}'"),
            ),
        ];
        for (is, counted) in counts {
            let of = |sql: &str| db.query_row(sql, [], |row| row.get::<_, i64>(0)).unwrap();
            assert_eq!(of(&is), of(&counted));
        }
        let keys =
            "SELECT ifnull(group_concat(key, '' ORDER BY created_at), '') FROM idempotency WHERE user = ?1";
        db.query_row(keys, [user], |row| row.get(0)).unwrap()
    }

    #[test]
    fn the_oldest_of_an_account_go_first() {
        let folder = tempfile::tempdir().unwrap();
        let db = database(&folder);
        for (at, key) in (0..).zip(["1", "2", "3", "4", "5"]) {
            put(&db, "a", key, at, Some(10));
        }
        assert_eq!(kept(&db, "a"), "2345", "by number");
        put(&db, "b", "1", 1, Some(10));
        put(&db, "a", "6", 6, Some(3600));
        assert_eq!(kept(&db, "a"), "56", "by octets");
        put(&db, "a", "7", 7, Some(5000));
        assert_eq!(kept(&db, "a"), "7", "one that is too large alone is kept alone");
        put(&db, "a", "8", 8, Some(10));
        assert_eq!((kept(&db, "a").as_str(), kept(&db, "b").as_str()), ("8", "1"));
    }

    #[test]
    fn what_still_runs_is_pushed_out_by_nobody() {
        let folder = tempfile::tempdir().unwrap();
        let db = database(&folder);
        put(&db, "a", "r", 0, None);
        for (at, key) in (1..).zip(["1", "2", "3", "4", "5", "6"]) {
            put(&db, "a", key, at, Some(900));
        }
        assert_eq!(kept(&db, "a"), "r456");
        assert!(!is_full(&db, &FEW, "a").unwrap());
        put(&db, "a", "s", 8, None);
        put(&db, "a", "t", 9, None);
        assert_eq!(kept(&db, "a"), "r6st");
        assert!(is_full(&db, &FEW, "a").unwrap());
        assert!(!is_full(&db, &FEW, "b").unwrap());
    }

    #[test]
    fn what_is_too_much_together_goes_from_who_holds_most() {
        let folder = tempfile::tempdir().unwrap();
        let db = database(&folder);
        put(&db, "a", "1", 1, Some(500));
        for (at, key) in (10..).zip(["1", "2", "3"]) {
            put(&db, "b", key, at, Some(1100));
        }
        for (at, key) in (20..).zip(["1", "2", "3", "4"]) {
            put(&db, "c", key, at, Some(800));
        }
        assert_eq!([kept(&db, "a"), kept(&db, "b"), kept(&db, "c")], ["1", "123", "234"]);
        // Who asks holds most, and has but this one: of the next.
        put(&db, "a", "2", 30, Some(6000));
        assert_eq!([kept(&db, "a"), kept(&db, "b"), kept(&db, "c")], ["2", "", "4"]);
    }

    #[test]
    fn no_statement_scans_or_sorts() {
        let folder = tempfile::tempdir().unwrap();
        let db = database(&folder);
        for sql in [TOO_OLD, GIVEN_UP[0], GIVEN_UP[1], RUNNING, SHARE, ALL, HOLDS_MOST, OLDEST] {
            let mut plan = db.prepare(&format!("EXPLAIN QUERY PLAN {sql}")).unwrap();
            let none: Vec<Option<i64>> = vec![None; plan.parameter_count()];
            let lines: Vec<String> = plan
                .query_map(rusqlite::params_from_iter(none), |row| row.get(3))
                .unwrap()
                .map(std::result::Result::unwrap)
                .collect();
            let bad = |line: &String| {
                line.contains("B-TREE")
                    // The first row of an index in its order.
                    || line.contains("SCAN") && !line.ends_with("USING COVERING INDEX idempotency_most")
            };
            assert!(!lines.iter().any(bad), "{lines:?}: {sql}");
        }
    }
}
