//! Prefixed, opaque resource ids: `vm_k3mf9xvw2pq4t7xm`.
//!
//! 16 characters of a 32-letter alphabet: 80 bits from the system's generator. Never parsed for meaning.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// Lower-case letters and digits without the look-alikes `i`, `l`, `o`, `u`.
const ALPHABET: &[u8; 32] = b"0123456789bcdfghjkmnpqrstvwxyzae";
const LENGTH: usize = 16;
/// Longest id accepted on input, prefix included.
const MAX: usize = 64;

/// An id that has not its type's prefix, or holds anything but lower-case letters and digits after it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a valid id: expected `{expected}` followed by lower-case letters and digits")]
pub struct IdError {
    expected: &'static str,
}

fn random(prefix: &str) -> String {
    use rand::TryRngCore as _;
    let mut bytes = [0u8; LENGTH];
    rand::rngs::OsRng.try_fill_bytes(&mut bytes).expect("the kernel's random generator always answers");
    let mut id = String::with_capacity(prefix.len() + LENGTH);
    id.push_str(prefix);
    id.extend(bytes.iter().map(|b| char::from(ALPHABET[usize::from(b & 31)])));
    id
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident = $prefix:literal;)+) => {$(
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// What every id of this kind begins with.
            pub const PREFIX: &'static str = $prefix;

            /// A new random id.
            pub fn generate() -> Self {
                Self(random($prefix))
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;
            fn from_str(text: &str) -> Result<Self, IdError> {
                match text.strip_prefix($prefix) {
                    Some(rest)
                        if !rest.is_empty()
                            && text.len() <= MAX
                            && rest.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit()) =>
                    {
                        Ok(Self(text.to_owned()))
                    }
                    _ => Err(IdError { expected: $prefix }),
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;
            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    )+};
}

ids! {
    /// A virtual machine.
    VmId = "vm_";
    /// An egress rule, of an account or a VM.
    RuleId = "egr_";
    /// An egress audit event.
    EventId = "ee_";
    /// A secret.
    SecretId = "sec_";
    /// A snapshot.
    SnapshotId = "snap_";
    /// An agent.
    AgentId = "agt_";
    /// An environment variable.
    EnvId = "env_";
    /// A user: the account that owns everything else.
    UserId = "usr_";
    /// An API key.
    ApiKeyId = "key_";
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generated_ids_parse_and_differ() {
        let (a, b) = (VmId::generate(), VmId::generate());
        assert_ne!(a, b);
        assert_eq!(a.as_str().parse::<VmId>().unwrap(), a);
        assert_eq!(a.as_str().len(), 3 + LENGTH);
    }

    #[test]
    fn wrong_prefixes_and_rubbish_are_refused() {
        for text in ["", "vm_", "egr_abc", "vm_ABC", "vm_a/b", "vm_../..", "vm_ a", "vm_\u{e9}"] {
            assert!(text.parse::<VmId>().is_err(), "{text:?}");
        }
        assert!(format!("vm_{}", "a".repeat(100)).parse::<VmId>().is_err());
    }
}
