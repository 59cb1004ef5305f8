//! Exit codes, so that scripts need not read messages.

use std::process::ExitCode;

/// For `tapgate --help`.
pub const EXIT_CODES: &str = "Exit codes of client commands:
  0  done
  1  something else went wrong
  2  the command line is wrong
  3  no API key, or one that is not valid
  4  not found
  5  conflict with what is there (a name taken, a VM in another state)
  6  the API refused a value
  7  the API cannot be reached
  8  the VM failed, or was not ready in time
  9  the API cannot take the request now (rate limit, full disk); try again later
`tapgate ssh` exits as ssh does.";

/// Why a command ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Exit {
    Other = 1,
    Usage = 2,
    Unauthorized = 3,
    NotFound = 4,
    Conflict = 5,
    Refused = 6,
    Unreachable = 7,
    NotReady = 8,
    Later = 9,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

impl Exit {
    pub(super) const fn of_status(status: u16) -> Self {
        match status {
            401 | 403 => Self::Unauthorized,
            404 => Self::NotFound,
            409 => Self::Conflict,
            429 | 503 => Self::Later,
            400..=499 => Self::Refused,
            _ => Self::Other,
        }
    }
}

/// A command that did not do its work.
#[derive(Debug)]
pub(super) struct Failure {
    pub(super) exit: Exit,
    pub(super) message: String,
}

impl Failure {
    pub(super) fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into() }
    }

    pub(super) fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self::new(Exit::Other, error.to_string())
    }
}

/// The client's result.
pub(super) type Done<T = ()> = Result<T, Failure>;

/// There is no such thing.
pub(super) fn not_found(what: &str, given: &str) -> Failure {
    Failure::new(Exit::NotFound, format!("there is no {what} with the ID or name {given}"))
}
