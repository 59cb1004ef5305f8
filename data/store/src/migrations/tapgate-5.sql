-- A snapshot may hold the memory too: where it is and how it is checked (JSON). And a VM made from one has a memory to go on
-- with that is another VM's.
ALTER TABLE snapshots ADD COLUMN kind TEXT NOT NULL DEFAULT 'disk' CHECK (kind IN ('disk', 'memory'));
ALTER TABLE snapshots ADD COLUMN memory TEXT;
ALTER TABLE vms ADD COLUMN clone INTEGER NOT NULL DEFAULT 0 CHECK (clone IN (0, 1));
