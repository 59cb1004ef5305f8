-- Who holds how much, so that what is too much is taken from who holds most: events, about how many octets they take, and a number
-- below which none of them stands. Counted at the next start, which goes through the events once; then kept with every batch.
CREATE TABLE holdings (
    user   INTEGER NOT NULL,
    vm     INTEGER NOT NULL,
    events INTEGER NOT NULL,
    octets INTEGER NOT NULL,
    oldest INTEGER NOT NULL,
    PRIMARY KEY (user, vm)
) STRICT, WITHOUT ROWID;

-- Numbers that retention took from the middle, each run with the chain's hash at its last event and a code under the chain's key.
CREATE TABLE cuts (
    first INTEGER PRIMARY KEY,
    last  INTEGER NOT NULL,
    hash  BLOB NOT NULL,
    mac   BLOB NOT NULL
) STRICT;

-- A block from which events are missing lists those that are there: how far the number of each lies after the first (four octets).
-- Its places, classes and times are then of these alone, and it may span any length. NULL: every number of the span is there.
ALTER TABLE blocks ADD COLUMN places BLOB;

-- What finds events is made anew at the next start: the list by addresses is kept in parts, and the bounds of busy hosts besides.
DELETE FROM terms;
DELETE FROM blocks;
