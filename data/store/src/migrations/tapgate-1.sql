-- What users make. Times are microseconds since the Unix epoch; `seq` is the order of creation and ends every sort.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY NOT NULL,
    value ANY NOT NULL
) STRICT, WITHOUT ROWID;

-- The source of policy generations: one counter, so that a VM's generation rises whichever part of its policy changed.
INSERT INTO meta (key, value) VALUES ('generation', 1);

CREATE TABLE users (
    seq            INTEGER PRIMARY KEY,
    id             TEXT NOT NULL UNIQUE,
    first_name     TEXT NOT NULL,
    last_name      TEXT NOT NULL,
    email          TEXT NOT NULL,
    email_key      TEXT NOT NULL UNIQUE,
    email_verified INTEGER NOT NULL DEFAULT 0 CHECK (email_verified IN (0, 1)),
    password       TEXT NOT NULL,
    disabled       INTEGER NOT NULL DEFAULT 0 CHECK (disabled IN (0, 1)),
    mode           TEXT NOT NULL DEFAULT 'enforce' CHECK (mode IN ('enforce', 'warn')),
    generation     INTEGER NOT NULL,
    created_at     INTEGER NOT NULL
) STRICT;

CREATE TABLE api_keys (
    seq          INTEGER PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,
    user         TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    hash         BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER,
    revoked_at   INTEGER
) STRICT;
CREATE INDEX api_keys_user ON api_keys (user, created_at);

CREATE TABLE device_codes (
    seq        INTEGER PRIMARY KEY,
    hash       BLOB NOT NULL UNIQUE,
    requester  TEXT NOT NULL,
    user       TEXT REFERENCES users (id) ON DELETE CASCADE,
    created_at INTEGER NOT NULL,
    expires_at INTEGER NOT NULL
) STRICT;
CREATE INDEX device_codes_requester ON device_codes (requester, expires_at);

CREATE TABLE snapshots (
    seq             INTEGER PRIMARY KEY,
    id              TEXT NOT NULL UNIQUE,
    user            TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    vm              TEXT NOT NULL,
    base_image      TEXT,
    source_snapshot TEXT,
    label           TEXT,
    status          TEXT NOT NULL CHECK (status IN ('pending', 'uploading', 'ready', 'failed')),
    failure         TEXT,
    r2_key          TEXT,
    size_bytes      INTEGER,
    created_at      INTEGER NOT NULL,
    deleted_at      INTEGER
) STRICT;
CREATE INDEX snapshots_user ON snapshots (user, created_at, seq) WHERE deleted_at IS NULL;
CREATE INDEX snapshots_vm ON snapshots (vm, created_at, seq) WHERE deleted_at IS NULL;

CREATE TABLE vms (
    seq           INTEGER PRIMARY KEY,
    id            TEXT NOT NULL UNIQUE,
    user          TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name          TEXT NOT NULL,
    public_key    TEXT NOT NULL,
    detail        TEXT NOT NULL CHECK (detail IN ('queued', 'creating', 'starting', 'running', 'ready', 'stopping',
                                                  'stopped', 'destroying', 'destroyed', 'failed')),
    desired       TEXT NOT NULL CHECK (desired IN ('running', 'stopped', 'destroyed')),
    failure       TEXT,
    slot          INTEGER NOT NULL CHECK (slot BETWEEN 0 AND 4294967295),
    ssh_port      INTEGER NOT NULL CHECK (ssh_port BETWEEN 1 AND 65535),
    vcpus         INTEGER NOT NULL,
    memory_mib    INTEGER NOT NULL,
    disk_bytes    INTEGER NOT NULL,
    snapshot      TEXT REFERENCES snapshots (id),
    ca_cert       TEXT NOT NULL,
    ca_key        BLOB NOT NULL,
    handle        TEXT,
    mode          TEXT CHECK (mode IN ('enforce', 'warn')),
    inherit_rules INTEGER NOT NULL DEFAULT 1 CHECK (inherit_rules IN (0, 1)),
    generation    INTEGER NOT NULL,
    created_at    INTEGER NOT NULL,
    updated_at    INTEGER NOT NULL
) STRICT;
-- A name is free again once its VM's destruction was asked for; an address or port only when it is done.
CREATE UNIQUE INDEX vms_name ON vms (user, name) WHERE detail NOT IN ('destroying', 'destroyed');
CREATE UNIQUE INDEX vms_slot ON vms (slot) WHERE detail <> 'destroyed';
CREATE UNIQUE INDEX vms_port ON vms (ssh_port) WHERE detail <> 'destroyed';
CREATE INDEX vms_created ON vms (user, created_at, seq);
CREATE INDEX vms_updated ON vms (user, updated_at, seq);
CREATE INDEX vms_by_name ON vms (user, name, seq);
CREATE INDEX vms_detail ON vms (user, detail, created_at, seq);

CREATE TABLE rules (
    seq        INTEGER PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,
    user       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    vm         TEXT REFERENCES vms (id) ON DELETE CASCADE,
    name       TEXT,
    host       TEXT,
    cidr       TEXT,
    comment    TEXT,
    created_at INTEGER NOT NULL,
    CHECK ((host IS NULL) <> (cidr IS NULL))
) STRICT;
CREATE UNIQUE INDEX rules_name ON rules (user, name) WHERE name IS NOT NULL;
CREATE INDEX rules_created ON rules (user, vm, created_at, seq);
CREATE INDEX rules_host ON rules (user, vm, host);

CREATE TABLE secrets (
    seq        INTEGER PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,
    user       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    name       TEXT NOT NULL,
    env_var    TEXT NOT NULL,
    hosts      TEXT NOT NULL CHECK (json_valid(hosts)),
    value      BLOB NOT NULL,
    comment    TEXT,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (user, name),
    UNIQUE (user, env_var)
) STRICT;
CREATE INDEX secrets_created ON secrets (user, created_at, seq);

CREATE TABLE env (
    seq        INTEGER PRIMARY KEY,
    id         TEXT NOT NULL UNIQUE,
    user       TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    key        TEXT NOT NULL,
    value      BLOB NOT NULL,
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    UNIQUE (user, key)
) STRICT;

CREATE TABLE agents (
    seq          INTEGER PRIMARY KEY,
    id           TEXT NOT NULL UNIQUE,
    user         TEXT NOT NULL REFERENCES users (id) ON DELETE CASCADE,
    vm           TEXT NOT NULL REFERENCES vms (id) ON DELETE CASCADE,
    name         TEXT NOT NULL,
    repo         TEXT NOT NULL,
    branch       TEXT,
    harness      TEXT NOT NULL,
    prompt       TEXT NOT NULL,
    agent_args   TEXT,
    status       TEXT NOT NULL CHECK (status IN ('provisioning', 'running', 'idle')),
    failure      TEXT,
    created_at   INTEGER NOT NULL,
    updated_at   INTEGER NOT NULL,
    destroyed_at INTEGER
) STRICT;
CREATE UNIQUE INDEX agents_name ON agents (user, name) WHERE destroyed_at IS NULL;
CREATE INDEX agents_created ON agents (user, created_at, seq) WHERE destroyed_at IS NULL;
CREATE INDEX agents_vm ON agents (vm);
