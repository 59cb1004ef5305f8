-- What the answers kept for retries take, by account and together, so that making room asks for no scan: each is counted
-- with its key, its body and 128 octets for the rest. Those that still run and those that ended are found apart.
CREATE INDEX idempotency_running ON idempotency (user, created_at) WHERE status IS NULL;
CREATE INDEX idempotency_ended ON idempotency (user, created_at) WHERE status IS NOT NULL;

CREATE TABLE idempotency_shares (
    user    TEXT PRIMARY KEY NOT NULL,
    answers INTEGER NOT NULL,
    octets  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_most ON idempotency_shares (octets);
INSERT INTO idempotency_shares (user, answers, octets)
SELECT user, count(*), sum(128 + length(key) + ifnull(length(body), 0)) FROM idempotency GROUP BY user;
INSERT INTO meta (key, value) SELECT 'idempotency_octets', ifnull(sum(octets), 0) FROM idempotency_shares;

CREATE TRIGGER idempotency_taken AFTER INSERT ON idempotency BEGIN
    INSERT INTO idempotency_shares (user, answers, octets)
    VALUES (NEW.user, 1, 128 + length(NEW.key) + ifnull(length(NEW.body), 0))
    ON CONFLICT (user) DO UPDATE SET answers = answers + 1, octets = octets + excluded.octets;
    UPDATE meta SET value = value + 128 + length(NEW.key) + ifnull(length(NEW.body), 0) WHERE key = 'idempotency_octets';
END;
CREATE TRIGGER idempotency_answered AFTER UPDATE OF body ON idempotency BEGIN
    UPDATE idempotency_shares SET octets = octets + ifnull(length(NEW.body), 0) - ifnull(length(OLD.body), 0)
    WHERE user = NEW.user;
    UPDATE meta SET value = value + ifnull(length(NEW.body), 0) - ifnull(length(OLD.body), 0) WHERE key = 'idempotency_octets';
END;
CREATE TRIGGER idempotency_freed AFTER DELETE ON idempotency BEGIN
    UPDATE idempotency_shares
    SET answers = answers - 1, octets = octets - 128 - length(OLD.key) - ifnull(length(OLD.body), 0)
    WHERE user = OLD.user;
    DELETE FROM idempotency_shares WHERE user = OLD.user AND answers = 0;
    UPDATE meta SET value = value - 128 - length(OLD.key) - ifnull(length(OLD.body), 0) WHERE key = 'idempotency_octets';
END;

-- A revoked key is no longer kept.
DELETE FROM api_keys WHERE revoked_at IS NOT NULL;
ALTER TABLE api_keys DROP COLUMN revoked_at;

-- What is destroyed stays for good: what is counted of the rest does not go through it. Nor do codes through all there are.
CREATE INDEX vms_living ON vms (user, detail, handle) WHERE detail <> 'destroyed';
CREATE INDEX device_codes_age ON device_codes (expires_at);
