-- Answers to POSTs that carried an Idempotency-Key, so that a retry gets the same answer and does nothing. `status` is
-- absent while the first one runs. Bodies are sealed: some hold a token that is shown once.

CREATE TABLE idempotency (
    user        TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    key         TEXT NOT NULL,
    fingerprint BLOB NOT NULL,
    status      INTEGER,
    body        BLOB,
    created_at  INTEGER NOT NULL,
    PRIMARY KEY (user, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_age ON idempotency (created_at);
