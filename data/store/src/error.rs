//! What can go wrong in the store, grouped by who has to act: the caller, the operator, or us.

use tapgate_model::lifecycle::Refusal;

/// What was looked for and is not there (or is another account's: the same answer).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An agent.
    Agent,
    /// An API key.
    ApiKey,
    /// An environment variable.
    Env,
    /// An egress rule.
    Rule,
    /// A secret.
    Secret,
    /// A snapshot.
    Snapshot,
    /// A user.
    User,
    /// A VM.
    Vm,
}

/// What stands in the way of a write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Conflict {
    /// An active agent has the name.
    #[error("an active agent with this name already exists")]
    AgentName,
    /// The address has an account.
    #[error("an account with this email already exists")]
    Email,
    /// Another secret sets the variable.
    #[error("another secret already uses this environment variable")]
    EnvVar,
    /// Another rule of the account has the name.
    #[error("another rule of the account already has this name")]
    RuleName,
    /// Another secret has the name.
    #[error("a secret with this name already exists")]
    SecretName,
    /// The snapshot is not ready yet, or failed.
    #[error("the snapshot is not ready")]
    SnapshotNotReady,
    /// The call does not fit what the VM is doing.
    #[error("{0}")]
    State(Refusal),
    /// A VM that is not destroyed has the name.
    #[error("a VM with this name already exists")]
    VmName,
    /// Every address or SSH port of the host is taken.
    #[error("the host has no free address or SSH port for another VM; destroy one first")]
    HostFull,
    /// The host's memory is given away.
    #[error("the host has {free_mib} MiB of memory left for VMs; stop one, or ask for less (memory_mib)")]
    HostMemory {
        /// What is left.
        free_mib: u64,
    },
    /// The host's disk is given away.
    #[error("the host has {free_gib} GiB of disk left for VMs; destroy one, or ask for less (disk_gib)")]
    HostDisk {
        /// What is left.
        free_gib: u64,
    },
    /// The account has as many as it may.
    #[error("the account may have at most {limit} {what}; delete some first")]
    Quota {
        /// What there are too many of, in the plural.
        what: &'static str,
        /// How many are allowed.
        limit: u32,
    },
}

/// An operation that did not happen. Nothing is half done: every write is one transaction.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// It is not there.
    #[error("not found")]
    NotFound(Kind),
    /// Something stands in the way.
    #[error(transparent)]
    Conflict(#[from] Conflict),
    /// It is no longer what the caller saw.
    #[error("it was changed since you read it; read it again")]
    Changed,
    /// A cursor that this query did not hand out.
    #[error("the cursor is broken or belongs to another query; start again without it")]
    Cursor,
    /// The engine reported a state that cannot follow.
    #[error("a VM that is {from} cannot become {to}")]
    Illegal {
        /// The recorded state.
        from: &'static str,
        /// The reported one.
        to: &'static str,
    },
    /// The disk is full, the file locked or not writable, or too much is waiting. Trying later may help.
    #[error("the database cannot be written now: {0}")]
    Unavailable(String),
    /// The file is damaged or not ours.
    #[error("the database is damaged: {0}; restore the last backup")]
    Corrupt(String),
    /// The sealing key does not fit the database.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// A file or folder cannot be used.
    #[error("cannot use {path}: {source}")]
    Io {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A fault of ours.
    #[error("internal error of the store: {0}")]
    Internal(String),
}

impl StoreError {
    /// Says which file is damaged, where that is not said yet.
    pub(crate) fn of_file(self, path: &std::path::Path) -> Self {
        let path = path.display().to_string();
        match self {
            Self::Corrupt(what) if !what.contains(&path) => Self::Corrupt(format!("{path}: {what}")),
            other => other,
        }
    }
}

pub(crate) use crate::seal::SealError;

/// The crate's result.
pub(crate) type Result<T, E = StoreError> = std::result::Result<T, E>;

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode as C;
        match error.sqlite_error_code() {
            Some(
                C::DiskFull
                | C::DatabaseBusy
                | C::DatabaseLocked
                | C::ReadOnly
                | C::CannotOpen
                | C::SystemIoFailure
                | C::PermissionDenied
                | C::OutOfMemory,
            ) => Self::Unavailable(error.to_string()),
            Some(C::DatabaseCorrupt | C::NotADatabase) => Self::Corrupt(error.to_string()),
            _ => Self::Internal(error.to_string()),
        }
    }
}
