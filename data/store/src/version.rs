//! Versions of what can be updated, for callers that insist on having seen the newest.

use crate::error::{Result, StoreError};

/// The versions that a caller accepts; `any` accepts all.
#[derive(Clone, Debug, Default)]
pub struct Expected(Option<Vec<String>>);

impl Expected {
    /// Whatever is there.
    pub const fn any() -> Self {
        Self(None)
    }

    /// One of these.
    pub const fn one_of(versions: Vec<String>) -> Self {
        Self(Some(versions))
    }

    pub(crate) fn check(&self, now: &str) -> Result<()> {
        match &self.0 {
            Some(versions) if !versions.iter().any(|version| version == now) => Err(StoreError::Changed),
            _ => Ok(()),
        }
    }
}
