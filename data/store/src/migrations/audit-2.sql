-- A single address is answered by class like every other filter; a range is read from this index alone.

DROP INDEX events_address;
CREATE INDEX events_address ON events (user, address, class, ts, seq) WHERE address IS NOT NULL;
