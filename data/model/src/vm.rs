//! The states of a VM as the API shows them.

use serde::{Deserialize, Serialize};

/// The stable status that clients branch on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Gone.
    Destroyed,
    /// An error; the record says which.
    Failed,
    /// Being made.
    Pending,
    /// Up.
    Running,
    /// Shut down.
    Stopped,
}

/// The internal state, for observation.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum StatusDetail {
    /// Accepted, waiting for its turn.
    Queued,
    /// Disk, seed, tap and gate are being made.
    Creating,
    /// The VMM is being started.
    Starting,
    /// The VMM runs; SSH does not answer yet.
    Running,
    /// SSH answers.
    Ready,
    /// Being shut down.
    Stopping,
    /// Shut down; the disk remains.
    Stopped,
    /// Disk and records are being removed.
    Destroying,
    /// Gone.
    Destroyed,
    /// An error; the record says which.
    Failed,
}

impl StatusDetail {
    /// Every state, in the order of a life.
    pub const ALL: [Self; 10] = [
        Self::Queued,
        Self::Creating,
        Self::Starting,
        Self::Running,
        Self::Ready,
        Self::Stopping,
        Self::Stopped,
        Self::Destroying,
        Self::Destroyed,
        Self::Failed,
    ];

    /// The simplified status.
    pub const fn status(self) -> Status {
        match self {
            Self::Queued | Self::Creating | Self::Starting => Status::Pending,
            Self::Running | Self::Ready => Status::Running,
            Self::Stopping | Self::Stopped => Status::Stopped,
            Self::Destroying | Self::Destroyed => Status::Destroyed,
            Self::Failed => Status::Failed,
        }
    }

    /// The word of the API and the database.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Creating => "creating",
            Self::Starting => "starting",
            Self::Running => "running",
            Self::Ready => "ready",
            Self::Stopping => "stopping",
            Self::Stopped => "stopped",
            Self::Destroying => "destroying",
            Self::Destroyed => "destroyed",
            Self::Failed => "failed",
        }
    }

    /// The state with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|state| state.word() == word)
    }
}

impl Status {
    /// The word of the API.
    pub const fn word(self) -> &'static str {
        match self {
            Self::Destroyed => "destroyed",
            Self::Failed => "failed",
            Self::Pending => "pending",
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }

    /// The status with this word.
    pub fn from_word(word: &str) -> Option<Self> {
        [Self::Destroyed, Self::Failed, Self::Pending, Self::Running, Self::Stopped]
            .into_iter()
            .find(|status| status.word() == word)
    }
}
