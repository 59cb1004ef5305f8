-- Whether a request with a key, that has not ended, has stored anything: if its daemon ends, a retry may not do it again.
ALTER TABLE idempotency ADD COLUMN stored INTEGER NOT NULL DEFAULT 0;
