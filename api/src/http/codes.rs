//! The error codes of the API: each with its status, what it means and what to do about it. Nothing answers with a code that
//! is not in this list, and `docs/api.md` is held against it by a test. Stable: a code is never renamed or given another
//! meaning.

use axum::http::StatusCode;

macro_rules! codes {
    ($($variant:ident = $status:ident $word:literal, $means:literal, $remedy:literal;)+) => {
        /// What went wrong, for programs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[non_exhaustive]
        pub enum Code { $(#[doc = $means] $variant,)+ }

        impl Code {
            /// Every code, sorted by word.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// The word in the error envelope.
            pub const fn word(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }

            /// The HTTP status that it is answered with, always.
            pub const fn status(self) -> StatusCode {
                match self { $(Self::$variant => StatusCode::$status,)+ }
            }

            /// What it means.
            pub const fn means(self) -> &'static str {
                match self { $(Self::$variant => $means,)+ }
            }

            /// What to do about it.
            pub const fn remedy(self) -> &'static str {
                match self { $(Self::$variant => $remedy,)+ }
            }
        }
    };
}

codes! {
    AgentNameTaken = CONFLICT "agent_name_taken", "An active agent has this name", "choose another name, or destroy that agent";
    AgentNotFound = NOT_FOUND "agent_not_found", "No such agent, or it has been destroyed", "list agents";
    ApiKeyNotFound = NOT_FOUND "api_key_not_found", "No such API key, or it was revoked", "list keys";
    CodeNotFound = NOT_FOUND "code_not_found", "The device code is wrong, used or expired (on the page that confirms it)", "ask the program for a new one";
    DriverCannot = UNPROCESSABLE_ENTITY "driver_cannot", "The host's driver cannot do this", "leave it, or have the operator choose another `driver`";
    EmailTaken = CONFLICT "email_taken", "An account with this address exists", "log in, or reset the password";
    EnvNotFound = NOT_FOUND "env_not_found", "No such environment variable", "list variables";
    EnvVarTaken = CONFLICT "env_var_taken", "Another secret sets this environment variable", "choose another `env_var`, or change that secret";
    HostDiskFull = SERVICE_UNAVAILABLE "host_disk_full", "The host's disk has no room for this VM", "try again after `Retry-After`, ask for a smaller disk, or have the operator make room";
    HostFull = CONFLICT "host_full", "The host has no free address or SSH port", "destroy a VM, or have the operator widen `guest_v4` or `ssh_ports`";
    HostMemoryFull = SERVICE_UNAVAILABLE "host_memory_full", "The host's memory has no room for this VM", "try again after `Retry-After`, ask for less memory, or have the operator make room";
    IdempotencyKeyReused = UNPROCESSABLE_ENTITY "idempotency_key_reused", "The Idempotency-Key was sent with another request before", "use a new key for each request, the same one only for retries";
    InternalError = INTERNAL_SERVER_ERROR "internal_error", "A fault of the daemon", "the daemon's log says what; report it";
    InvalidBody = BAD_REQUEST "invalid_body", "The body broke off or could not be decoded", "send it again";
    InvalidCursor = BAD_REQUEST "invalid_cursor", "The cursor is broken, of another query, or of another account", "start again without it, and keep filters and order from page to page";
    InvalidIdempotencyKey = BAD_REQUEST "invalid_idempotency_key", "The Idempotency-Key is not 1 to 255 printable ASCII characters", "send a random UUID";
    InvalidIfMatch = BAD_REQUEST "invalid_if_match", "The If-Match header is neither `*` nor a list of tags in quotes", "send what `ETag` said, as it was";
    InvalidJson = BAD_REQUEST "invalid_json", "The body is not a JSON object", "send one, `{}` at least where the message says so";
    InvalidParameter = BAD_REQUEST "invalid_parameter", "A query parameter has a value that cannot be, is missing, or is given twice", "the message names it and says what it may be";
    LinkNotFound = NOT_FOUND "link_not_found", "The link of a mail has expired or was used (on the page behind it)", "ask for a new one";
    MethodNotAllowed = METHOD_NOT_ALLOWED "method_not_allowed", "The path does not take this method", "the header `Allow` lists what it takes";
    NotFound = NOT_FOUND "not_found", "There is nothing at this path", "compare it with `/docs`";
    NotInForce = SERVICE_UNAVAILABLE "not_in_force", "The change of policy, rules or secrets is stored, and did not come into force within 10 s; it does as soon as that can be", "do not rely on it yet, nor send it again: read what is stored, and have the operator look at the daemon's log";
    OutcomeUnknown = CONFLICT "outcome_unknown", "The first request with this Idempotency-Key stored something and then failed, or the daemon ended; its answer is lost", "look for what it made; if it is not there, send the request with a new key";
    PasswordWrong = FORBIDDEN "password_wrong", "`current_password` is not the password of the account", "send the right one, or reset it";
    PayloadTooLarge = PAYLOAD_TOO_LARGE "payload_too_large", "The body is larger than 256 KiB, or than 32 KiB without a key", "send less";
    PreconditionFailed = PRECONDITION_FAILED "precondition_failed", "It was changed since the version that If-Match names", "read it again, then decide again";
    QuotaExceeded = CONFLICT "quota_exceeded", "The account has as many of these as it may", "delete some, or ask the operator";
    RateLimited = TOO_MANY_REQUESTS "rate_limited", "Too many requests from this key, account or address", "wait as many seconds as `Retry-After` says";
    RequestInProgress = CONFLICT "request_in_progress", "The first request with this Idempotency-Key still runs", "try again after `Retry-After`";
    RequestTimeout = REQUEST_TIMEOUT "request_timeout", "The body did not arrive within 15 s", "send it again";
    RuleNameTaken = CONFLICT "rule_name_taken", "Another rule of the account, or of one of its VMs, has this name", "choose another name, or delete that rule";
    RuleNotFound = NOT_FOUND "rule_not_found", "No such egress rule here", "list rules; those of a VM are under the VM";
    SecretNameTaken = CONFLICT "secret_name_taken", "Another secret has this name", "choose another name, or update that secret";
    SecretNotFound = NOT_FOUND "secret_not_found", "No such secret", "list secrets";
    SignupClosed = FORBIDDEN "signup_closed", "This host takes no new accounts, or only invited ones", "ask the operator for an account or an invitation";
    SnapshotNotFound = NOT_FOUND "snapshot_not_found", "No such snapshot, or it was deleted", "list snapshots";
    SnapshotNotReady = CONFLICT "snapshot_not_ready", "The snapshot is still being taken, or failed", "wait until its status is `ready`";
    Unauthorized = UNAUTHORIZED "unauthorized", "The API key is missing, not valid or revoked, or email and password do not fit", "send `Authorization: Bearer <api_key>`; log in for a new key";
    Unavailable = SERVICE_UNAVAILABLE "unavailable", "The database cannot be written now, or too much is waiting; nothing was changed", "try again after `Retry-After`; the operator should look at the disk";
    UnknownParameter = BAD_REQUEST "unknown_parameter", "The query has a parameter that this path does not know", "leave it out; the message names it";
    UnsupportedMediaType = UNSUPPORTED_MEDIA_TYPE "unsupported_media_type", "The body is not declared as JSON", "send `Content-Type: application/json`";
    UserNotFound = NOT_FOUND "user_not_found", "The account of the key is gone", "log in again";
    ValidationError = UNPROCESSABLE_ENTITY "validation_error", "A field is missing, unknown, or has a value that cannot be", "the message names it and says what it may be";
    VmAlreadyRunning = CONFLICT "vm_already_running", "Start, but the VM runs or is about to", "nothing";
    VmBusy = CONFLICT "vm_busy", "The VM changed its state meanwhile", "read it, then decide again";
    VmDestroyed = CONFLICT "vm_destroyed", "The VM has been destroyed", "create another";
    VmNameTaken = CONFLICT "vm_name_taken", "A VM that is not destroyed has this name", "choose another name, or destroy that VM";
    VmNotFound = NOT_FOUND "vm_not_found", "No such VM", "list VMs";
    VmNotRunning = CONFLICT "vm_not_running", "Stop, suspend or snapshot, but the VM does not run", "start it first, or leave it";
    VmNotStopped = CONFLICT "vm_not_stopped", "Destroy, but the VM runs", "stop it first";
    VmStopping = CONFLICT "vm_stopping", "Start, but the VM is still shutting down", "wait until its status_detail is `stopped`";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_sorted_and_each_is_there_once() {
        assert!(Code::ALL.windows(2).all(|pair| pair[0].word() < pair[1].word()));
    }
}
