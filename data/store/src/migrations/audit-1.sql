-- What VMs tried to reach. Rows are only added, and removed from the old end.
--
-- `class` folds verdict, allowed, mode and protocol into one number, so that each index below answers any
-- combination of those filters by a few ordered seeks. Users, VMs and hosts are interned to keep the indexes small.
-- `hash` covers the row and the hash before it, under a key that is not in this file.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY NOT NULL,
    value ANY NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE names (
    id   INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE
) STRICT;

-- Hosts belong to a user, so that those of removed events can be removed too: guests can make up any number.
CREATE TABLE hosts (
    id   INTEGER PRIMARY KEY,
    user INTEGER NOT NULL,
    name TEXT NOT NULL,
    UNIQUE (user, name)
) STRICT;

CREATE TABLE events (
    seq         INTEGER PRIMARY KEY,
    id          TEXT NOT NULL,
    ts          INTEGER NOT NULL,
    user        INTEGER NOT NULL,
    vm          INTEGER NOT NULL,
    class       INTEGER NOT NULL,
    host        INTEGER,
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
CREATE INDEX events_user ON events (user, class, ts, seq);
CREATE INDEX events_vm ON events (vm, class, ts, seq);
CREATE INDEX events_host ON events (host, class, ts, seq) WHERE host IS NOT NULL;
CREATE INDEX events_address ON events (user, address, ts, seq) WHERE address IS NOT NULL;

-- Events that were not kept because a VM made more than could be written.
CREATE TABLE dropped (
    vm    TEXT PRIMARY KEY NOT NULL,
    count INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
