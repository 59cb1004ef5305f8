//! Versions of what can be updated, for callers that insist on having seen the newest.

use crate::error::{Result, StoreError};

/// The versions that a caller accepts.
#[derive(Clone, Debug)]
pub struct Expected(Want);

#[derive(Clone, Debug)]
enum Want {
    Any,
    There,
    OneOf(Vec<String>),
}

impl Expected {
    /// Whatever is there, or nothing.
    pub const fn any() -> Self {
        Self(Want::Any)
    }

    /// Whatever is there, but something.
    pub const fn there() -> Self {
        Self(Want::There)
    }

    /// One of these.
    pub const fn one_of(versions: Vec<String>) -> Self {
        Self(Want::OneOf(versions))
    }

    /// `now` is empty for what is not there.
    pub(crate) fn check(&self, now: &str) -> Result<()> {
        let fits = match &self.0 {
            Want::Any => true,
            Want::There => !now.is_empty(),
            Want::OneOf(versions) => !now.is_empty() && versions.iter().any(|version| version == now),
        };
        if fits { Ok(()) } else { Err(StoreError::Changed) }
    }
}
