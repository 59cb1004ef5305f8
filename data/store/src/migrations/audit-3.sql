-- Events stand in the table alone, by their number. What finds them is kept for blocks of up to 16,384 events, written at once
-- when a block is full: an index of a value would be written to in a different place for each event, and every page of it
-- again and again. Hosts stand in the events, so that nothing is left to clean up after those are removed.

CREATE TABLE events_new (
    seq         INTEGER PRIMARY KEY,
    id          TEXT NOT NULL,
    ts          INTEGER NOT NULL,
    user        INTEGER NOT NULL,
    vm          INTEGER NOT NULL,
    class       INTEGER NOT NULL,
    host        TEXT,
    address     BLOB,
    port        INTEGER,
    rule        TEXT,
    reason      INTEGER NOT NULL,
    method      TEXT,
    path        TEXT,
    status      INTEGER,
    secrets     TEXT,
    withheld    TEXT,
    bytes_out   INTEGER NOT NULL,
    bytes_in    INTEGER NOT NULL,
    duration_ms INTEGER NOT NULL,
    count       INTEGER NOT NULL,
    hash        BLOB NOT NULL
) STRICT;
INSERT INTO events_new
    SELECT e.seq, e.id, e.ts, e.user, e.vm, e.class, h.name, e.address, e.port, e.rule, e.reason, e.method, e.path, e.status,
           e.secrets, e.withheld, e.bytes_out, e.bytes_in, e.duration_ms, e.count, e.hash
    FROM events e LEFT JOIN hosts h ON h.id = e.host ORDER BY e.seq;
DROP TABLE events;
DROP TABLE hosts;
ALTER TABLE events_new RENAME TO events;

-- A block: the first and last number, the oldest and newest time, and of each event its class (one octet) and its time
-- (microseconds after the oldest; four octets, or eight in a block that spans more than an hour).
CREATE TABLE blocks (
    first   INTEGER PRIMARY KEY,
    last    INTEGER NOT NULL,
    oldest  INTEGER NOT NULL,
    newest  INTEGER NOT NULL,
    classes BLOB NOT NULL,
    times   BLOB NOT NULL
) STRICT;
CREATE INDEX blocks_newest ON blocks (newest, oldest, last);
CREATE INDEX blocks_oldest ON blocks (oldest, newest, last);

-- Which events of a block have a value. `kind`: 0 all of the user, 1 a VM, 2 a host, 3 all that have an address, in the order
-- of the addresses, 4 a run of those addresses, by its first.
CREATE TABLE terms (
    block INTEGER NOT NULL,
    user  INTEGER NOT NULL,
    kind  INTEGER NOT NULL,
    term  ANY NOT NULL,
    rows  BLOB NOT NULL,
    PRIMARY KEY (block, user, kind, term)
) STRICT, WITHOUT ROWID;
