//! Secret values and where they may go. A value is wiped on drop and has no way to be printed.

use crate::{HostName, HostPattern};
use std::fmt;
use zeroize::{Zeroize, ZeroizeOnDrop};

/// What every placeholder begins with.
pub const PLACEHOLDER_PREFIX: &str = "IRONSH_PROXY_";
/// Longest secret value in octets: what common servers take as one header line.
pub const MAX_VALUE: usize = 16 * 1024;

/// Why a text cannot be a secret's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SecretError {
    /// CR, LF, NUL or another control character: it would break out of a header.
    #[error("a secret must not contain control characters such as line breaks; it is sent in HTTP headers")]
    Control,
    /// Nothing to send.
    #[error("a secret must not be empty")]
    Empty,
    /// It holds another secret's placeholder, or its own.
    #[error("a secret must not contain `IRONSH_PROXY_`: placeholders are never replaced inside secrets")]
    Placeholder,
    /// Too long for a header.
    #[error("a secret is at most 16384 bytes long")]
    TooLong,
}

/// A real secret value.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SecretValue(Vec<u8>);

impl SecretValue {
    /// Checks and takes the value.
    pub fn new(value: Vec<u8>) -> Result<Self, SecretError> {
        let value = Self(value);
        let error = if value.0.is_empty() {
            SecretError::Empty
        } else if value.0.len() > MAX_VALUE {
            SecretError::TooLong
        } else if value.0.iter().any(|b| b.is_ascii_control()) {
            SecretError::Control
        } else if value.0.windows(PLACEHOLDER_PREFIX.len()).any(|w| w == PLACEHOLDER_PREFIX.as_bytes()) {
            SecretError::Placeholder
        } else {
            return Ok(value);
        };
        Err(error)
    }

    /// The bytes, for the one place that writes them upstream (and the one that seals them at rest).
    pub fn expose(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for SecretValue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretValue(..)")
    }
}

/// One secret as the proxy needs it.
#[derive(Clone, Debug)]
pub struct SecretBinding {
    /// The name, which audit events list and the placeholder ends in.
    pub name: String,
    /// The environment variable that holds the placeholder in the guest.
    pub env_var: String,
    /// Where it may be sent.
    pub hosts: Vec<HostPattern>,
    /// What is sent in the placeholder's stead.
    pub value: SecretValue,
}

impl SecretBinding {
    /// What the workload holds instead of the value.
    pub fn placeholder(&self) -> String {
        format!("{PLACEHOLDER_PREFIX}{}", self.name)
    }

    /// Whether the secret may be sent to the host.
    pub fn applies_to(&self, host: &HostName) -> bool {
        self.hosts.iter().any(|pattern| pattern.matches(host))
    }

    /// Whether the secret names the host otherwise than through `*`.
    pub fn names(&self, host: &HostName) -> bool {
        self.hosts.iter().any(|pattern| pattern.is_explicit() && pattern.matches(host))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_that_would_break_a_header_are_refused() {
        for value in ["", "a\r\nb", "a\nb", "a\0b", "a\x7f", "x IRONSH_PROXY_y", &"a".repeat(MAX_VALUE + 1)] {
            assert!(SecretValue::new(value.as_bytes().to_vec()).is_err(), "{value:.20?}");
        }
        assert!(SecretValue::new(b"ghp_abc".to_vec()).is_ok());
    }

    #[test]
    fn debug_never_shows_the_value() {
        let binding = SecretBinding {
            name: "n".into(),
            env_var: "N".into(),
            hosts: vec![HostPattern::Any],
            value: SecretValue::new(b"hunter2".to_vec()).unwrap(),
        };
        assert!(!format!("{binding:?}").contains("hunter2"));
        assert!(!format!("{binding:?}").contains("104, 117"));
    }
}
