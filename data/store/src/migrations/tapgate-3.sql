-- What a stored snapshot is checked against when it comes back, and whether a deleted one's bytes are gone.

ALTER TABLE snapshots ADD COLUMN sha256 TEXT;
ALTER TABLE snapshots ADD COLUMN file_bytes INTEGER;
ALTER TABLE snapshots ADD COLUMN collected_at INTEGER;
CREATE INDEX snapshots_unfinished ON snapshots (status) WHERE status IN ('pending', 'uploading');
CREATE INDEX snapshots_uncollected ON snapshots (seq) WHERE deleted_at IS NOT NULL AND collected_at IS NULL;
